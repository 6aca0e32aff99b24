"""Tables and the figure of FedKSeed's part of docs/results.md, from run folders that `fedtune compare` made.

    python scripts/fedkseed_results.py curves FOLDER           loss against steps, by kind of noise
    python scripts/fedkseed_results.py methods FOLDER          scores, bytes and memory by configuration
    python scripts/fedkseed_results.py seeds FOLDER...         final loss and bytes, by number of seeds K
    python scripts/fedkseed_results.py memory FILE.json        peak memory beside inference, from bench memory
    python scripts/fedkseed_results.py plot FILE.svg FOLDER... the curves as a figure, one panel a folder

scripts/results.sh makes the folders and puts what this prints into the page.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedtune.report.tables import size

LAST = 4  # evaluations in the mean at the end of a curve: one alone moves by more than the kinds differ


@dataclass(frozen=True)
class Run:
    """One finished run: its settings, its summary, and the held-out loss after each number of local steps."""

    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    curve: Mapping[int, float]

    @property
    def final(self) -> float:
        """The loss after the last round."""
        return float(self.summary["evaluation"]["loss"]["loss"])

    @property
    def bytes(self) -> float:
        """Payload of a client and round, both ways."""
        return float(self.summary["payload_bytes_per_client_round"])

    @property
    def tail(self) -> float:
        """The mean loss of the last evaluations."""
        return statistics.fmean(list(self.curve.values())[-LAST:])


def runs(folder: Path) -> list[Run]:
    """The runs of a comparison."""
    found = []
    for row in json.loads((folder / "compare.json").read_text(encoding="utf-8"))["rows"]:
        path = folder / f"{row['config']}-seed{row['seed']}"
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        lines = [
            json.loads(line) for line in (path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        steps = config["method"].get("local_steps") or 0  # a method that trains epochs has no curve here
        curve = {line["round"] * steps: line["eval"]["loss"]["loss"] for line in lines if line.get("eval")}
        found.append(Run(config, row, curve))
    return found


def by(key: str, found: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Runs by a setting of the method, then by seed; in the order of the comparison."""
    groups: dict[str, dict[int, Run]] = defaultdict(dict)
    for run in found:
        groups[str(run.config["method"][key])][run.config["seed"]] = run
    return dict(groups)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.fmean(values):{sign}.4f} ± {statistics.stdev(values):.4f}"


def paired(runs: Mapping[int, Run], first: Mapping[int, Run], of: Callable[[Run], float]) -> str:
    """The differences of runs with the same seed."""
    return spread([of(run) - of(first[seed]) for seed, run in runs.items()], "+")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def curves(folder: Path) -> str:
    """Final losses with their paired differences from the first kind of noise, and the curves' means."""
    groups = by("noise", runs(folder))
    name, first = next(iter(groups.items()))
    ends = [
        [kind, spread([run.final for run in group.values()])]
        + ([""] if group is first else [paired(group, first, lambda run: run.final)])
        + [spread([run.tail for run in group.values()])]
        + ([""] if group is first else [paired(group, first, lambda run: run.tail)])
        for kind, group in groups.items()
    ]
    steps = list(next(iter(first.values())).curve)
    points = [
        [
            f"{step:,}",
            *(f"{statistics.fmean(r.curve[step] for r in group.values()):.4f}" for group in groups.values()),
        ]
        for step in steps
    ]
    difference = f"paired difference to {name}"
    header = ["noise", "final loss", difference, f"mean of the last {LAST}", difference]
    return (
        f"Held-out loss, mean ± standard deviation over {len(first)} seeds:\n\n{table(header, ends)}\n\n"
        f"Its means on the way:\n\n{table(['steps', *groups], points)}"
    )


