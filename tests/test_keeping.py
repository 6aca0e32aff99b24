"""`keep_optimizer` (DiLoCo): a client's optimiser goes on where its last round ended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from toy import Bench, Toy, items

from fedtune.core.types import ClientError, Payload
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.settings import Training
from fedtune.methods.stepping import Stepper

PLAIN = {"trainable": "full", "optimizer": "sgd", "lr": 0.5, "lr_schedule": "constant", "batch_size": 8}
MOMENTUM = {**PLAIN, "momentum": 0.5}


def bench(data: dict[int, Any], **settings: Any) -> Bench:
    return Bench(FedAvg(Config(**{**MOMENTUM, **settings}), seed=0), Toy(1.0, torch.float32), data)


def test_momentum_goes_on_by_hand() -> None:
    b = bench({0: items(3)}, keep_optimizer=True)
    b.round(1)
    # gradient 1 - 3 = -2, the first momentum: 1 + 0.5·2
    assert b.state.weights["w"].tolist() == [2.0]
    assert {n: t.tolist() for n, t in b.runner.states[0].tensors.items()} == {"momentum_buffer:w": [-2.0]}
    b.round(2)
    # gradient -1, momentum 0.5·(-2) - 1 = -2
    assert b.state.weights["w"].tolist() == [3.0]
    forgets = bench({0: items(3)})
    forgets.round(1), forgets.round(2)
    assert forgets.state.weights["w"].tolist() == [2.5] and 0 not in forgets.runner.states


def test_each_client_has_its_own() -> None:
    b = bench({0: items(3), 1: items(5)}, keep_optimizer=True)
    b.round(1)
    kept = [b.runner.states[client].tensors["momentum_buffer:w"].tolist() for client in (0, 1)]
    assert kept == [[-2.0], [-4.0]] and b.state.weights["w"].tolist() == [2.5]
    b.round(2)  # from 2.5: momenta -1 - 0.5 and -2 - 2.5; Δ 0.75 and 2.25
    assert b.state.weights["w"].tolist() == [4.0]


def test_a_client_that_was_not_asked_keeps_what_it_had() -> None:
    b = bench({c: items(3) for c in range(4)}, keep_optimizer=True)
    first = b.round(1, per_round=2).clients
    assert sorted(b.runner.states) == sorted(first)
    before = {c: dict(b.runner.states[c].tensors) for c in first}
    second = b.round(2, per_round=2).clients
    for client in set(first) - set(second):
        assert torch.equal(
            b.runner.states[client].tensors["momentum_buffer:w"], before[client]["momentum_buffer:w"]
        )


def of(settings: dict[str, Any], dtype: torch.dtype, seed: int) -> tuple[dict[str, nn.Parameter], Training]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (96, 64), "b": (7,)}  # of the first the 8-bit optimiser keeps bytes
    made = {n: nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for n, s in shapes.items()}
    return made, Training(lr=1e-2, lr_schedule="constant", **settings)


FORMS: list[tuple[dict[str, Any], torch.dtype]] = [
    ({}, torch.float32),
    ({"optimizer": "adamw-8bit"}, torch.float32),
    ({"optimizer": "sgd", "momentum": 0.9}, torch.float32),
    ({"optimizer_in_backward": True}, torch.float32),
    ({}, torch.bfloat16),
    ({"masters": "kahan"}, torch.bfloat16),
    ({"masters": "stochastic", "optimizer": "adamw-8bit"}, torch.bfloat16),
]


@pytest.mark.parametrize(("settings", "dtype"), FORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_goes_on_takes_the_steps_that_one_would_have_taken(
    settings: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    def step(stepper: Stepper, at: int) -> None:
        draw = torch.Generator().manual_seed(100 * seed + at)
        with stepper.arriving(1e-2):
            losses = [
                (p * torch.randn(p.shape, generator=draw).to(p.dtype)).sum()
                for p in stepper.parameters.values()
            ]
            sum(losses, torch.zeros(())).backward()  # type: ignore[union-attr]
        stepper.step()

    whole, training = of(settings, dtype, seed)
    one = Stepper(whole, training)
    for at in range(3):
        step(one, at)
    parts, training = of(settings, dtype, seed)
    first = Stepper(parts, training)
    step(first, 0), step(first, 1)
    kept = first.kept()
    second = Stepper(parts, training)
    second.go_on(kept)
    again = second.kept()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in kept.tensors.items())
    step(second, 2)
    exact = dtype == torch.float32
    if exact:  # where nothing but weights and what the optimiser gathered is left of a round
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    else:  # masters and remainders end with a round: half a bfloat16 step, then a step of the same size
        assert_close(dict(whole), dict(parts), rtol=2**-7, atol=2e-2)


def test_what_was_kept_of_other_weights_is_refused() -> None:
    parameters, training = of({}, torch.float32, 0)
    stepper = Stepper(parameters, training)
    with pytest.raises(ClientError, match="kept from an earlier round is exp_avg:c, and c is not trained"):
        stepper.go_on(Payload({"exp_avg:c": torch.zeros(3)}))
    with pytest.raises(ClientError, match="exp_avg:b of 3 numbers, and the weight has 7"):
        stepper.go_on(Payload({"exp_avg:b": torch.zeros(3)}))
