"""`fedtune report`: one HTML page of one or several runs, with nothing to load from elsewhere.

What it shows is what the run folders hold: scores, curves against rounds, bytes and seconds, clients, memory,
who was left out, and the configuration. Runs that are still going, or were stopped, are shown as far as they
came.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from fedtune.errors import InputError
from fedtune.evaluation.bootstrap import metrics_of
from fedtune.federation.files import disk_errors, write_text
from fedtune.report import figures
from fedtune.report.figures import WHERE
from fedtune.report.folders import RunData, differences, read_runs
from fedtune.report.tables import interval, number, size
from fedtune.version import __version__

_WINDOW = '<meta name="viewport" content="width=device-width, initial-scale=1">'
MOST_CLIENTS = 100  # rows of a table of clients
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --block: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } caption { text-align: left; font-weight: 600; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; vertical-align: top; }
th, td { text-align: right; }
th:first-child, td:first-child, .left td, .left th { text-align: left; } .wide { overflow-x: auto; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
.beside { display: flex; flex-wrap: wrap; gap: 0 1.5rem; }
pre { background: var(--block); padding: .8rem; overflow-x: auto; }
"""


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
        *figures.scores(runs),
        *figures.arrivals(runs),
        *figures.probabilities(runs),
        figures.privacy(runs),
        figures.memory(runs),
    ]
    if any(run.pictures for run in runs):
        parts += ["<h2>Pictures</h2>", "<p>A row a prompt, a column a seed.</p>", *_pictures(runs)]
    clients = [*figures.split(runs), *figures.clients(runs), *_clients(runs)]
    if clients:
        parts += ["<h2>Clients</h2>", *clients]
    updates = _updates(runs)
    if updates:
        parts += ["<h2>Clients' updates</h2>", figures.updates(runs), updates]
    left_out = _left_out(runs)
    if left_out:
        parts += ["<h2>Who was left out</h2>", left_out]
    parts.append("<h2>Configurations</h2>")
    settings = dict.fromkeys(setting for run in runs for setting in run.taken)
    if settings:
        rows = [[setting, *(run.taken.get(setting, "") for run in runs)] for setting in settings]
        parts.append(_table("What auto stood for", ["setting", *(run.name for run in runs)], rows))
    unlike = differences(runs) if len(runs) > 1 else {}
    if unlike:
        rows = [[setting, *said] for setting, said in unlike.items()]
        parts.append(_table("Where they differ", ["setting", *(run.name for run in runs)], rows, left=True))
    parts += [
        f"<details><summary>{escape(run.name)}</summary><pre>{escape(run.config)}</pre></details>"
        for run in runs
    ]
    head = f'<meta charset="utf-8">{_WINDOW}<title>{escape(title)}</title><style>{_STYLE}</style>'
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
                if metric == "tokens":  # what the loss rests on, and no score
                    continue
                value = number(after["eval"][task][metric]) + interval(after["eval"][task], metric)
                first = number(before[metric]) if metric in before else ""
                worst = after.get("per_client", {}).get(task, {}).get(metric)
                shown = f"{number(worst['worst'])} (client {worst['worst_client']})" if worst else ""
                rows.append([run.name, metric, first, value, _scored_in(after), shown])
        yield _table(task, ["run", "metric", "before", "after [95 %]", "round", "worst client"], rows)


def _scored_in(entry: Mapping[str, Any]) -> str:
    """The round of a score, and by how many clients it was made where they made it."""
    if not (scored := entry.get("scored")):
        return str(entry["round"])
    there, left_out = len(scored["clients"]), len(scored["left_out"])
    of = f" of {there + left_out}" if left_out else ""
    return f"{entry['round']}, scored by {there}{of} clients"


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


def _clients(runs: Sequence[RunData]) -> Iterator[str]:
    """A table a run that scores its clients: their examples and each task's main score."""
    for run in runs:
        scored = {
            f"{task}: {metric}": run.clients(task, metric)
            for task, found in (run.rounds[-1].get("per_client") or {}).items()
            for metric in list(found)[:1]
        }
        if not scored:
            continue
        examples = {client["client"]: client["examples"] for client in run.split}
        order = sorted({client for found in scored.values() for client in found})
        rows = [
            [
                f"client {client}",
                str(examples.get(client, "")),
                *(number(found[client]) if client in found else "" for found in scored.values()),
            ]
            for client in order[:MOST_CLIENTS]
        ]
        rest = f", the first {MOST_CLIENTS} of {len(order)}" if len(order) > MOST_CLIENTS else ""
        yield _table(f"{run.name}: each client{rest}", ["client", "examples", *scored], rows)


def _pictures(runs: Sequence[RunData]) -> Iterator[str]:
    """Grids of pictures: those before any training beside each run's last, and below them all others."""
    drawn = [run for run in runs if run.pictures]
    first = [(drawn[0], next(iter(drawn[0].pictures)))] if drawn else []
    last = [(run, [*run.pictures][-1]) for run in drawn if len(run.pictures) > 1]
    rest = [(run, name) for run in drawn for name in run.pictures if (run, name) not in (*first, *last)]
    for some in (first + last, rest):
        if some:
            yield f'<div class="beside">{"".join(_grid(*one) for one in some)}</div>'


def _grid(run: RunData, name: str) -> str:
    said, text = f"{run.name}: {name.replace('-', ' ')}", base64.b64encode(run.pictures[name]).decode()
    image = f'<img alt="{escape(said)}" src="data:image/png;base64,{text}">'
    return f"<figure><figcaption>{escape(said)}</figcaption>{image}</figure>"


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
    """Without columns that are empty in all rows."""
    shown = [place for place in range(len(header)) if place == 0 or any(row[place] for row in rows)]
    header, rows = [header[place] for place in shown], [[row[place] for place in shown] for row in rows]
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
