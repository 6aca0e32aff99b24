"""`fedtune report`: one HTML page of one or several runs, with nothing to load from elsewhere.

What it shows is what the run folders hold: scores, curves against rounds and against bytes, memory, who was
left out, and the configuration. Runs that are still going, or were stopped, are shown as far as they came.
"""

from __future__ import annotations

import base64
import io
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fedtune.errors import InputError
from fedtune.evaluation.bootstrap import metrics_of
from fedtune.federation.files import disk_errors, read_json, write_text
from fedtune.federation.folder import EVALUATIONS, RunFolder
from fedtune.report.tables import interval, number, size
from fedtune.version import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger("fedtune")
WHERE = ("client", "server", "evaluation")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } caption { text-align: left; font-weight: 600; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child, .left td { text-align: left; } .wide { overflow-x: auto; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; }
"""


@dataclass(frozen=True)
class RunData:
    """What a report shows of one run: its settings as text, and its logs."""

    name: str
    config: str
    method: str
    rounds: Sequence[Mapping[str, Any]]
    payload: Mapping[int, Mapping[str, int]]  # by round and direction
    peaks: Mapping[str, int]  # by client and server
    summary: Mapping[str, Any]  # empty while the run goes on
    taken: Mapping[str, str] = field(default_factory=dict)  # what settings that are auto stood for
    changed: Sequence[str] = ()  # which of its inputs are not any more what it had
    evaluations: Sequence[Mapping[str, Any]] = ()  # lines of evaluations.jsonl
    pictures: Mapping[str, bytes] = field(default_factory=dict)  # PNG files of what it drew, by their names

    def curve(self, task: str, metric: str) -> dict[int, float]:
        """A score by round, of the rounds that were evaluated."""
        found = {entry["round"]: entry["eval"].get(task, {}).get(metric) for entry in self.rounds}
        return {round: value for round, value in found.items() if value is not None}

    def sent(self) -> dict[int, int]:
        """Payload bytes until the end of each round, down and up together."""
        total, sums = 0, {}
        for entry in self.rounds:
            total += sum(self.payload.get(entry["round"], {}).values())
            sums[entry["round"]] = total
        return sums


def read_run(path: Path, name: str) -> RunData:
    """A run's folder as a report needs it.

    Raises:
        InputError: It is not a run folder, or nothing has been recorded in it yet.
    """
    folder = RunFolder.open(path)
    rounds = list(folder.entries("rounds.jsonl"))
    if not rounds:
        raise InputError(f"{path} has no round yet; a report needs at least the scores before the first one")
    payload: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for message in folder.entries("wire.jsonl"):
        payload[message["round"]][message["direction"]] += message["payload_bytes"]
    peaks: dict[str, int] = {}
    for scope in folder.entries("memory.jsonl"):
        peaks[scope["where"]] = max(peaks.get(scope["where"], 0), scope["peak_bytes"])
    text = (path / "config.yaml").read_text(encoding="utf-8")
    from fedtune.federation.recorded import changed_inputs  # it imports what loads models

    config = folder.config()
    changed = changed_inputs(path, config)
    for sentence in changed:
        log.warning("%s", sentence)
    return RunData(
        name,
        text,
        config.method_name,
        rounds,
        payload,
        peaks,
        folder.summary() or {},
        read_json(path / "environment.json").get("taken", {}),
        tuple(changed),
        list(folder.entries(EVALUATIONS)),
        {file.stem: file.read_bytes() for file in sorted((path / "pictures").glob("*.png"))},
    )


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Several runs, under names that tell them apart: the folder's, with its parents' where two are equal.

    Raises:
        InputError: As `read_run`, or a folder is named twice.
    """
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise InputError("a run is named twice; name each folder once")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    named = zip(paths, resolved, strict=True)
    return [read_run(path, "/".join(whole.parts[-depth:])) for path, whole in named]


def report(runs: Sequence[RunData]) -> str:
    """The page.

    Raises:
        InputError: matplotlib, which draws the curves, is not installed.
    """
    if find_spec("matplotlib") is None:
        raise InputError("a report needs matplotlib; pip install 'fedtune[report]'")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    changed = [f"<p><strong>{escape(said)}</strong></p>" for run in runs for said in run.changed]
    parts = [
        f"<h1>{escape(title)}</h1>",
        *changed,
        _costs(runs),
        *_scores(runs),
        _evaluated(runs),
        "<h2>On the way</h2>",
        *_curves(runs),
    ]
    if any(run.pictures for run in runs):
        parts += ["<h2>Pictures</h2>", "<p>A row a prompt, a column a seed.</p>", *_pictures(runs)]
    updates = _updates(runs)
    if updates:
        parts += ["<h2>Clients' updates</h2>", updates]
    left_out = _left_out(runs)
    if left_out:
        parts += ["<h2>Who was left out</h2>", left_out]
    parts.append("<h2>Configurations</h2>")
    settings = dict.fromkeys(setting for run in runs for setting in run.taken)
    if settings:
        rows = [[setting, *(run.taken.get(setting, "") for run in runs)] for setting in settings]
        parts.append(_table("What auto stood for", ["setting", *(run.name for run in runs)], rows))
    parts += [
        f"<details><summary>{escape(run.name)}</summary><pre>{escape(run.config)}</pre></details>"
        for run in runs
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join([*parts, f"<p>fedtune {escape(__version__)}</p>"])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _costs(runs: Sequence[RunData]) -> str:
    header = ("run", "method", "rounds", "status", "payload down", "payload up", "a client and round")
    rows = []
    for run in runs:
        down, up = (sum(r.get(way, 0) for r in run.payload.values()) for way in ("down", "up"))
        each = run.summary.get("payload_bytes_per_client_round")
        rows.append(
            [
                run.name,
                run.method,
                str(run.rounds[-1]["round"]),
                run.summary.get("status", "not finished"),
                size(down),
                size(up),
                "" if each is None else size(each),
                *(size(run.peaks[where]) if where in run.peaks else "" for where in WHERE),
                f"{sum(entry['seconds'] for entry in run.rounds):.1f}",
            ]
        )
    return _table("What it cost", [*header, *(f"{where} memory" for where in WHERE), "seconds"], rows)


def _scores(runs: Sequence[RunData]) -> Iterator[str]:
    tasks = dict.fromkeys(task for run in runs for entry in run.rounds for task in entry["eval"])
    for task in tasks:
        rows = []
        for run in runs:
            evaluated = [entry for entry in run.rounds if entry["eval"].get(task)]
            if not evaluated:
                continue
            before, after = run.rounds[0]["eval"].get(task, {}), evaluated[-1]
            for metric in metrics_of(after["eval"][task]):
                value = number(after["eval"][task][metric]) + interval(after["eval"][task], metric)
                first = number(before[metric]) if metric in before else ""
                worst = after.get("per_client", {}).get(task, {}).get(metric)
                shown = f"{number(worst['worst'])} (client {worst['worst_client']})" if worst else ""
                rows.append([run.name, metric, first, value, str(after["round"]), shown])
        yield _table(task, ["run", "metric", "before", "after [95 %]", "round", "worst client"], rows)


def _evaluated(runs: Sequence[RunData]) -> str:
    """What `fedtune eval` was asked for since, a row a result and metric; empty where it was for nothing."""
    rows = []
    for run in runs:
        for entry in run.evaluations:
            about = [entry["time"], " ".join(entry["settings"]), str(entry["examples"])]
            for result, scores in entry["scores"].items():
                for task, found in scores.items():
                    for metric in metrics_of(found):
                        value = number(found[metric]) + interval(found, metric)
                        rows.append([run.name, result, f"{task}: {metric}", value, *about])
    header = ["run", "result", "metric", "score [95 %]", "when", "settings", "examples"]
    return _table("Evaluated since", header, rows) if rows else ""


def _curves(runs: Sequence[RunData]) -> Iterator[str]:
    mains = {
        task: metrics_of(entry["eval"][task])[0]
        for run in runs
        for entry in run.rounds
        for task in entry["eval"]
        if entry["eval"][task]
    }
    for task, metric in mains.items():
        curves = {run.name: run.curve(task, metric) for run in runs}
        if all(len(curve) < 2 for curve in curves.values()):
            continue

        def by_round(axis: Axes, curves: Mapping[str, Mapping[int, float]] = curves) -> None:
            for name, curve in curves.items():
                axis.plot(list(curve), list(curve.values()), marker="o", markersize=3, label=_drawn(name))
            axis.set_xlabel("round")

        def by_bytes(axis: Axes, curves: Mapping[str, Mapping[int, float]] = curves) -> None:
            for run in runs:
                sent, curve = run.sent(), curves[run.name]
                # in megabytes; before the first message nothing was sent, which a logarithm cannot show
                after = [round for round in curve if sent[round]]
                axis.plot([sent[r] / 1e6 for r in after], [curve[r] for r in after], marker="o", markersize=3)
            if any(run.sent()[run.rounds[-1]["round"]] for run in runs):
                axis.set_xscale("log")
            axis.set_xlabel("MB sent by then, all clients, down and up")

        yield _figure(f"{task}: {metric}", [by_round, by_bytes])
    losses = {
        run.name: {e["round"]: e["train_loss"] for e in run.rounds if e["train_loss"] is not None}
        for run in runs
    }
    if any(len(curve) > 1 for curve in losses.values()):

        def training(axis: Axes) -> None:
            for name, curve in losses.items():
                axis.plot(list(curve), list(curve.values()), marker="o", markersize=3, label=_drawn(name))
            axis.set_xlabel("round")

        yield _figure("training loss, mean over the clients of a round", [training])


def _figure(title: str, draws: Sequence[Callable[[Axes], None]]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: no state of the process is touched

    figure = Figure(figsize=(5.5 * len(draws), 3.4), layout="constrained")
    axes = figure.subplots(1, len(draws), squeeze=False)[0]
    for axis, draw in zip(axes, draws, strict=True):
        draw(axis)
        axis.grid(alpha=0.3)
    axes[0].set_title(_drawn(title), fontsize=10, loc="left")
    handles, labels = axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    svg = io.BytesIO()
    with rc_context({"svg.hashsalt": "fedtune"}):  # the same page for the same runs
        figure.savefig(svg, format="svg", metadata={"Date": None})
    text = base64.b64encode(svg.getvalue()).decode()
    return f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,{text}">'


def _pictures(runs: Sequence[RunData]) -> Iterator[str]:
    """The grids before any training and after each round that was evaluated, of all runs."""
    for run in runs:
        for name, png in run.pictures.items():
            said, text = f"{run.name}: {name.replace('-', ' ')}", base64.b64encode(png).decode()
            yield (
                f"<figure><figcaption>{escape(said)}</figcaption>"
                f'<img alt="{escape(said)}" src="data:image/png;base64,{text}"></figure>'
            )


def _drawn(name: str) -> str:
    """A name as text in a figure: without mathematics, and with a legend's entry if it begins with _."""
    plain = name.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def _updates(runs: Sequence[RunData]) -> str:
    """The lengths of the updates, a row a run, and who stood out; empty where no run has recorded any."""
    rows, named = [], []
    for run in runs:
        norms = [
            (found["norm"], client, entry["round"])
            for entry in run.rounds
            for client, found in entry.get("updates", {}).items()
        ]
        if norms:
            longest, client, round = max(norms)
            usual = median(norm for norm, *_ in norms)
            rows.append([run.name, number(usual), number(longest), client, str(round)])
        for entry in run.rounds:
            for client, why in entry.get("stands_out", {}).items():
                named.append([run.name, str(entry["round"]), client, why])
    lengths = _table("", ["run", "median norm", "longest", "of client", "in round"], rows) if rows else ""
    out = _table("Who stood out", ["run", "round", "client", "why"], named, left=True) if named else ""
    return "\n".join(filter(None, (lengths, out)))


def _left_out(runs: Sequence[RunData]) -> str:
    rows = [
        [run.name, str(entry["round"]), client, why]
        for run in runs
        for entry in run.rounds
        for client, why in entry.get("left_out", {}).items()
    ]
    return _table("", ["run", "round", "client", "why"], rows, left=True) if rows else ""


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    kind = ' class="left"' if left else ""
    return (
        f'<div class="wide"><table{kind}><caption>{escape(caption)}</caption>\n'
        f"<tr>{head}</tr>\n{body}\n</table></div>"
    )


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes the page of several runs; returns `out`.

    Raises:
        InputError: `out` is taken, its folder is not there, or as `read_runs`.
        FederationError: The disk is full or cannot be written.
    """
    if out.exists():
        raise InputError(f"{out} exists already; give another --out, or move it away")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    text = report(read_runs(runs))
    with disk_errors(str(out)):
        write_text(out, text)
    return out
