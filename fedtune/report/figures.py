"""The figures of a report, as images in the page itself, which have no ground: it is light or dark."""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from fedtune.evaluation.bootstrap import metrics_of
from fedtune.report.folders import RunData, kinds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WHERE = ("client", "server", "evaluation")
BANDS, CLIENTS, LABELS = 4, 60, 7  # curves with a band, clients and labels of a figure of the split
SPREADS = 4  # rounds whose probabilities are drawn
UNLIKE = 30  # totals of bytes so many times apart are drawn on a logarithmic axis
FLAT = 0.02  # of a score: an axis spans at least so much of it
_GREY = "#808080"
_LOOK: dict[Any, Any] = {
    "svg.hashsalt": "fedtune",  # the same page for the same runs
    "text.color": _GREY,
    "axes.labelcolor": _GREY,
    "axes.edgecolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "savefig.transparent": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"boxplot.{part}props.color": _GREY for part in ("box", "whisker", "cap")},
}
Draw = Callable[["Axes"], None]


@dataclass(frozen=True)
class Curve:
    """A score by round: of one run with its interval, of several seeds their mean ± standard deviation."""

    name: str
    rounds: Sequence[int]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    megabytes: Sequence[float]
    seconds: Sequence[float]


def curve(name: str, runs: Sequence[RunData], task: str, metric: str) -> Curve | None:
    """What is drawn of runs that differ in their seed alone; None if fewer than two rounds have a score."""
    found = [run.curve(task, metric) for run in runs]
    rounds = [r for r in found[0] if all(r in one and math.isfinite(one[r]) for one in found)]
    if len(rounds) < 2:
        return None
    values = [statistics.fmean(one[r] for one in found) for r in rounds]
    if len(runs) > 1:
        off = [statistics.stdev(one[r] for one in found) for r in rounds]
        low = [v - o for v, o in zip(values, off, strict=True)]
        high = [v + o for v, o in zip(values, off, strict=True)]
    else:
        ends = [runs[0].curve(task, f"{metric}_{end}") for end in ("low", "high")]
        low, high = ([end.get(r, v) for r, v in zip(rounds, values, strict=True)] for end in ends)
    sent, seconds = [run.sent() for run in runs], [run.seconds() for run in runs]
    return Curve(
        name,
        rounds,
        values,
        low,
        high,
        [statistics.fmean(one[r] for one in sent) / 1e6 for r in rounds],
        [statistics.fmean(one[r] for one in seconds) for r in rounds],
    )


def scores(runs: Sequence[RunData]) -> Iterator[str]:
    """Each task's main score against rounds, bytes and seconds."""
    evaluated = [entry["eval"] for run in runs for entry in run.rounds]
    mains = {task: metrics_of(found[task])[0] for found in evaluated for task in found if found[task]}
    for task, metric in mains.items():
        curves = [c for name, some in kinds(runs).items() if (c := curve(name, some, task, metric))]
        if curves:
            draws = [against("rounds", curves), against("megabytes", curves), against("seconds", curves)]
            yield figure(f"{task}: {metric}", draws)
    losses = [
        (name, {e["round"]: e["train_loss"] for e in some[0].rounds if e["train_loss"] is not None})
        for name, some in kinds(runs).items()
    ]
    if any(len(of) > 1 for _, of in losses):
        yield figure("training loss, mean over the clients of a round", [_by_round(losses)])


def against(what: str, curves: Sequence[Curve]) -> Draw:
    """Draws curves against `rounds`, `megabytes` or `seconds`."""

    def draw(axis: Axes) -> None:
        ends = [getattr(one, what)[-1] for one in curves]
        for one in curves:
            x = getattr(one, what)
            axis.plot(x, one.values, marker="o", markersize=3, label=_drawn(one.name))
            if len(curves) <= BANDS:
                axis.fill_between(x, one.low, one.high, alpha=0.15, linewidth=0)
        if what == "rounds":
            _whole_rounds(axis)
        elif what == "megabytes":
            axis.set_xlabel("MB sent by then, all clients, down and up")
            least = min((end for end in ends if end > 0), default=0.0)
            if least and max(ends) > UNLIKE * least:  # zero, where nothing was sent, stays on the axis
                axis.set_xscale("symlog", linthresh=least / 10)
        else:
            axis.set_xlabel("seconds by then")
        _not_magnified(axis)

    return draw


