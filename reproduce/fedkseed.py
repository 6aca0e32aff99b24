"""FedKSeed's tables and figure: kinds of noise, methods beside each other, numbers of seeds, memory and time.

Table:   which noise, bundled model; docs/results.md, block noise-bundled
Command: python reproduce/fedkseed.py noise-bundled
Time:    not measured
Needs:   nothing
Result:  hadamard4 ends at 2.1573 ± 0.0492, gaussian at 2.2989 ± 0.1166: a paired difference of
         -0.1416 ± 0.0820 over 3 seeds

Table:   which noise, stories260K on Dolly; docs/results.md, block noise-stories
Command: python reproduce/fedkseed.py noise-stories
Time:    not measured
Needs:   ../shared/models/stories260K-hf, ../shared/data/dolly15k
Result:  hadamard4 ends at 3.8812 ± 0.0713, gaussian at 3.8722 ± 0.0989: a paired difference of
         +0.0090 ± 0.0301

Table:   the curves of both tables before; docs/noise_curves.svg, whole file
Command: python reproduce/fedkseed.py noise-curves
Time:    seconds, once noise-bundled and noise-stories are done
Needs:   ../shared/models/stories260K-hf, ../shared/data/dolly15k, matplotlib (extra `report`)
Result:  a line through the means and a band from the lowest to the highest seed, a panel a model

Table:   Tables 2 and 3 in small, bundled model and data; docs/results.md, block methods-bundled
Command: python reproduce/fedkseed.py methods-bundled
Time:    8 minutes of training (the table's column, three seeds), and evaluation
Needs:   nothing
Result:  against zero-shot FedIT's loss is -1.8084 ± 0.2178, with 131.07 kB a client and round, and
         FedKSeed's -0.2461 ± 0.0904, with 14.65 kB

Table:   Tables 2 and 3 in small, Dolly; docs/results.md, block methods-dolly
Command: python reproduce/fedkseed.py methods-dolly
Time:    58 minutes of training (the table's column, three seeds), and evaluation
Needs:   ../shared/models/instruct-7m, ../shared/data/dolly15k
Result:  FedKSeed's clients take 39.61 MB and FedIT's 308.73 MB; losses against zero-shot are
         -0.0051 ± 0.0019 and -0.1246 ± 0.0127

Table:   Figure 2 in small, the number of seeds K; docs/results.md, block seeds
Command: python reproduce/fedkseed.py seeds
Time:    not measured
Needs:   nothing
Result:  no effect of K that 3 seeds show: FedKSeed ends at 2.4422 ± 0.0411 with 64 and at
         2.4120 ± 0.0729 with 8,192, in 567 and 34,023 bytes a client and round

Table:   Table 3, memory of a client's step beside inference; docs/fedkseed.md, block bench-memory
Command: python reproduce/fedkseed.py bench-memory
Time:    half an hour on a busy machine, with the rows of docs/fedcybgd.md
Needs:   nothing
Result:  a step with hadamard4 peaks at 1.0640 of inference, with rademacher at 1.0000, full fine-tuning at
         3.8597; LoRA at 1.2973, with checkpointing at 1.0361

Table:   Table 3, time of a step; docs/fedkseed.md, block bench-zo-step
Command: python reproduce/fedkseed.py bench-zo-step
Time:    48 minutes beside other programs
Needs:   nothing
Result:  a step with hadamard4 takes 1.17 times the CPU time of its two forward passes, in bfloat16 1.21, and
         1.07 and 1.36 on 266,872,832 weights; the papers' code 2.16

Table:   Figures 1(b) and 4, time and bytes to the newest model; docs/fedkseed.md, block bench-synchronize
Command: python reproduce/fedkseed.py bench-synchronize
Time:    20 seconds
Needs:   nothing
Result:  after 60 rounds K = 4096 seeds are rebuilt in 0.003634 seconds from 16,388 bytes; replaying
         every step takes 4.713e+04 seconds in the paper's loop

Table:   weights from K seeds; docs/noise.md, block bench-rebuild
Command: python reproduce/fedkseed.py bench-rebuild
Time:    not measured
Needs:   some ten gigabytes of memory for 1.3 billion weights; a smaller machine leaves those rows out
Result:  1,296,039,936 weights from 4,096 seeds of hadamard4 in 0.2401 seconds on 2 threads, where adding 1
         to each takes 0.1877
"""

