"""The tables that reproduce/theory_tables.py makes, from documents written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reproduced import load

tables = load("theory_tables")


def pair(folder: Path, name: str, gap: float, losses: dict[str, list[float]], bound: float = 7.0) -> Any:
    """A probe that predicts `gap`, and a comparison with one loss a seed; zero-shot is 4."""
    probe = {
        "run": {"steps": 15.0, "clients": 10},
        "measured_on": {"steps": 6.0, "clients": [2, 5]},
        "quantities": {"gamma": bound / 2, "error": gap / 10},
        "losses": {"multi_round": [3.0], "one_shot": [3.0 + gap / 2]},
        "prediction": {
            "gap": gap,
            "gap_between": [gap / 2, 2 * gap],
            "gap_error": None,
            "share": gap / 2,
            "bound": bound,
            "distance": 0.25,
        },
        "recommended_rounds": 2,
        "recommended_between": [2, 3],
    }
    (folder / f"{name}.json").write_text(json.dumps(probe))
    rows = [
        {
            "config": config,
            "seed": seed,
            "zero_shot": {"loss": {"loss": 4.0}},
            "evaluation": {"loss": {"loss": loss}},
        }
        for config, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]
    (folder / name).mkdir()
    (folder / name / "compare.json").write_text(json.dumps({"rows": rows}))
    return tables.Source(name, folder / f"{name}.json", folder / name, "many", "one")


def test_pairs(tmp_path: Path) -> None:
    argument = pair(tmp_path, "a", 0.5, {"many": [2.0, 3.0], "one": [2.5, 3.25]})
    # gaps 0.5 and 0.25; shares 0.5 / 2 and 0.25 / 1
    row = (
        "| a | 2 of 10 | 6 of 15 | +0.500 | +0.250 to +1.000 | +0.375 ± 0.177 | 25% | 25% | 2 (2 to 3) | 2 |"
    )
    assert tables.pairs([argument]).splitlines()[2:] == [row]


def test_correlations(tmp_path: Path) -> None:
    chosen = [
        pair(tmp_path, f"c{number}", gap, {"many": [2.0], "one": [2.0 + gap**2]}, bound=8 - gap)
        for number, gap in enumerate((1.0, 2.0, 4.0))
    ]
    fresh = [
        pair(tmp_path, f"f{number}", gap, {"many": [2.0], "one": [2.0 - gap]})
        for number, gap in enumerate((1.0, 2.0))
    ]
    lines = tables.correlations({"chosen": chosen, "fresh": fresh}).splitlines()
    # (1, 2, 4) with (1, 4, 16): deviations -4/3, -1/3, 5/3 and -6, -3, 9 → 24 / √(14/3 · 126)
    assert f"| chosen | predicted gap | 1.00 | {24 / (14 / 3 * 126) ** 0.5:.2f} | 1.00 (3) | 3 |" in lines
    assert lines[4].startswith("| chosen | bound Γ‖w₀‖ of the run | -1.00 |")
    assert "| fresh | predicted gap | -1.00 | -1.00 | 0.00 (0) | 2 |" in lines
    assert sum("| all |" in line and line.endswith("| 5 |") for line in lines) == 7


def test_rounds(tmp_path: Path) -> None:
    for count, loss in ((1, 3.0), (2, 2.4), (4, 2.0)):
        folder = tmp_path / f"rounds-scratch-{count}"
        folder.mkdir()
        row = {"evaluation": {"loss": {"loss": loss}}, "zero_shot": {"loss": {"loss": 4.0}}}
        (folder / "compare.json").write_text(json.dumps({"rows": [row]}))
    lines = tables.rounds([tmp_path / "rounds-scratch"], (1, 2, 4)).splitlines()
    # one round loses 1 of 2, two lose 0.4 of 2; o / (1 + o) · 3/4 = 1/2 gives o = 2, so that two lose
    # 2 · 2 / (4 · 4) by the odds, and 1/2 · (1/2 − 1/4) / (3/4) in the leading order
    assert lines[2:] == [
        "| scratch | 1 | 3.0000 | 50.0% | 50.0% | 50.0% |",
        "| scratch | 2 | 2.4000 | 20.0% | 25.0% | 16.7% |",
        "| scratch | 4 | 2.0000 | 0.0% | 0.0% | 0.0% |",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.012345, "0.0123"), (1.0, "1"), (12345.6, "12346")]
)
def test_numbers(value: float | None, text: str) -> None:
    assert tables.number(value) == text
