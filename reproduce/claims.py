"""What the papers claim, and what was seen of it: rules that decide, runs that they are asked on, the list.

A claim is decided on differences between two sides of the same seeds, paired by seed: seen, not seen, or not
decidable at this size. The rules below stand in a file before its runs are made, with their margins.

Table:   all claims: seen, not seen or not decidable; docs/claims.md, block claims
Command: python reproduce/claims.py claims
Time:    seconds; reads the blocks of the page
Needs:   nothing
Result:  20 claims, of them 3 seen, 7 not seen, 10 not decidable
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, cast

from common import RESULTS, ROOT, Entry, Head, Step, Work, finished, main, run, spread, table
from contents import files
from search_rates import final_loss, loss_of, search

from fedtune.config.file import load_config

PAGE = "docs/claims.md"
PAPERS = {
    **{"one_shot": "one-shot", "text_to_image": "one-shot"},
    **{"fedkseed": "FedKSeed", "fedbiot": "FedBiOT", "fedcybgd": "FedCyBGD"},
}
SEEDS = (0, 1, 2)
# Of a classifier: on the held-out part, and, for its rate, on training examples that no client has.
SCORED = ("evaluation={tasks: [loss, accuracy], every: 0, batch_size: 64, bootstrap: 0}",)
VALIDATED = ("data.holdout={fraction: 0.01}", "evaluation.max_examples=600", "evaluation.batch_size=64")
# One-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}


class Verdict(StrEnum):
    """What a rule says of a claim."""

    SEEN = "Seen"
    NOT_SEEN = "Not seen"
    OPEN = "Not decidable"


@dataclass(frozen=True)
class Outcome:
    """A verdict and the numbers that it follows from, in a sentence."""

    verdict: Verdict
    because: str

    def __str__(self) -> str:
        return f"**{self.verdict}.** {self.because}"


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The 90 % interval of the mean of paired differences, by Student's t: each end is a test at 5 %."""
    mean, count = statistics.fmean(differences), len(differences)
    half = T95[count - 1] * statistics.stdev(differences) / math.sqrt(count)
    return mean - half, mean + half


def above(differences: Sequence[float], margin: float) -> Verdict:
    """Whether the mean difference is more than `margin`; not decidable while the interval has it inside."""
    low, high = interval(differences)
    return Verdict.SEEN if low > margin else Verdict.NOT_SEEN if high < margin else Verdict.OPEN


def below(differences: Sequence[float], margin: float) -> Verdict:
    """Whether the mean difference is less than `margin`."""
    return above([-value for value in differences], -margin)


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim in several parts: not seen if a part is not, seen if all are."""
    if Verdict.NOT_SEEN in verdicts:
        return Verdict.NOT_SEEN
    return Verdict.SEEN if all(verdict == Verdict.SEEN for verdict in verdicts) else Verdict.OPEN


def less(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Differences of two sides, by seed."""
    return [a - b for a, b in zip(first, second, strict=True)]


def said(differences: Sequence[float]) -> str:
    """A mean difference with its 90 % interval."""
    low, high = interval(differences)
    return f"{statistics.fmean(differences):+.4f} ({low:+.4f} to {high:+.4f})"


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a configuration, and settings on top of those that all sides have."""

    name: str
    config: str
    settings: tuple[str, ...] = ()
    like: str | Path = ""  # the side, or the run, whose rate it takes; "" searches its own


@dataclass(frozen=True)
class Trials:
    """Runs of several sides by seed, at rates searched on examples that no run is scored on."""

    out: Path
    sides: tuple[Side, ...]
    settings: tuple[str, ...]  # of all sides and of the search
    scored: tuple[str, ...]  # of the runs alone: what they are scored on
    validated: tuple[str, ...] = ()  # of the search alone; () takes the configurations' own rates
    seeds: tuple[int, ...] = SEEDS

    def __str__(self) -> str:
        found = []
        for side in self.sides:
            searched = [f"--set={word}" for word in (*self.settings, *side.settings, *self.validated)]
            if self.validated and not side.like:
                command = ("python", "reproduce/search_rates.py", str(self.rates(side)))
                found.append(shlex.join((*command, f"configs/{side.config}.yaml", *searched)))
            found += [str(self.step(side, seed, "method.lr=BEST")) for seed in self.seeds]
        return "\n".join(found)

    def rates(self, side: Side) -> Path:
        """Folder of a side's search."""
        return self.out / "rates" / _slug(str(side.like or side.name))

    def folder(self, side: str, seed: int) -> Path:
        """Folder of a run."""
        return self.out / f"{_slug(side)}-seed{seed}"

    def step(self, side: Side, seed: int, *rate: str) -> Step:
        """A run."""
        given = rate if self.validated or side.like else ()
        own = (*self.settings, *side.settings, *self.scored, *given)
        return run(side.config, self.folder(side.name, seed), *own, f"seed={seed}")

    def tried(self, side: Side) -> dict[float, float]:
        """Validation losses of a side by rate."""
        found = {}
        for summary in sorted((ROOT / self.rates(side)).glob("*-?e[-+]??/summary.json")):
            if finished(summary):
                found[float(summary.parent.name[-5:])] = loss_of(summary.parent)
        return found

    def rate(self, side: Side) -> float:
        """The rate that its runs have, or are to have: that of the lowest validation loss."""
        runs = side.like if isinstance(side.like, Path) else self.folder(side.name, self.seeds[0])
        made = ROOT / runs / "config.yaml"
        if made.exists():
            return float(cast(Any, load_config(made).method).lr)
        found = self.tried(side)
        return min(found, key=lambda lr: found[lr])

    def done(self, side: Side) -> bool:
        """Whether all runs of a side are there."""
        folders = (self.folder(side.name, seed) for seed in self.seeds)
        return all(finished(ROOT / folder / "summary.json") for folder in folders)

    def do(self) -> None:
        """Searches and runs; takes over what is done, and keeps no weights."""
        for side in self.sides:
            if self.done(side):
                continue
            file = ROOT / f"configs/{side.config}.yaml"
            rate: tuple[str, ...] = ()
            if self.validated and not side.like:
                settings = [*self.settings, *side.settings, *self.validated]
                print(f"# rates of {side.name}", file=sys.stderr, flush=True)
                start = cast(Any, load_config(file, settings).method).lr
                search(partial(final_loss, file, ROOT / self.rates(side), settings), start)
            if self.validated or side.like:
                rate = (f"method.lr={self.rate(side)}",)
            for seed in self.seeds:
                self.step(side, seed, *rate).do()
        for name in ("final", "checkpoints"):
            for folder in (ROOT / self.out).glob(f"**/{name}"):
                shutil.rmtree(folder)

    def summary(self, side: str, seed: int) -> dict[str, Any]:
        """A run's summary."""
        found = json.loads((ROOT / self.folder(side, seed) / "summary.json").read_text(encoding="utf-8"))
        return cast(dict[str, Any], found)

    def scores(self, side: str, metric: str, which: str = "evaluation") -> list[float]:
        """A side's scores by seed; `which` is the summary's block, `zero_shot` before training."""
        return [
            next(
                float(scores[metric])
                for scores in self.summary(side, seed)[which].values()
                if metric in scores
            )
            for seed in self.seeds
        ]


