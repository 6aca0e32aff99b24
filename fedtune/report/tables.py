"""Tables for people: a run's summary and a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from fedtune.evaluation.bootstrap import metrics_of
from fedtune.federation.left_out import counted

WIDEST = 400  # characters; no table here needs more


def size(count: float) -> str:
    """Bytes in decimal units, as the papers print them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def summary_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Scores before and after, and what the run cost."""
    scores = Table(title=scored_where(summary), title_justify="left")
    for column, justify in (
        ("task", "left"),
        ("metric", "left"),
        ("zero-shot", "right"),
        (summary["method"], "right"),
    ):
        scores.add_column(column, justify=justify)  # type: ignore[arg-type]
    names = summary.get("client_names", {})
    for task, metrics in summary["evaluation"].items():
        for metric in metrics_of(metrics):
            if metric == "tokens":
                continue
            before = summary["zero_shot"].get(task, {}).get(metric)
            after = number(metrics[metric]) + interval(metrics, metric)
            scores.add_row(task, metric, "" if before is None else number(before), after)
        for metric, spread in summary.get("per_client", {}).get(task, {}).items():
            client = str(spread["worst_client"])
            who = f"client {client}" + (f", {names[client]}" if client in names else "")
            worst = f"{number(spread['worst'])} ({who})"
            if "mean" in spread:  # not in runs of earlier versions
                scores.add_row(task, f"{metric}, mean of clients", "", number(spread["mean"]))
            scores.add_row(task, f"{metric}, worst client", "", worst)
    cost = Table(title="What it cost", title_justify="left", show_header=False)
    cost.add_column()
    cost.add_column(justify="right")
    payload, framed, peak = summary["payload_bytes"], summary["framed_bytes"], summary["peak_memory_bytes"]
    trainable, total = summary["trainable_parameters"], summary["total_parameters"]
    cost.add_row("rounds x clients", rounds_and_clients(summary))
    if best := summary.get("best"):
        cost.add_row("the result is", f"round {best['round']}, best {best['metric']}")
    if early := summary.get("stopped_early"):
        cost.add_row("ended early", f"{early['metric']} no better for {early['patience']} evaluations")
    if left_out := counted(summary):
        cost.add_row("left out, of rounds", left_out)
    cost.add_row("trainable parameters", f"{trainable:,} of {total:,}")
    if tokens := summary.get("tokens"):
        share = tokens["padding"] / tokens["computed"] if tokens["computed"] else 0.0
        cost.add_row("tokens computed, of them padding", f"{tokens['computed']:,}, {share:.1%}")
    cost.add_row("payload down, up", f"{size(payload['down'])}, {size(payload['up'])}")
    cost.add_row("on the wire down, up", f"{size(framed['down'])}, {size(framed['up'])}")
    cost.add_row("payload a client and round", size(summary["payload_bytes_per_client_round"]))
    cost.add_row("peak memory client, server", f"{size(peak['client'])}, {size(peak['server'])}")
    if peak.get("evaluation"):  # a run of an earlier version has none
        cost.add_row("peak memory of evaluation", size(peak["evaluation"]))
    seconds = summary["seconds"]
    cost.add_row(
        "seconds",
        f"{seconds['total']:.1f} (training {seconds['training']:.1f}, "
        f"evaluation {seconds['evaluation']:.1f})",
    )
    return [scores, cost]


def scored_where(summary: Mapping[str, Any]) -> str:
    """On whose held-out examples the scores are."""
    if not (scored := summary.get("scored")):
        return "Held-out examples"
    count, there = len(scored["clients"]), len(scored["clients"]) + len(scored["left_out"])
    examples = max((found["examples"] for found in summary["evaluation"].values()), default=0)
    of = "" if count == there else f" of {there}"
    return f"{examples:,} held-out examples of {count}{of} clients, scored by them"


def rounds_and_clients(summary: Mapping[str, Any]) -> str:
    """`3 x 10` where all ten clients were asked in each round; `3 x 4 of 10` where four were, on average."""
    rounds, clients, each = summary["rounds"], summary["clients"], summary["payload_bytes_per_client_round"]
    if not rounds or not each:  # nothing was sent, so no count follows from what was
        return f"{rounds} x {clients}"
    training = sum(summary["payload_bytes"].values()) - sum(summary.get("evaluation_bytes", {}).values())
    asked = round(training / each / rounds, 2)
    return f"{rounds} x {asked:g}" + ("" if asked == clients else f" of {clients}")


def compare_rows(document: Mapping[str, Any], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and one row a configuration.

    Of each metric: mean ± sd over seeds; the 95 % interval over examples and the worst client's score, where
    some row has them; and the difference from the first.
    """
    entries = document["table"]
    columns = {"low": "95 % over examples", "worst": "worst client"}
    header, shown = ["configuration"], dict[str, list[str]]()
    for metric in metrics:
        shown[metric] = [key for key in columns if any(key in e["metrics"].get(metric, {}) for e in entries)]
        header += [metric.partition(".")[2], *(columns[key] for key in shown[metric]), "against the first"]
    rows = []
    for entry in entries:
        cells = [entry["config"]]
        for metric in metrics:
            found = entry["metrics"].get(metric)
            if found is None:
                cells += [""] * (2 + len(shown[metric]))
                continue
            cells.append(_spread(found["mean"], found["sd"]))
            if "low" in shown[metric]:
                cells.append(f"{number(found['low'])} to {number(found['high'])}" if "low" in found else "")
            if "worst" in shown[metric]:
                cells.append(number(found["worst"]) if "worst" in found else "")
            cells.append(_difference(entry, entries, found))
        payload = entry["payload_bytes"]
        cells += [f"{size(payload['down'])}, {size(payload['up'])}", size(entry["client_peak_memory_bytes"])]
        rows.append([*cells, f"{entry['seconds']:.1f}"])
    return [*header, "payload down, up", "client memory", "seconds"], rows


