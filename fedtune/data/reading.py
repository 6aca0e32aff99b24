"""What was read of the sources of a run, and what was left out of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

NONE_THERE = "holds no examples; at least one is needed."
SHOWN = 3  # bad rows that are named where people read
MOST = 1_000_000  # bad rows that are listed: more are no slips in a file


@dataclass
class Reading:
    """An account that readers write into.

    Attributes:
        skip: Whether rows that do not fit are skipped; else they are errors.
        what: The setting that names the source that is read now.
        choices: Whether some row had a list of choices.
        lines: One a source: its format, its rows, what was taken.
        kinds: Rows by format.
        skipped: Place and reason of each row that was skipped.
    """

    skip: bool = False
    what: str = ""
    choices: bool = False
    lines: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def line(self, where: str) -> None:
        """One more line: of what kinds the rows are that were read of a source since `kinds` was cleared."""
        rows = " and ".join(
            f"{n:,} row{'s' * (n > 1)} of {kind}" for kind, n in sorted(self.kinds.items()) if n
        )
        self.lines.append(f"{self.what}: {rows} {where}" if self.what else f"{rows} {where}")

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