@dataclass(frozen=True)
class Claim:
    """What a paper says of a table or figure, and how it is decided here."""

    says: str
    printed: str  # the paper's own numbers
    rule: str  # written before the runs
    table: Callable[[], str]
    outcome: Callable[[], Outcome]

    def __call__(self) -> str:
        """The block of the page."""
        return "\n\n".join(
            (
                f"*Claim.* {self.says}",
                f"*The paper's numbers.* {self.printed}",
                f"*Rule, written before the runs.* {self.rule}",
                self.table(),
                str(self.outcome()),
            )
        )


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name)


def compared_sides(trials: Trials, metrics: Sequence[str], against: str = "") -> str:
    """A row for each side: its rate, its scores, and its first score against another side's, by seed."""
    rows = []
    for side in trials.sides:
        cells = [f"{trials.rate(side):.0e}".replace("e-0", "e-")] if trials.validated else []
        cells += [spread(trials.scores(side.name, metric)) for metric in metrics]
        if against:
            off = less(trials.scores(side.name, metrics[0]), trials.scores(against, metrics[0]))
            cells.append("" if side.name == against else said(off))
        rows.append([side.name, *cells])
    header = ["side", *(["rate"] if trials.validated else []), *metrics]
    return table([*header, *([f"{metrics[0]} against {against}"] if against else [])], rows)


def drawn(draw: Callable[[Any], None], width: float = 5.0, height: float = 3.4) -> bytes:
    """A figure of one panel as SVG, the same bytes for the same numbers."""
    import io

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "fedtune", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def claims() -> dict[str, tuple[str, Head]]:
    """All entries that fill a block of the page: name -> file and head."""
    return {
        name: (file.stem, head)
        for file, some in files().items()
        for name, head in some.items()
        if head.places and head.places[0][0] == PAGE and file.stem != Path(__file__).stem
    }


def decided(name: str, head: Head) -> tuple[str, Outcome]:
    """What a block of the page claims, and its outcome. Raises SystemExit if it has none."""
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    block = page.partition(f"<!-- {head.places[0][1]} -->")[2].partition("<!-- end ")[0]
    says = re.search(r"(?m)^\*Claim\.\* (.*)$", block)
    ends = re.search(r"(?m)^\*\*(Seen|Not seen|Not decidable)\.\*\* (.*)$", block)
    if not says or not ends:
        raise SystemExit(f"{PAGE}: the block of {name} has no claim or no verdict; make it first")
    return says[1], Outcome(Verdict(ends[1]), ends[2])


def listed() -> str:
    """A line for every claim, from the blocks of the page."""
    rows, counts = [], dict.fromkeys(Verdict, 0)
    for name, (stem, head) in claims().items():
        says, outcome = decided(name, head)
        counts[outcome.verdict] += 1
        paper = next(name for file, name in PAPERS.items() if stem.startswith(file))
        where = f"{paper}: {head.table.partition(';')[0]}"
        cells = [where, says, f"**{outcome.verdict}**", outcome.because, head.time]
        rows.append([cell.replace("|", "\\|") for cell in cells])
    counted = ", ".join(f"{verdict.lower()} {count}" for verdict, count in counts.items())
    header = ["where", "claim", "verdict", "because", "small form takes"]
    return f"{len(rows)} claims: {counted}.\n\n{table(header, rows, numbers=False)}"


def entry(
    claim: Claim,
    steps: Sequence[Work],
    needs: Sequence[Path | str] = (),
    full: Sequence[Step] = (),
    plots: Mapping[str, Callable[[], bytes]] | None = None,
) -> Entry:
    """An entry for a claim."""
    return Entry(claim, steps, needs, full=full, plots=plots or {})


OUT = RESULTS / "claims"
ENTRIES = {"claims": Entry(listed)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
