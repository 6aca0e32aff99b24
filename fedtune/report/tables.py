"""Tables for people: a run's summary and a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

COUNTS = ("tokens", "examples")  # what a score rests on; in the JSON, not in the tables


def size(count: float) -> str:
    """Bytes in decimal units, as the papers print them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def summary_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Scores before and after, and what the run cost."""
    scores = Table(title="Held-out examples", title_justify="left")
    for column, justify in (
        ("task", "left"),
        ("metric", "left"),
        ("zero-shot", "right"),
        (summary["method"], "right"),
    ):
        scores.add_column(column, justify=justify)  # type: ignore[arg-type]
    for task, metrics in summary["evaluation"].items():
        for metric, value in metrics.items():
            if metric in COUNTS:
                continue
            before = summary["zero_shot"].get(task, {}).get(metric)
            scores.add_row(task, metric, "" if before is None else number(before), number(value))
    cost = Table(title="What it cost", title_justify="left", show_header=False)
    cost.add_column()
    cost.add_column(justify="right")
    payload, framed, peak = summary["payload_bytes"], summary["framed_bytes"], summary["peak_memory_bytes"]
    trainable, total = summary["trainable_parameters"], summary["total_parameters"]
    cost.add_row("rounds x clients", f"{summary['rounds']} x {summary['clients']}")
    cost.add_row("trainable parameters", f"{trainable:,} of {total:,}")
    cost.add_row("payload down, up", f"{size(payload['down'])}, {size(payload['up'])}")
    cost.add_row("on the wire down, up", f"{size(framed['down'])}, {size(framed['up'])}")
    cost.add_row("payload a client and round", size(summary["payload_bytes_per_client_round"]))
    cost.add_row("peak memory client, server", f"{size(peak['client'])}, {size(peak['server'])}")
    seconds = summary["seconds"]
    cost.add_row(
        "seconds",
        f"{seconds['total']:.1f} (training {seconds['training']:.1f}, "
        f"evaluation {seconds['evaluation']:.1f})",
    )
    return [scores, cost]


def compare_table(document: Mapping[str, Any], metrics: Sequence[str]) -> Table:
    """One line a configuration: mean ± standard deviation over seeds, and the difference from the first."""
    entries = document["table"]
    seeds = len(entries[0]["seeds"])
    table = Table(
        title=f"Mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}", title_justify="left"
    )
    table.add_column("configuration")
    for metric in metrics:
        table.add_column(metric.replace(".", "\n"), justify="right")
        table.add_column(f"against\n{entries[0]['config']}", justify="right")
    for column in ("payload\ndown", "payload\nup", "client\nmemory", "seconds"):
        table.add_column(column, justify="right")
    for entry in entries:
        cells = [entry["config"]]
        for metric in metrics:
            found = entry["metrics"].get(metric)
            cells += (
                ["", ""]
                if found is None
                else [_spread(found["mean"], found["sd"]), _difference(entry, entries, found)]
            )
        payload = entry["payload_bytes"]
        cells += [size(payload["down"]), size(payload["up"]), size(entry["client_peak_memory_bytes"])]
        table.add_row(*cells, f"{entry['seconds']:.1f}")
    return table


def number(value: float | None) -> str:
    """Counts whole, everything else with four decimals; `-` for what was not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4f}"


def _spread(mean: float, sd: float | None) -> str:
    return number(mean) if sd is None else f"{mean:.4f} ± {sd:.4f}"


def _difference(
    entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], found: Mapping[str, Any]
) -> str:
    if entry is entries[0] or found["difference"] is None:
        return ""
    sd = found["difference_sd"]
    return f"{found['difference']:+.4f}" + ("" if sd is None else f" ± {sd:.4f}")