def _by_round(named: Sequence[tuple[str, Mapping[int, float]]]) -> Draw:
    def draw(axis: Axes) -> None:
        for name, values in named:
            if len(values) > 1:
                axis.plot(list(values), list(values.values()), marker="o", markersize=3, label=_drawn(name))
        _whole_rounds(axis)
        _not_magnified(axis)

    return draw


def arrivals(runs: Sequence[RunData]) -> Iterator[str]:
    """Each task's main score after each client of an asynchronous round (the one-shot paper's Figure 5)."""
    rounds = [(run, entry["arrivals"]) for run in runs for entry in run.rounds if entry.get("arrivals")]
    tasks = dict.fromkeys(task for _, found in rounds for one in found for task in one["eval"])
    for task in tasks:

        def draw(axis: Axes, task: str = task) -> None:
            for run, found in rounds:
                some = [one for one in found if one["eval"].get(task)]
                points = [len(one["clients"]) for one in some]
                metric = metrics_of(some[0]["eval"][task])[0] if some else ""
                values = [one["eval"][task][metric] for one in some]
                axis.plot(points, values, marker="o", markersize=3, label=_drawn(run.name))
            _whole(axis, "clients that have arrived")
            _not_magnified(axis)

        yield figure(f"{task}, after each arrival", [draw])


def privacy(runs: Sequence[RunData]) -> str:
    """What is spent of ε by round; empty where no run adds noise."""
    spent = [
        (
            run.name,
            {e["round"]: e["privacy"]["epsilon"] for e in run.rounds if "epsilon" in e.get("privacy", {})},
        )
        for run in runs
    ]
    return figure("ε spent by then", [_by_round(spent)]) if any(len(of) > 1 for _, of in spent) else ""


def memory(runs: Sequence[RunData]) -> str:
    """The peaks of each role as bars, a group a run."""
    if not any(run.peaks for run in runs):
        return ""

    def draw(axis: Axes) -> None:
        height = 0.8 / len(WHERE)
        for place, where in enumerate(WHERE):
            at = [row + (place - 1) * height for row in range(len(runs))]
            peaks = [run.peaks.get(where, 0) / 1e6 for run in runs]
            axis.barh(at, peaks, height, label=where)
        axis.set_yticks(range(len(runs)), [_drawn(run.name) for run in runs])
        axis.invert_yaxis()
        axis.set_xlabel("MB at the peak")

    return figure("peak memory", [draw], height=1.2 + 0.5 * len(runs))


def clients(runs: Sequence[RunData]) -> Iterator[str]:
    """The clients' own scores as a box a run, of tasks that have them."""
    tasks = {
        (task, metric): None
        for run in runs
        for entry in run.rounds
        for task, found in entry.get("per_client", {}).items()
        for metric in list(found)[:1]
    }
    for task, metric in tasks:
        boxes = [(run.name, list(run.clients(task, metric).values())) for run in runs]
        boxes = [(name, values) for name, values in boxes if len(values) > 1]
        if not boxes:
            continue

        def draw(axis: Axes, boxes: Sequence[tuple[str, list[float]]] = tuple(boxes)) -> None:
            axis.boxplot(
                [values for _, values in boxes], orientation="horizontal", medianprops={"color": "C0"}
            )
            for row, (_, values) in enumerate(boxes, 1):
                axis.plot(values, [row] * len(values), "o", markersize=3, alpha=0.5, color="C1")
            axis.set_yticklabels([_drawn(name) for name, _ in boxes])
            axis.invert_yaxis()

        yield figure(f"{task}: {metric}, a dot a client", [draw], height=1.2 + 0.5 * len(boxes))


def updates(runs: Sequence[RunData]) -> str:
    """The lengths of the clients' updates by round; empty where no run has recorded any."""
    some = [run for run in runs if _norms(run)]

    def draw(axis: Axes) -> None:
        for run in some:
            axis.plot(*zip(*_norms(run), strict=True), "o", markersize=3, alpha=0.6, label=_drawn(run.name))
        usual = [statistics.median(norm for _, norm in _norms(run)) for run in some]
        if min(usual) and max(usual) > UNLIKE * min(usual):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        _whole_rounds(axis)

    return figure("norm of an update, a dot a client", [draw]) if some else ""


