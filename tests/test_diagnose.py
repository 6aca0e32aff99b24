"""`fedtune diagnose`: the prediction by hand, the document, and every way it has to refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from command import Result, fedtune, write_config
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import InputError
from fedtune.theory.prediction import caveats, enough_rounds, growth, lost_with, odds_times, predict
from fedtune.theory.quantities import Measured, RoundEnd


def probe(start: list[float], multi: list[list[float]], one: list[list[float]]) -> Measured:
    ends = tuple(
        RoundEnd(number, 0.5, 1.0, tuple(m), tuple(o))
        for number, (m, o) in enumerate(zip(multi, one, strict=True), 1)
    )
    zero: dict[str, Any] = dict.fromkeys(
        (
            "norm",
            "moved",
            "largest_move",
            "error",
            "error_without_rates",
            "gradient_differences",
            "distances",
        ),
        0.0,
    )
    return Measured(
        clients=len(start),
        rounds=len(multi),
        steps=12.0,
        trainable=1,
        smoothnesses=(1.0,),
        largest_smoothness=1.0,
        local_errors=(),
        local_errors_without_rates=(),
        start=tuple(start),
        ends=ends,
        **zero,
    )


def test_prediction_by_hand() -> None:
    # two groups, weights 1 and 3. F: 4 → 2; one-shot 2.5
    measured = probe(
        [4.0, 4.0],
        [[3.0, 3.0], [2.6, 2.6], [2.3, 2.3], [2.0, 2.0]],
        [[3.0, 3.0], [2.7, 2.7], [2.6, 2.6], [2.2, 2.6]],
    )
    found = predict(measured, [1.0, 3.0], ratio=4.0, rounds=4, tolerance=0.1)
    # one-shot lost (0.2 + 3 · 0.6) / 4 = 0.5 of the 2; in four times the steps 1 to 4 times that
    assert (found.least, found.gap, found.most) == pytest.approx((0.5, 1.0, 2.0))
    # odds 1 : 3, and in the middle twice those
    assert found.share == pytest.approx(2 / 5)
    # deviations 0.3 and 0.1 from the mean, weighted 1/4 and 3/4; times √(n/(n-1)); twice as the gap
    assert found.gap_error == pytest.approx(2 * math.sqrt(2 * (0.075**2 + 0.075**2)))
    # o / (1 + o) · 3/4 = 2/5 gives o = 8/7: R = 2 loses 8/7 · 2 / (4 · 22/7) = 2/11, R = 3
    # 8/7 / (4 · 29/7) = 2/29
    assert found.rounds == 3
    # a quarter: o = 1/2, R = 2 loses 1/10; four sevenths: o = 16/5, R = 3 loses 3.2 / (4 · 6.2) = 0.13
    assert (found.fewest, found.most_rounds) == (2, 4)
    assert predict(measured, [1.0, 3.0], ratio=4.0, rounds=4, tolerance=0.2).rounds == 2


@given(
    start=st.floats(0.1, 10),
    kept=st.lists(st.floats(0.01, 0.99), min_size=2, max_size=4),
    lost=st.floats(-2, 2),
    ratio=st.floats(1, 1000),
)
def test_predictions_lie_between_no_growth_and_that_of_the_steps(
    start: float, kept: list[float], lost: float, ratio: float
) -> None:
    multi = [start * share for share in kept]
    one = [m + lost * (start - m) for m in multi]
    gap = one[-1] - multi[-1]
    measured = probe([start], [[m] for m in multi], [[o] for o in one])
    found = predict(measured, [1.0], ratio=ratio, rounds=len(kept), tolerance=0.1)
    slack = 1e-9 * abs(found.gap)
    assert found.least - slack <= found.gap <= found.most + slack
    assert sorted((found.least, found.most)) == pytest.approx(sorted((gap, ratio * gap)), abs=1e-9)
    assert 1 <= found.fewest <= found.rounds <= found.most_rounds <= len(kept)
    if 0 < lost < 1:
        assert lost - 1e-9 <= found.share <= 1 + 1e-9
    else:
        assert found.share == pytest.approx(lost, abs=1e-9)
    assert math.isinf(found.gap_error)  # one group has no spread
    same = predict(measured, [1.0], ratio=1.0, rounds=len(kept), tolerance=0.1)
    assert same.gap == same.least == same.most == gap  # nothing to extrapolate


@pytest.mark.parametrize(
    ("share", "factor", "expected"), [(0.5, 3.0, 0.75), (0.2, 1.0, 0.2), (0.0, 9.0, 0.0), (1.5, 2.0, 1.5)]
)
def test_odds(share: float, factor: float, expected: float) -> None:
    assert odds_times(share, factor) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("share", "rounds", "tolerance", "enough"),
    [
        (-0.2, 5, 0.1, 1),  # one-shot is better
        (0.1, 5, 0.101, 1),
        (0.101, 2, 0.1, 2),  # between one round and two there is nothing
        (0.3, 4, 0.1, 3),  # o = 2/3: R = 2 loses 2/3 · 2 / (4 · 8/3) = 1/8; R = 3: 2/3 / (4 · 11/3) = 0.045
        (5.0, 3, 0.1, 3),
        (1e-9, 3, 0.0, 3),
    ],
)
def test_rounds_that_are_enough(share: float, rounds: int, tolerance: float, enough: int) -> None:
    assert enough_rounds(share, rounds, tolerance) == enough


def test_what_rounds_lose() -> None:
    # leading order for small shares, G (1/R − 1/T) / (1 − 1/T)
    assert lost_with(2, 1e-6, 5) == pytest.approx(1e-6 * 0.3 / 0.8)
    # odds 3 : 1 against endlessly many rounds: one round keeps 1/4, two 2/5, four 4/7; against four of them
    kept = {rounds: rounds / (rounds + 3) for rounds in (1, 2, 4)}
    assert lost_with(2, 1 - kept[1] / kept[4], 4) == pytest.approx(1 - kept[2] / kept[4])
    assert lost_with(1, 2.0, 4) == 2.0  # more than there is to lose: linear in R
    assert lost_with(3, 2.0, 4) == pytest.approx(2 / 3)
    assert lost_with(4, 0.5, 4) == 0


def test_growth() -> None:
    assert growth([2.0, 3.0, 6.0]) == pytest.approx(1.0)
    assert growth([1.0, 2.0, 5.0, 2.0]) == pytest.approx(0.5)
    assert growth([1.0, 8.0]) == 1.0  # no faster than the steps
    assert growth([2.0, 1.0]) == growth([-1.0, 1.0]) == growth([1.0]) == 0.0


def test_caveats() -> None:
    steady = probe([4.0, 4.0], [[3.0, 3.0], [2.0, 2.0]], [[3.0, 3.0], [2.5, 2.6]])

    def of(measured: Measured, ratio: float, clients: int) -> list[str]:
        found = predict(measured, [1.0, 1.0], ratio=ratio, rounds=2, tolerance=0.1)
        return caveats(measured, [1.0, 1.0], found, clients=clients, ratio=ratio)

    assert of(steady, 1.0, 2) == []
    fewer, longer = of(steady, 2.5, 3)
    assert fewer.startswith("2 of 3 clients were probed") and "2.5 times the probe's steps" in longer
    (unsteady,) = of(probe([4.0, 4.0], [[3.0, 3.0], [3.1, 3.0]], [[3.0, 3.0], [3.5, 3.5]]), 1.0, 2)
    assert "rose in a round" in unsteady
    (unsure,) = of(probe([4.0, 4.0], [[3.0, 3.0], [2.0, 2.0]], [[3.0, 3.0], [2.0, 2.6]]), 1.0, 2)
    assert "less than twice its spread" in unsure  # 0.3 ± 0.3


def test_a_probe_that_does_not_lower_the_loss_predicts_nothing() -> None:
    with pytest.raises(InputError, match="did not lower the loss"):
        predict(probe([1.0], [[1.1], [1.2]], [[1.0], [1.3]]), [1.0], ratio=2.0, rounds=2, tolerance=0.1)


def base(**method: Any) -> dict[str, Any]:
    return {
        "data": {"clients": 3, "max_examples": 36, "max_length": 64},
        "method": {"name": "fedavg", "rounds": 3, "batch_size": 4, "lr": 3e-3, "lora": {"rank": 2}, **method},
        "evaluation": {"tasks": ["loss"], "max_examples": 16},
    }


def refused(result: Result, *parts: str) -> None:
    assert (result.status, result.out) == (2, ""), result.err
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err


def test_document(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", base(batch_size=1))
    arguments = ("diagnose", "c.yaml", "--clients", "2", "--json")
    done = fedtune(*arguments, cwd=tmp_path)
    assert done.status == 0, done.err
    found = done.json()
    # 36 examples dealt to three: 12 steps a round, 36 in all; the probe has 8 a round
    assert found["run"] == {"rounds": 3, "clients": 3, "steps": 36.0}
    on = found["measured_on"]
    assert (on["whole_run"], on["rounds"], on["steps"]) == (False, 3, 24.0)
    assert len(on["clients"]) == 2
    assert (on["loss_examples"], on["loss_groups"]) == (16, 8)
    quantities, losses, prediction = found["quantities"], found["losses"], found["prediction"]
    assert quantities["trainable_parameters"] == 4 * 2 * 2 * (128 + 128)
    assert quantities["gamma"] == pytest.approx(
        quantities["smoothness"] * quantities["relative_update"] * on["steps"]
    )
    assert quantities["bound"] == pytest.approx(quantities["gamma"] * quantities["norm"])
    assert quantities["bound_of_clients"] == pytest.approx(2 * quantities["bound"])
    assert len(quantities["local_errors"]) == 2
    assert losses["multi_round"][-1] < losses["start"]
    gained = losses["start"] - losses["multi_round"][-1]
    lost = (losses["one_shot"][-1] - losses["multi_round"][-1]) / gained
    assert prediction["share"] == pytest.approx(odds_times(lost, 1.5**0.5))
    assert prediction["steps_ratio"] == 1.5
    assert prediction["gap"] == pytest.approx(lost * gained * 1.5**0.5)
    assert prediction["gap_between"] == pytest.approx(sorted((lost * gained, 1.5 * lost * gained)))
    fewest, most = found["recommended_between"]
    assert 1 <= fewest <= found["recommended_rounds"] <= most <= 3
    assert found["caveats"][0].startswith("2 of 3 clients") and "1.5 times" in found["caveats"][1]
    again = fedtune(*arguments, "--quiet", cwd=tmp_path)
    assert (again.out, again.err) == (done.out, "")  # the same numbers each time
    assert [p for p in tmp_path.iterdir() if p.name not in (".out", ".err", "c.yaml")] == []


def test_text_says_what_it_rests_on(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", {**base(), "model": {"initial": "scratch"}})
    done = fedtune("diagnose", "c.yaml", "--clients", "2", cwd=tmp_path)
    assert done.status == 0, done.err
    text = " ".join(done.out.split())
    assert "Γ ‖w(0,0)‖" in text
    assert "Probe: 2 of 3 clients, 9 of 9 steps each in 3 rounds; loss on 16 held-out examples" in text
    assert "spread over 8 parts" in text
    assert "Recommended:" in text and "It rests on" in text
    assert "Caveat: 2 of 3 clients were probed" in text and "extrapolated" not in text


def test_probes_of_too_few_steps_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", base(batch_size=1))
    refused(
        fedtune("diagnose", "c.yaml", "--steps", "6", "--json", "--quiet", cwd=tmp_path),
        "a probe of 6 steps has 2 in each of 3 rounds",
        "--steps 24",
    )
    write_config(tmp_path / "short.yaml", base())  # of nine steps in all: a probe has as many
    refused(fedtune("diagnose", "short.yaml", "--steps", "8", cwd=tmp_path), "--steps 9 or more")
    found = fedtune("diagnose", "short.yaml", "--steps", "9", "--json", "--quiet", cwd=tmp_path).json()
    assert found["measured_on"]["steps"] == 9.0 and found["measured_on"]["whole_run"]
    assert found["prediction"]["gap"] == pytest.approx(
        found["losses"]["one_shot"][-1] - found["losses"]["multi_round"][-1]
    )


def test_probes_of_a_run_that_counts_steps_take_fewer_of_those(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", base(local_steps=10, rounds=2))
    found = fedtune("diagnose", "c.yaml", "--json", "--quiet", cwd=tmp_path).json()
    assert (found["measured_on"]["steps"], found["run"]["steps"]) == (16.0, 20.0)
    assert found["measured_on"]["clients"] == [0, 1, 2]


def test_whole_run_measures_the_gap_of_the_held_out_loss(tmp_path: Path) -> None:
    """The multi-round model of --whole is the one of `fedtune run`, and so is its loss."""
    write_config(tmp_path / "c.yaml", base())
    found = fedtune("diagnose", "c.yaml", "--whole", "--json", "--quiet", cwd=tmp_path).json()
    on = found["measured_on"]
    assert (on["whole_run"], on["clients"], on["steps"], on["loss_examples"]) == (True, [0, 1, 2], 9.0, 16)
    assert found["prediction"]["steps_ratio"] == 1.0
    assert found["prediction"]["gap"] == pytest.approx(
        found["losses"]["one_shot"][-1] - found["losses"]["multi_round"][-1]
    )
    run = fedtune("run", "c.yaml", "--json", "--quiet", "--out", "r", cwd=tmp_path).json()
    assert found["losses"]["multi_round"][-1] == pytest.approx(run["evaluation"]["loss"]["loss"], rel=1e-5)
    assert found["losses"]["start"] == pytest.approx(run["zero_shot"]["loss"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ({**base(), "method": {"name": "fedkseed"}}, ["method.name: fedavg", "got fedkseed"]),
        ({**base(), "method": {"name": "zero-shot"}}, ["got zero-shot"]),
        (base(rounds=1), ["method.rounds is 1"]),
        (base(aggregation="stack"), ["stack"]),
        (base(lr=1e12, optimizer="sgd"), ["diverged", "lower method.lr (now 1e+12)"]),
        (base(lr=1.0), ["did not lower the loss", "Lower method.lr"]),
        ({**base(), "federation": {"clients_per_round": 2}}, ["clients_per_round=null"]),
        (
            {**base(), "federation": {"privacy": {"clip": 1.0, "noise_multiplier": 1.0, "delta": 0.1}}},
            ["federation.privacy=null"],
        ),
        ({**base(), "federation": {"robust": {"max_norm": 1.0}}}, ["federation.robust=null"]),
        ({**base(), "federation": {"weights": "capped"}}, ["federation.weights=examples"]),
        ({**base(), "federation": {"max_examples": 3}}, ["federation.max_examples=null"]),
        (
            {**base(), "data": {"train": "missing.jsonl", "holdout": {"fraction": 0.5}}},
            ["missing.jsonl"],
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[0],
)
def test_what_cannot_be_diagnosed_is_refused(document: dict, parts: list[str], tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", document)
    refused(fedtune("diagnose", "c.yaml", "--json", "--quiet", cwd=tmp_path), *parts)


@pytest.mark.parametrize("option", ["--clients", "--steps"])
def test_options_below_one_are_usage_errors(option: str, tmp_path: Path) -> None:
    refused(fedtune("diagnose", "c.yaml", option, "0", cwd=tmp_path), option)


def test_help_has_an_example(tmp_path: Path) -> None:
    assert "Example: fedtune diagnose " in fedtune("diagnose", "--help", cwd=tmp_path).out


def test_classifiers_and_json_lines(tmp_path: Path) -> None:
    from model_families import save_folder

    save_folder(tmp_path / "classifier", "roberta")
    rows = [{"instruction": f"w{4 + i % 50}", "output": "abcd"[i % 4]} for i in range(40)]
    (tmp_path / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = base(lr=1e-2)
    document["model"] = {"name": "classifier", "task": "classification"}
    document["data"] = {"train": "classes.jsonl", "clients": 2, "holdout": {"fraction": 0.2}}
    write_config(tmp_path / "c.yaml", document)
    done = fedtune("diagnose", "c.yaml", "--whole", "--json", "--quiet", cwd=tmp_path)
    assert done.status in (0, 2), done.err
    if done.status == 0:
        run = fedtune("run", "c.yaml", "--json", "--quiet", "--out", "r", cwd=tmp_path).json()
        assert done.json()["losses"]["multi_round"][-1] == pytest.approx(
            run["evaluation"]["loss"]["loss"], rel=1e-5
        )
