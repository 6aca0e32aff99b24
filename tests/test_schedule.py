"""Learning rates that rise and fall, over a round or over a run, worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fedcybgd_bench import bench as in_turn
from pydantic import ValidationError
from toy import Bench, Toy, items

from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.fedbiot.settings import Config as FedBiOT
from fedtune.methods.fedcybgd.settings import BAdamConfig
from fedtune.methods.reference_settings import StandaloneConfig
from fedtune.methods.settings import Training
from fedtune.theory.trajectory import Trajectory

FORMS: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [1, 3 / 4, 2 / 4, 1 / 4]),
    ({"lr_schedule": "constant"}, [1, 1, 1, 1]),
    ({"lr_schedule": "cosine"}, [1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
    ({"lr_schedule": "constant", "lr_warmup": 0.5}, [1 / 3, 2 / 3, 1, 1]),
    ({"lr_warmup": 0.25}, [1 / 2, 1, 2 / 3, 1 / 3]),
    ({"lr_warmup": 0.01}, [1 / 2, 1, 2 / 3, 1 / 3]),  # a share of a step is a whole one
    ({"lr_schedule": "cosine", "lr_warmup": 0.5}, [1 / 3, 2 / 3, 1, 1 / 2]),
    ({"lr_warmup": 0.9}, [1 / 5, 2 / 5, 3 / 5, 4 / 5]),
]


@pytest.mark.parametrize(("form", "shares"), FORMS)
def test_rates_of_a_round(form: dict[str, Any], shares: list[float]) -> None:
    settings = Training(lr=0.5, **form)
    for round in (1, 2):
        assert [settings.rate(step, 4, round) for step in range(4)] == pytest.approx([s / 2 for s in shares])


@pytest.mark.parametrize(("form", "shares"), FORMS)
def test_rates_of_a_run_are_those_of_one_round_as_long(form: dict[str, Any], shares: list[float]) -> None:
    settings = Config(lr=0.5, rounds=2, lr_over="run", **form)
    found = [settings.rate(step, 2, round) for round in (1, 2) for step in range(2)]
    assert found == pytest.approx([s / 2 for s in shares])


def test_two_rounds_of_a_toy() -> None:
    sgd = {"trainable": "full", "optimizer": "sgd", "lr": 0.5, "batch_size": 8, "local_steps": 2}
    bench = Bench(FedAvg(Config(**sgd, rounds=2, lr_over="run"), seed=0), Toy(1.0), {0: items(3)})  # type: ignore[arg-type]
    bench.round(1)
    # rates 4/8, 3/8: 1 → 2 → 2 + 3/8
    assert bench.state.weights["w"].tolist() == [2.375]
    bench.round(2)
    # rates 2/8, 1/8: 2.375 + 0.625/4 = 2.53125 → 2.53125 + 0.46875/8
    assert bench.state.weights["w"].tolist() == [2.58984375]


def test_blocks_in_turn_follow_it() -> None:
    """In rounds 1 and 2 of 2, and of steps alike, a constant rate of what a step has gives the same bits."""
    risen = in_turn(optimizer="sgd", local_epochs=None, local_steps=1, lr=0.02, lr_over="run", rounds=2)
    risen.round(1)
    constant = in_turn(optimizer="sgd", local_epochs=None, local_steps=1, lr=0.02, lr_schedule="constant")
    constant.round(1)
    for name, weight in risen.state.weights.items():  # the first step of both rounds: lr itself
        assert weight.equal(constant.state.weights[name])


@pytest.mark.parametrize("settings", [FedBiOT, StandaloneConfig, BAdamConfig])
def test_every_method_that_trains_has_it(settings: type[Training]) -> None:
    made = settings.model_validate({"lr_schedule": "cosine", "lr_warmup": 0.1, "lr_over": "run"})
    assert made.rate(0, 10, 1) < made.lr


def test_a_measured_trajectory_follows_it() -> None:
    import torch

    settings = Config(lr=0.5, rounds=2, lr_over="run", optimizer="sgd", trainable="full")
    weights = {"w": torch.ones(1)}
    second = Trajectory(weights, settings, 2, round=2, device=torch.device("cpu"))
    assert second.rate == 0.25


@pytest.mark.parametrize(
    "wrong", [{"lr_warmup": 1.0}, {"lr_warmup": -0.1}, {"lr_schedule": "step"}, {"lr_over": "epoch"}]
)
def test_what_is_no_schedule_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Training(**wrong)
