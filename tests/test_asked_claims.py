"""Rules of single claims in reproduce/, on numbers made for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reproduced import load

claims, theory, sets = load("claims"), load("one_shot_theory"), load("one_shot_sets")
SEEN, NOT_SEEN, OPEN = claims.Verdict.SEEN, claims.Verdict.NOT_SEEN, claims.Verdict.OPEN


def rows(gammas: list[float], lost: list[float]) -> dict[str, Any]:
    return {
        f"model {at}": theory.Row(
            theory.Quantities(1.0, 0.1, 30.0, gamma, gamma, gamma), [gap] * 3, [gap] * 3
        )
        for at, (gamma, gap) in enumerate(zip(gammas, lost, strict=True))
    }


@pytest.mark.parametrize(
    ("gammas", "verdict"),
    # of the last the ranks are 2, 1, 1 and 2 apart: 1 - 6 * 10 / 60 = 0
    [([4, 3, 2, 1], SEEN), ([4, 2, 3, 1], OPEN), ([1, 2, 3, 4], NOT_SEEN), ([2, 4, 1, 3], NOT_SEEN)],
)
def test_the_gap_follows_only_if_every_rank_does(
    gammas: list[float], verdict: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(theory, "rows", lambda: rows(gammas, [0.4, 0.07, 0.02, -0.003]))
    assert theory.theory_outcome().verdict == verdict


def test_a_diagnosis_is_of_the_side_with_several_rounds_at_its_rate(tmp_path: Path) -> None:
    asked = theory.Diagnosed(theory.LEARN["MiniLM, 22.7 M weights, pre-trained"], False)
    words = asked.step("3e-4").command
    assert words[:3] == ("fedtune", "diagnose", "configs/sst2/fed_full.yaml")
    assert {"method.rounds=3", "method.local_epochs=1", "method.lr=3e-4", "seed=0"} <= set(words)
    assert words[-3:] == ("--clients", "4", "--json") and "method.lr=BEST" in str(asked)


def test_both_sets_are_written_with_their_names(shared_data: Path) -> None:
    found = list(sets.mixed("train", 3))
    assert [row["set"] for row in found] == ["SST-2"] * 3 + ["AG News"] * 3
    assert found[0]["label"] in ("negative", "positive")
    assert found[3] == {
        "text": "Intel Seen Readying New Wi-Fi Chips (Reuters)",
        "label": "Science or Technology",
        "set": "AG News",
    }