def compare_table(document: Mapping[str, Any], metrics: Sequence[str]) -> Table:
    """The comparison for a terminal."""
    header, rows = compare_rows(document, metrics)
    table = Table(title=_caption(document), title_justify="left")
    for column in header:
        table.add_column(column, justify="left" if column == "configuration" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def compare_markdown(document: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """The comparison for a page."""
    header, rows = compare_rows(document, metrics)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return (
        "\n".join([_caption(document) + ":", "", *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"
    )


def _caption(document: Mapping[str, Any]) -> str:
    seeds = document["table"][0]["seeds"]
    several = f"Mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else f"Seed {seeds[0]}"
    return f"{several}; held-out examples"


def score_lines(document: Mapping[str, Any]) -> list[str]:
    """What `fedtune eval` found, a line a metric; a main metric with what it rests on and what scored it."""
    lines = []
    for name, by_task in document["scores"].items():
        for task, metrics in by_task.items():
            about = document["tasks"][task]
            for metric in metrics_of(metrics):
                line = f"{name}  {task}  {metric}  {number(metrics[metric])}"
                if f"{metric}_stderr" in metrics:
                    line += f" ± {number(metrics[f'{metric}_stderr'])}{interval(metrics, metric)}"
                if metric == about["metric"]:
                    cut = f", {metrics['truncated']} truncated" if metrics.get("truncated") else ""
                    line += f"  {metrics['examples']} examples{cut}  {about['scorer']}"
                lines.append(line)
    if "template" in document:
        lines.append(document["template"])
    notes = {task: about["notes"] for task, about in document["tasks"].items()}
    return lines + [f"{task}: {note}" for task, found in notes.items() for note in found]


def score_line(round: int, scores: Mapping[str, Mapping[str, float]]) -> str:
    """A round's scores in one short line; empty if it was not evaluated."""
    shown = [
        f"{metric} {number(value)}"
        for metrics in scores.values()
        for metric in metrics_of(metrics)
        if "/" not in metric and metric not in ("tokens", "perplexity")
        for value in [metrics[metric]]
    ]
    name = "zero-shot" if round == 0 else f"round {round}"
    return f"{name}: {', '.join(shown)}" if shown else ""


def interval(metrics: Mapping[str, Any], metric: str) -> str:
    """The 95 % interval of a metric in brackets, after a blank; nothing where there is none."""
    if f"{metric}_low" not in metrics:
        return ""
    return f" [{number(metrics[f'{metric}_low'])}, {number(metrics[f'{metric}_high'])}]"


def number(value: float | None) -> str:
    """Counts whole, everything else with four decimals; `-` for what was not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    whole = isinstance(value, int) or (value.is_integer() and abs(value) > 1)
    return f"{value:,.0f}" if whole else f"{value:.4f}"


def _spread(mean: float | None, sd: float | None) -> str:
    return number(mean) if sd is None else f"{number(mean)} ± {number(sd)}"


def _difference(
    entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], found: Mapping[str, Any]
) -> str:
    if entry is entries[0] or found["difference"] is None:
        return ""
    sd = found["difference_sd"]
    sign = "+" if found["difference"] >= 0 else ""
    return sign + number(found["difference"]) + ("" if sd is None else f" ± {number(sd)}")


def print_whole(tables: Sequence[Table]) -> None:
    """Prints tables on stdout without cutting a cell, however narrow the terminal or file is said to be."""
    console = Console(markup=False)  # a run, a client or a category may be named "x[/red]"
    for table in tables:
        wide = console.options.update(width=WIDEST)
        needed = Measurement.get(console, wide, table).maximum
        Console(width=max(console.width, needed), markup=False).print(table)
