"""What was read of the sources of a run, and what was left out of it."""

from __future__ import annotations

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
        lines: One a source: its format, its rows, what was taken.
        skipped: Place and reason of each row that was skipped.
    """

    skip: bool = False
    lines: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def notes(self) -> list[str]:
        """What a person is told of it, a line each."""
        return [*self.lines, *skipped_notes(self.skipped)]

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