def probabilities(runs: Sequence[RunData]) -> Iterator[str]:
    """How FedKSeed-Pro's probabilities are spread over its seeds, by round (the paper's Figure 3)."""
    for run in runs:
        told = {entry["round"]: entry["seeds"]["probability"] for entry in run.rounds if entry.get("seeds")}
        if not told:
            continue
        rounds = list(told)
        shown = [rounds[round(at * (len(rounds) - 1) / (SPREADS - 1))] for at in range(SPREADS)]

        spreads = {number: told[number] for number in shown}

        def draw(axis: Axes, spreads: Mapping[int, Mapping[str, float]] = spreads) -> None:
            for number, spread in spreads.items():
                percent = [int(name) for name in spread]
                axis.plot(percent, list(spread.values()), label=f"round {number}")
            axis.axhline(1, color=_GREY, linewidth=1, linestyle=":")
            axis.set_xlabel("percent of the seeds, the likeliest first")
            axis.set_ylabel("times the uniform probability")
            axis.set_ylim(bottom=0)

        yield figure(f"probabilities of the seeds, {run.name}", [draw])


def _norms(run: RunData) -> list[tuple[int, float]]:
    """Round and norm of each update."""
    return [
        (entry["round"], found["norm"])
        for entry in run.rounds
        for found in entry.get("updates", {}).values()
        if found["norm"] is not None
    ]


def split(runs: Sequence[RunData]) -> Iterator[str]:
    """Each client's examples by label, as bars; runs with the same split share a figure."""
    seen: list[Sequence[Mapping[str, Any]]] = []
    for run in runs:
        if len(run.split) < 2 or len(run.split) > CLIENTS or run.split in seen:
            continue
        seen.append(run.split)
        counts: dict[str, int] = {}
        for client in run.split:
            for label, count in client.get("labels", {}).items():
                counts[label] = counts.get(label, 0) + count
        largest = sorted(counts, key=lambda label: -counts[label])[:LABELS]

        def draw(axis: Axes, run: RunData = run, largest: Sequence[str] = tuple(largest)) -> None:
            names, below = [client["client"] for client in run.split], [0] * len(run.split)
            for label in largest:
                bars = [client.get("labels", {}).get(label, 0) for client in run.split]
                axis.bar(names, bars, bottom=below, label=_drawn(str(label)))
                below = [a + b for a, b in zip(below, bars, strict=True)]
            rest = [max(0, c["examples"] - b) for c, b in zip(run.split, below, strict=True)]
            if any(rest):
                label = "others" if largest else "examples"
                axis.bar(names, rest, bottom=below, label=label, color=_GREY)
            _whole(axis, "client")
            axis.set_ylabel("examples")

        yield figure(f"split of {run.name}", [draw])


def figure(title: str, draws: Sequence[Draw], *, height: float = 3.4) -> str:
    """Panels beside each other as one image, with a legend below where there is more than one thing.

    Args:
        title: Also what a screen reader says.
        draws: Each draws a panel.
        height: In inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: no state of the process is touched

    svg = io.BytesIO()
    with rc_context(_LOOK):
        panels = Figure(figsize=(4.4 * len(draws) if len(draws) > 1 else 5.5, height), layout="constrained")
        axes = panels.subplots(1, len(draws), squeeze=False)[0]
        for axis, draw in zip(axes, draws, strict=True):
            draw(axis)
            axis.grid(alpha=0.3)
            axis.set_axisbelow(True)
        axes[0].set_title(_drawn(title), fontsize=10, loc="left")
        _, labels = axes[0].get_legend_handles_labels()
        if len(labels) > 1:
            handles, labels = axes[0].get_legend_handles_labels()
            panels.legend(
                handles, labels, loc="outside lower left", ncols=2 * len(draws), frameon=False, fontsize=8
            )
        panels.savefig(svg, format="svg", metadata={"Date": None})
    text = base64.b64encode(svg.getvalue()).decode()
    return f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,{text}">'


def _whole_rounds(axis: Axes) -> None:
    _whole(axis, "round")


def _whole(axis: Axes, label: str) -> None:
    """An axis of whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlabel(label)


def _not_magnified(axis: Axes) -> None:
    """Spans at least a fiftieth of the values, so that rounding does not look like a result."""
    low, high = axis.get_ylim()
    least = FLAT * max(abs(low), abs(high))
    if high - low < least:
        middle = (low + high) / 2
        axis.set_ylim(middle - least / 2, middle + least / 2)


def _drawn(name: str) -> str:
    """A name as text in a figure: without mathematics, and with a legend's entry if it begins with _."""
    plain = name.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain
