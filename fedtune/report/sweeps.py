"""What a sweep found, for a terminal, a page and a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fedtune.report.tables import number, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def sweep_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and a row a point, the best first, then in the grid's order; a failed one with what ended it."""
    metrics = list(document["metrics"])
    if document["metric"] and document["metric"] not in metrics:
        metrics.insert(0, document["metric"])
    rows = []
    ordered = sorted(document["points"], key=lambda point: point["name"] != document["best"])
    for point in ordered:
        name = f"{point['name']} (best)" if point["name"] == document["best"] else point["name"]
        if "error" in point:
            rows.append([name, *[""] * (len(metrics) + 2), point["error"]])
            continue
        cells = []
        for metric in metrics:
            found = point["metrics"].get(metric)
            spread = "" if not found or found["sd"] is None else f" ± {number(found['sd'])}"
            cells.append(number(found["mean"]) + spread if found else "")
        payload = point["payload_bytes"]
        sent = f"{size(payload['down'])}, {size(payload['up'])}"
        rows.append([name, *cells, sent, f"{point['seconds']:.1f}", ""])
    header = ["point", *metrics, "payload down, up", "seconds", "ended by"]
    if all(not row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return header, rows


def sweep_table(document: Mapping[str, Any]) -> Table:
    """The sweep for a terminal."""
    header, rows = sweep_rows(document)
    table = Table(title=_caption(document), title_justify="left")
    for column in header:
        table.add_column(column, justify="left" if column in ("point", "ended by") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def sweep_markdown(document: Mapping[str, Any]) -> str:
    """The sweep for a page."""
    header, rows = sweep_rows(document)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return (
        "\n".join([f"{_caption(document)}:", "", *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"
    )


def _caption(document: Mapping[str, Any]) -> str:
    seeds = sorted({row["seed"] for row in document["rows"]})
    several = f"Mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "One seed"
    share = document.get("validation")
    scored = f"{share:.0%} of the training examples, held out for this" if share else "held-out examples"
    return f"{several}; {scored}"


def sweep_plot(document: Mapping[str, Any]) -> str | None:
    """The metric over the first setting that is a number, a line for each value of the others, as SVG.

    None where matplotlib is not installed, no setting is a number, or nothing came to its end.
    """
    metric, done = document["metric"], [point for point in document["points"] if "metrics" in point]
    axis = next((key for key in (done[0]["settings"] if done else ()) if _numeric(done, key)), None)
    if axis is None or find_spec("matplotlib") is None:
        return None
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for point in done:
        others = ", ".join(
            f"{key.rpartition('.')[2]} {v}" for key, v in point["settings"].items() if key != axis
        )
        found = point["metrics"][metric]
        lines.setdefault(others, []).append(
            (float(point["settings"][axis]), found["mean"], found["sd"] or 0.0)
        )
    return _drawn(axis, metric, lines)


def _numeric(points: Sequence[Mapping[str, Any]], key: str) -> bool:
    try:
        return len({float(point["settings"][key]) for point in points}) > 1
    except ValueError:
        return False


def _drawn(axis: str, metric: str, lines: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    values = [value for line in lines.values() for value, _, _ in line]
    with rc_context({"svg.hashsalt": "fedtune", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        axes: Axes = figure.subplots()
        for name, line in lines.items():
            x, y, spread = zip(*sorted(line), strict=True)
            axes.errorbar(x, y, spread, marker="o", markersize=3, capsize=2, label=name or None)
        if min(values) > 0 and max(values) >= 10 * min(values):
            axes.set_xscale("log")
        axes.set(xlabel=axis, ylabel=metric)
        if any(lines):
            axes.legend(fontsize=7)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue().decode()
