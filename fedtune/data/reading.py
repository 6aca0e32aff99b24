"""How the sources of a run are read, and what was read of them and left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fedtune.data.conversations import Format
from fedtune.data.trees import Trees

NONE_THERE = "holds no examples; at least one is needed."
SHOWN = 3  # bad rows that are named where people read
MOST = 1_000_000  # bad rows that are listed: more are no slips in a file


@dataclass
class Reading:
    """How records are to be read, and an account that readers write into.

    Attributes:
        format: As `data.format`.
        trees: Of trees of answers: `all` ways from the root to a leaf, or the `best` one by rank.
        skip: Whether rows that do not fit are skipped; else they are errors.
        what: The setting that names the source that is read now.
        choices: Whether some row had a list of choices.
        lines: One a source: its format, its rows, what was taken.
        said: A line a source where it was decided what its records are.
        kinds: Rows by format.
        skipped: Place and reason of each row that was skipped.
        pairs: Whether records are pairs of answers, which are trained on as such.
        judged: Whether they may also be answers that were judged one at a time.
    """

    format: Format = "auto"
    trees: Trees = "best"
    skip: bool = False
    what: str = ""
    choices: bool = False
    lines: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    pairs: bool = False
    judged: bool = False

    def another(self) -> Reading:
        """An empty account of what is read in the same way."""
        return Reading(self.format, self.trees, self.skip, pairs=self.pairs, judged=self.judged)

    def add(self, other: Reading) -> None:
        """Takes over all of another account but its lines."""
        self.kinds += other.kinds
        self.said += [line for line in other.said if line not in self.said]
        self.skipped += other.skipped
        self.choices |= other.choices

    def line(self, where: str) -> None:
        """One more line: of what kinds the rows are that were read of a source since `kinds` was cleared."""
        kinds = sorted(self.kinds.items())
        rows = " and ".join(f"{n:,} row{'s' * (n > 1)} of {kind}" for kind, n in kinds if n)
        self.lines.append(f"{self.what}: {rows} {where}" if self.what else f"{rows} {where}")

    @property
    def notes(self) -> list[str]:
        """What a person should know of it, a line each."""
        return [*self.said, *skipped_notes(self.skipped)]

    def document(self) -> dict[str, Any]:
        """What partition.json and summary.json say of skipped rows."""
        first = [{"place": place, "reason": why} for place, why in self.skipped[:SHOWN]]
        return {"rows": len(self.skipped), "first": first}


def skipped_notes(skipped: list[tuple[str, str]]) -> list[str]:
    """What is said of skipped rows: how many, and the first of them; nothing of none."""
    if not skipped:
        return []
    more = f"; and {len(skipped) - SHOWN:,} more" if len(skipped) > SHOWN else ""
    shown = "; ".join(f"{place}: {why}" for place, why in skipped[:SHOWN])
    rows = "1 bad row is" if len(skipped) == 1 else f"{len(skipped):,} bad rows are"
    return [f"{rows} skipped (data.bad_rows): {shown}{more}"]
