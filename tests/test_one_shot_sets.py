"""reproduce/one_shot_sets.py: what is written for it, and its rule on numbers made for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from reproduced import load

claims, sets = load("claims"), load("one_shot_sets")


def test_both_sets_are_written_with_their_names(shared_data: Path) -> None:
    found = list(sets.mixed("train", 3))
    assert [row["set"] for row in found] == ["SST-2"] * 3 + ["AG News"] * 3
    assert found[0]["label"] in ("negative", "positive")
    assert found[3] == {
        "text": "Intel Seen Readying New Wi-Fi Chips (Reuters)",
        "label": "Science or Technology",
        "set": "AG News",
    }


@pytest.mark.parametrize(
    ("lost", "verdict"),
    [([0.0, -0.01, 0.01], "Seen"), ([-0.2, -0.21, -0.22], "Not seen"), ([-0.02, 0.1, -0.1], "Not decidable")],
)
def test_the_margin_decides(lost: list[float], verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "lost", lambda: lost)
    assert sets.both_outcome().verdict == claims.Verdict(verdict)