def methods(folder: Path) -> str:
    """Loss and Rouge-L with their paired differences from the untrained model, bytes, memory and time."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs(folder):
        groups[run.summary["config"]].append(run.summary)
    metrics = (("loss", "loss"), ("rouge-l", "rouge_l"))
    some = next(iter(groups.values()))
    before = [spread([run["zero_shot"][task][metric] for run in some]) for task, metric in metrics]
    rows = [["zero-shot", before[0], "", before[1], "", "0 B", "", ""]]
    for name, group in groups.items():
        row = [name]
        for task, metric in metrics:
            after = [run["evaluation"][task][metric] for run in group]
            gained = [run["evaluation"][task][metric] - run["zero_shot"][task][metric] for run in group]
            row += [spread(after), spread(gained, "+")]
        row.append(size(statistics.fmean(run["payload_bytes_per_client_round"] for run in group)))
        row.append(size(max(run["peak_memory_bytes"]["client"] for run in group)))
        rows.append([*row, f"{statistics.fmean(run['seconds']['training'] for run in group):.0f}"])
    difference, costs = "against zero-shot", ["bytes a client and round", "client memory", "training seconds"]
    header = ["configuration", "loss", difference, "Rouge-L", difference, *costs]
    return f"Held-out examples, mean ± standard deviation over {len(some)} seeds:\n\n{table(header, rows)}"


def memory(file: Path) -> str:
    """Peaks of one model and batch beside inference; the bench's larger models stand elsewhere."""
    document = json.loads(file.read_text(encoding="utf-8"))
    first, ratios, rows = document["rows"][0]["case"], document["ratios"], []
    for row in document["rows"]:
        line = [row["case"]]
        for key in ("peak_bytes", "rss_bytes"):
            ratio = 1.0 if row["case"] == first else ratios.get(f"{key}: {row['case']} / {first}")
            line += [size(row[key]), f"{ratio:.4f}"] if ratio else ["", ""]
        if any(line[1:]):
            rows.append(line)
    return table(["case", "peak", f"of {first}", "process", f"of {first}"], rows)


def seeds(folders: Sequence[Path]) -> str:
    """Final loss and bytes by K, FedKSeed beside FedKSeed-Pro."""
    rows, count, before = [], 0, 0.0
    for folder in folders:
        methods = by("name", runs(folder))
        plain, pro = methods["fedkseed"], methods["fedkseed-pro"]
        some, count = next(iter(plain.values())), len(plain)
        before = some.curve[0]
        rows.append(
            [f"{some.config['method']['seeds']:,}"]
            + [spread([run.final for run in group.values()]) for group in (plain, pro)]
            + [paired(pro, plain, lambda run: run.final)]
            + [f"{statistics.fmean(run.bytes for run in group.values()):,.0f}" for group in (plain, pro)]
        )
    header = [
        "K",
        "FedKSeed",
        "FedKSeed-Pro",
        "Pro − FedKSeed",
        "bytes a client and round",
        "the same for Pro",
    ]
    caption = f"Held-out loss after the last round, over {count} seeds; untrained {before:.4f}:"
    return f"{caption}\n\n{table(header, rows)}"


def plot(out: Path, folders: Sequence[Path]) -> None:
    """Loss curves: a line a kind of noise through the seeds' mean, and a band from lowest to highest seed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fedtune"  # the same file for the same runs
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(folders), figsize=(4.5 * len(folders), 3.2), squeeze=False)
    for axis, folder in zip(axes[0], folders, strict=True):
        found = runs(folder)
        for kind, group in by("noise", found).items():
            steps = list(next(iter(group.values())).curve)
            columns = [[run.curve[step] for run in group.values()] for step in steps]
            (line,) = axis.plot(steps, [statistics.fmean(c) for c in columns], label=kind, linewidth=1.2)
            axis.fill_between(
                steps,
                [min(c) for c in columns],
                [max(c) for c in columns],
                color=line.get_color(),
                alpha=0.15,
                lw=0,
            )
        axis.set_title(Path(found[0].config["model"]["name"]).name, fontsize=10)
        axis.set_xlabel("local steps")
        axis.set_ylabel("held-out loss")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    what, *paths = sys.argv[1], *map(Path, sys.argv[2:])
    if what == "curves":
        print(curves(paths[0]))
    elif what == "methods":
        print(methods(paths[0]))
    elif what == "seeds":
        print(seeds(paths))
    elif what == "memory":
        print(memory(paths[0]))
    elif what == "plot":
        plot(paths[0], paths[1:])
    else:
        raise SystemExit(__doc__)
