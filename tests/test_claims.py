"""reproduce/claims.py: rules by hand, what a claim shows, and the list of all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reproduced import load

claims, common = load("claims"), load("common")
Verdict = claims.Verdict


def test_the_interval_is_students() -> None:
    # mean 2, deviation 1, three seeds: half a width of 2.920 / sqrt(3) = 1.6859
    low, high = claims.interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(2 - 1.68586, abs=1e-5) and high == pytest.approx(2 + 1.68586, abs=1e-5)
    assert claims.said([1.0, 2.0, 3.0]) == "+2.0000 (+0.3141 to +3.6859)"


def test_quantiles_are_those_of_the_distribution() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert {n: round(float(stats.t.ppf(0.95, n)), 3) for n in claims.T95} == claims.T95


@pytest.mark.parametrize(
    ("margin", "verdict"),
    [(0.3, Verdict.SEEN), (0.32, Verdict.OPEN), (3.6, Verdict.OPEN), (3.7, Verdict.NOT_SEEN)],
)
def test_above_and_below_are_decided_by_both_ends(margin: float, verdict: Any) -> None:
    assert claims.above([1.0, 2.0, 3.0], margin) == verdict
    mirrored = {Verdict.SEEN: Verdict.SEEN, Verdict.NOT_SEEN: Verdict.NOT_SEEN}.get(verdict, Verdict.OPEN)
    assert claims.below([-1.0, -2.0, -3.0], -margin) == mirrored


def test_a_claim_of_parts_needs_all() -> None:
    seen, no, maybe = Verdict.SEEN, Verdict.NOT_SEEN, Verdict.OPEN
    assert claims.all_of([seen, seen]) == seen and claims.all_of([seen, maybe]) == maybe
    assert claims.all_of([maybe, no, seen]) == no


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    return tmp_path


def write(folder: Path, accuracy: float, loss: float | None = 0.5, status: str = "done") -> None:
    folder.mkdir(parents=True)
    scores = {"loss": {"loss": loss}, "accuracy": {"accuracy": accuracy}}
    (folder / "summary.json").write_text(json.dumps({"status": status, "evaluation": scores}))


def trials(validated: tuple[str, ...] = ("evaluation.max_examples=60",)) -> Any:
    sides = (claims.Side("a", "fed_full"), claims.Side("b", "fedlora", ("method.rounds=1",), "a"))
    return claims.Trials(Path("out"), sides, ("data.clients=2",), ("evaluation.every=0",), validated)


def test_the_rate_is_that_of_the_lowest_validation_loss(project: Path) -> None:
    for lr, loss in (("1e-04", 0.6), ("3e-04", 0.5), ("1e-03", None), ("3e+00", 0.7)):
        write(project / f"out/rates/a/fed_full-{lr}", 0.5, loss)
    found = trials()
    assert found.tried(found.sides[0]) == {1e-4: 0.6, 3e-4: 0.5, 1e-3: float("inf"), 3.0: 0.7}
    assert found.rate(found.sides[0]) == found.rate(found.sides[1]) == 3e-4  # b takes a's


def test_a_run_that_was_stopped_is_not_done(project: Path) -> None:
    found = trials(())
    for seed, status in enumerate(("done", "done", "interrupted")):
        write(project / f"out/a-seed{seed}", 0.5, status=status)
        write(project / f"out/b-seed{seed}", 0.5)
    assert [found.done(side) for side in found.sides] == [False, True]
    write(project / "out/rates/a/fed_full-1e-04", 0.5, 0.4, "stopped")  # the lowest, after fewer rounds
    write(project / "out/rates/a/fed_full-3e-04", 0.5, 0.6)
    assert found.tried(found.sides[0]) == {3e-4: 0.6}


def test_scores_are_paired_by_seed(project: Path) -> None:
    for seed, (a, b) in enumerate([(0.7, 0.5), (0.8, 0.7), (0.9, 0.6)]):
        write(project / f"out/a-seed{seed}", a)
        write(project / f"out/b-seed{seed}", b)
    found = trials(())
    off = claims.less(found.scores("a", "accuracy"), found.scores("b", "accuracy"))
    assert off == pytest.approx([0.2, 0.1, 0.3])
    rows = claims.compared_sides(found, ["accuracy"], "b").splitlines()
    assert rows[0] == "| side | accuracy | accuracy against b |"
    assert rows[2].startswith("| a | 0.8000 ± 0.1000 | +0.2000 (+0.0314 to +0.3686)")
    assert rows[3] == "| b | 0.6000 ± 0.1000 |  |"


def test_the_commands_are_shown_with_the_rate_that_will_be_found() -> None:
    lines = str(trials()).splitlines()
    assert lines[0] == (
        "python reproduce/search_rates.py out/rates/a configs/fed_full.yaml --set=data.clients=2 "
        "--set=evaluation.max_examples=60"
    )
    assert lines[1] == (
        "fedtune run configs/fed_full.yaml data.clients=2 evaluation.every=0 method.lr=BEST seed=0 "
        "--resume out/a-seed0"
    )
    assert len(lines) == 1 + 3 + 3  # b is not searched: it takes a's rate
    assert str(trials(())).count("BEST") == 3  # of b alone: a has its configuration's rate


def claim(verdict: Any) -> Any:
    outcome = claims.Outcome(verdict, "It was 0.7 against 0.6.")
    return claims.Claim("A beats B.", "0.9 and 0.8.", "Above 0.", lambda: "| a | b |", lambda: outcome)


def test_a_block_says_claim_rule_table_and_verdict() -> None:
    assert claim(Verdict.OPEN)() == (
        "*Claim.* A beats B.\n\n*The paper's numbers.* 0.9 and 0.8.\n\n"
        "*Rule, written before the runs.* Above 0.\n\n| a | b |\n\n**Not decidable.** It was 0.7 against 0.6."
    )


def test_the_list_is_read_from_the_blocks(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = common.Head(
        "Figure 9; docs/claims.md, block nine", "python reproduce/x.py nine", "1 s", "nothing", "7"
    )
    monkeypatch.setattr(claims, "claims", lambda: {"nine": ("one_shot_claims", head)})
    (project / "docs").mkdir()
    page = project / "docs/claims.md"
    page.write_text(f"<!-- nine -->\n{claim(Verdict.NOT_SEEN)()}\n<!-- end nine -->\n")
    found = claims.listed().splitlines()
    assert found[0] == "1 claims: seen 0, not seen 1, not decidable 0."
    assert found[-1] == ("| one-shot: Figure 9 | A beats B. | **Not seen** | It was 0.7 against 0.6. | 1 s |")
    page.write_text("<!-- nine -->\n<!-- end nine -->\n")
    with pytest.raises(SystemExit, match="the block of nine has no claim or no verdict"):
        claims.listed()


def test_every_claim_of_the_page_has_all_its_parts() -> None:
    page = (common.ROOT / claims.PAGE).read_text(encoding="utf-8")
    assert len(claims.claims()) > 5
    for name, (_, head) in claims.claims().items():
        block = page.partition(f"<!-- {head.places[0][1]} -->")[2].partition("<!-- end ")[0]
        for part in ("*Claim.* ", "*The paper's numbers.* ", "*Rule, written before the runs.* "):
            assert part in block, name
    assert claims.listed() in page, "run reproduce/claims.py claims"
