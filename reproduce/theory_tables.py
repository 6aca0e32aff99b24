"""The tables of docs/theory.md, from what `fedtune diagnose` and `fedtune compare` wrote."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import table

from fedtune.evaluation.correlation import pearson, spearman
from fedtune.theory.prediction import lost_with


def number(value: float | None) -> str:
    """Three significant digits, without an exponent where it can be."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def quantities(files: Sequence[Path]) -> str:
    """The theory's quantities of whole runs."""
    lines = []
    for file in files:
        document = json.loads(file.read_text(encoding="utf-8"))
        found, losses = document["quantities"], document["losses"]
        free, bound = found["sum_of_local_errors_without_rates"], found["bound_of_clients"]
        lines.append(
            [
                file.stem.removesuffix("-whole"),
                f"{found['trainable_parameters']:,}",
                f"{number(found['smoothness'])} ± {number(found['smoothness_sd'])}",
                number(found["largest_smoothness"]),
                number(found["relative_update"]),
                number(found["norm"]),
                number(document["run"]["steps"]),
                number(found["gamma"]),
                number(found["bound"]),
                number(bound),
                number(free),
                number(free / bound),
                number(found["error"]),
                number(found["distance"] / found["moved"]),
                f"{losses['one_shot'][-1] - losses['multi_round'][-1]:+.4f}",
            ]
        )
    header = [
        "run",
        "trained",
        "L",
        "largest L",
        "τ",
        "‖w₀‖",
        "T·k",
        "Γ",
        "Γ‖w₀‖",
        "× m",
        "Σ‖ε_i‖, β = 1",
        "of bound",
    ]
    return table([*header, "‖ε‖", "distance / moved", "gap"], lines)


@dataclass(frozen=True)
class Source:
    """Where a pair is measured: a probe, a folder of compare, and the two rows there."""

    name: str
    probe: Path
    folder: Path
    multi: str = "bundled_multi_round"
    one: str = "bundled_one_shot"


@dataclass(frozen=True)
class Pair:
    """A model and a data set: what the probe predicted, and what compare measured over its seeds."""

    name: str
    probe: dict[str, Any]
    gaps: list[float]
    shares: list[float]

    @staticmethod
    def read(source: Source) -> Pair:
        """A pair from its files."""
        rows = json.loads((source.folder / "compare.json").read_text(encoding="utf-8"))["rows"]
        by = {(row["config"], row["seed"]): row for row in rows}
        seeds = sorted(seed for config, seed in by if config == source.multi)
        gaps, shares = [], []
        for seed in seeds:
            many, one = (
                by[config, seed]["evaluation"]["loss"]["loss"] for config in (source.multi, source.one)
            )
            gaps.append(one - many)
            shares.append(gaps[-1] / (by[source.multi, seed]["zero_shot"]["loss"]["loss"] - many))
        return Pair(source.name, json.loads(source.probe.read_text(encoding="utf-8")), gaps, shares)

    @property
    def gap(self) -> float:
        """Measured: the mean over seeds."""
        return statistics.fmean(self.gaps)

    @property
    def share(self) -> float:
        """Measured: the mean over seeds."""
        return statistics.fmean(self.shares)


def pairs(sources: Sequence[Source]) -> str:
    """Predictions beside measurements."""
    lines = []
    for pair in map(Pair.read, sources):
        prediction, on, run = (pair.probe[key] for key in ("prediction", "measured_on", "run"))
        seeds = len(pair.gaps)
        spread = f" ± {statistics.stdev(pair.gaps):.3f}" if seeds > 1 else ""
        error = prediction["gap_error"]
        low, high = prediction["gap_between"]
        fewest, most = pair.probe["recommended_between"]
        lines.append(
            [
                pair.name,
                f"{len(on['clients'])} of {run['clients']}",
                f"{on['steps']:g} of {run['steps']:g}",
                f"{prediction['gap']:+.3f}" + ("" if error is None else f" ± {error:.3f}"),
                f"{low:+.3f} to {high:+.3f}" if low < high else "-",
                f"{pair.gap:+.3f}{spread}",
                f"{prediction['share']:.0%}",
                f"{pair.share:.0%}",
                str(pair.probe["recommended_rounds"]) + (f" ({fewest} to {most})" if fewest < most else ""),
                str(seeds),
            ]
        )
    header = ["pair", "clients", "steps", "predicted gap", "between", "measured gap", "predicted share"]
    return table([*header, "measured share", "rounds", "seeds"], lines)


def correlations(sources: Mapping[str, Sequence[Source]]) -> str:
    """Of each predictor with the measured gap (and shares with shares), over the lists and over all."""
    lists = {label: [Pair.read(source) for source in some] for label, some in sources.items()}
    lists["all"] = [pair for some in lists.values() for pair in some]
    predictors = {
        "predicted gap": lambda pair: pair.probe["prediction"]["gap"],
        "gap in the probe itself": lambda pair: (
            pair.probe["losses"]["one_shot"][-1] - pair.probe["losses"]["multi_round"][-1]
        ),
        "bound Γ‖w₀‖ of the run": lambda pair: pair.probe["prediction"]["bound"],
        "Γ of the probe": lambda pair: pair.probe["quantities"]["gamma"],
        "‖ε‖ of the probe (Eq. 7)": lambda pair: pair.probe["quantities"]["error"],
        "distance / moved in the probe": lambda pair: pair.probe["prediction"]["distance"],
    }
    lines = []
    for name, some in lists.items():
        for label, predictor in predictors.items():
            found = [(float(predictor(pair)), pair.gap) for pair in some]
            positive = [(math.log(x), math.log(y)) for x, y in found if x > 0 and y > 0]
            logs = f"{pearson(positive):.2f} ({len(positive)})"
            lines.append(
                [name, label, f"{spearman(found):.2f}", f"{pearson(found):.2f}", logs, str(len(found))]
            )
        found = [(float(pair.probe["prediction"]["share"]), pair.share) for pair in some]
        shares = [name, "predicted share, with the measured share"]
        lines.append([*shares, f"{spearman(found):.2f}", f"{pearson(found):.2f}", "", str(len(found))])
    return table(["pairs", "predictor", "Spearman", "Pearson", "Pearson of logarithms (n)", "n"], lines)


def rounds(folders: Sequence[Path], counts: Sequence[int]) -> str:
    """What R rounds lose of what the most rounds gain: measured, and by two laws from what one loses.

    Each folder stands for its R's, FOLDER-R: the same epochs in R rounds.
    """
    most, lines = counts[-1], []
    for folder in folders:
        found, before = {}, 0.0
        for count in counts:
            (row,) = json.loads(
                folder.with_name(f"{folder.name}-{count}")
                .joinpath("compare.json")
                .read_text(encoding="utf-8")
            )["rows"]
            found[count], before = row["evaluation"]["loss"]["loss"], row["zero_shot"]["loss"]["loss"]
        gain = before - found[most]
        lost = (found[counts[0]] - found[most]) / gain
        for count in counts:
            laws = lost_with(count, lost, most), lost * (1 / count - 1 / most) / (1 - 1 / most)
            name = folder.name.removeprefix("rounds-")
            share = (found[count] - found[most]) / gain
            lines.append(
                [name, str(count), f"{found[count]:.4f}", f"{share:.1%}", *(f"{law:.1%}" for law in laws)]
            )
    return table(
        ["initial weights", "rounds", "held-out loss", "share lost", "by odds", "leading order"], lines
    )