from __future__ import annotations

import io
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from common import (
    BENCH_MEMORY,
    DATA,
    DOLLY,
    MODELS,
    RESULTS,
    Entry,
    Step,
    bench,
    compare,
    main,
    spread,
    table,
)

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


def paired(runs: Mapping[int, Run], first: Mapping[int, Run], of: Callable[[Run], float]) -> str:
    """The differences of runs with the same seed."""
    return spread([of(run) - of(first[seed]) for seed, run in runs.items()], "+")


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


def plot(folders: Sequence[Path]) -> bytes:
    """Loss curves as SVG: a line through a noise's mean, and a band from its lowest to its highest seed."""
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
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


NOISES = ("fedkseed_gaussian", "fedkseed_rademacher", "fedkseed_binomial32", "fedkseed_hadamard4")
BUNDLED, STORIES = RESULTS / "noise-bundled", RESULTS / "noise-stories"
ON_BUNDLED = compare(NOISES, BUNDLED, references=False)
ON_STORIES = compare(
    NOISES,
    STORIES,
    f"model.name={MODELS / 'stories260K-hf'}",
    "method.lr=2e-5",
    "method.batch_size=1",
    "evaluation.max_examples=100",
    f"data={{train: {DOLLY}, fields: {{input: context, output: response}}, template: plain, max_length: 96, "
    "max_examples: 2000, clients: 1, holdout: {fraction: 0.02}}",
    references=False,
)
REAL = (MODELS / "stories260K-hf", DATA / "dolly15k")
METHODS = ("fedptuning", "fedprompt", "fedit_sgd", "fedit", "fedkseed", "fedkseed_pro")
COUNTS = (64, 256, 1024, 4096, 8192)  # K


def beside_others(data: str) -> tuple[Path, Step]:
    """FedKSeed and its baselines on this data: the folder, and the command."""
    out = RESULTS / f"methods-{data}"
    return out, compare([f"{name}_{data}_0.5" for name in METHODS], out, references=False)


def number_of_seeds(count: int) -> tuple[Path, Step]:
    """Both methods with this K: the folder, and the command."""
    out = RESULTS / f"seeds-{count}"
    step = compare(
        ("fedkseed", "fedkseed_pro"),
        out,
        f"method.seeds={count}",
        "method.rounds=4",
        "method.local_steps=200",
        "method.batch_size=4",
        "method.lr=5e-5",
        "data.partition={name: iid}",
        "federation.clients_per_round=1",
        "evaluation.every=0",
        "evaluation.tasks=[loss]",
        references=False,
    )
    return out, step


ON_DATA = {data: beside_others(data) for data in ("bundled", "dolly")}
BY_COUNT = [number_of_seeds(count) for count in COUNTS]

ENTRIES = {
    "noise-bundled": Entry(lambda: curves(BUNDLED), [ON_BUNDLED]),
    "noise-stories": Entry(lambda: curves(STORIES), [ON_STORIES], REAL),
    "noise-curves": Entry(lambda: plot([BUNDLED, STORIES]), [ON_BUNDLED, ON_STORIES], [*REAL, "matplotlib"]),
    "methods-bundled": Entry(lambda: methods(ON_DATA["bundled"][0]), [ON_DATA["bundled"][1]]),
    "methods-dolly": Entry(
        lambda: methods(ON_DATA["dolly"][0]),
        [ON_DATA["dolly"][1]],
        [MODELS / "instruct-7m", DATA / "dolly15k"],
    ),
    "seeds": Entry(lambda: seeds([out for out, _ in BY_COUNT]), [step for _, step in BY_COUNT]),
    "bench-memory": Entry(lambda: memory(RESULTS / "memory.json"), [BENCH_MEMORY]),
    # float16 has no matrix product of its own on most CPUs, and takes ten times as long
    "bench-zo-step": bench("zo-step", "--dtype", "float32", "--dtype", "bfloat16"),
    "bench-synchronize": bench("synchronize"),
    "bench-rebuild": bench("rebuild"),
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
