"""FedKSeed's baselines: steps that are replayed one by one, and the model that is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from toy import Bench, Toy, items

from fedtune.core.types import Reply
from fedtune.data.encoded import Encoded
from fedtune.errors import InputError
from fedtune.methods.fedkseed.infinite_pool import InfinitePool, State
from fedtune.methods.fedkseed.settings import InfinitePoolConfig as Config
from fedtune.models.tuning import trainable
from fedtune.zeroth import SeedPool, perturb_all_

DATA = {0: items(3), 1: items(5, 6, 7)}


class Watched(InfinitePool):
    """Writes down the replies of a round, and folds them in from the last to the first."""

    replies: dict[int, Any]

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        self.replies = {reply.client: reply for reply in replies}
        return super().server_step(state, reversed(list(self.replies.values())))


def bench(**settings: object) -> Bench:
    fixed = {"local_steps": 2, "lr": 0.1, "epsilon": 1e-2, "noise": "rademacher"}
    return Bench(Watched(Config.model_validate({**fixed, **settings}), seed=0), Toy(), DATA)


@pytest.mark.parametrize("download", ["steps", "model"])
def test_the_model_is_w0_and_every_step_in_turn(download: str) -> None:
    b = bench(download=download)
    shares = {0: 0.25, 1: 0.75}  # c_i = n_i / Σ n
    w = torch.tensor([1.0])
    for round in (1, 2):
        b.round(round)
        for client in (0, 1):
            sent = b.method.replies[client].payload.tensors
            for seed, g in zip(sent["seeds"].tolist(), sent["scalars"], strict=True):
                perturb_all_({"w": w}, SeedPool(seed, 1, "rademacher"), 0, -0.1 * float(g * shares[client]))
        for _, model in b.method.export(b.state, b.model):
            assert torch.equal(trainable(model)["w"], w)
    assert float(w) != 1.0
    if download == "steps":
        assert torch.equal(b.model.w, torch.tensor([1.0]))  # w0 again
        assert len(b.state.seeds) == 8 and not b.state.weights


def test_what_it_costs_grows_with_the_rounds_or_is_the_model() -> None:
    """Down: 8 bytes for each step that a client lacks, or 4 a parameter. Up: 8 a step."""
    b = bench()
    for round in (1, 2, 3):
        b.round(round)
    down = [(e["round"], e["payload_bytes"]) for e in b.wire if e["direction"] == "down"]
    assert down == [(1, 0), (1, 0), (2, 32), (2, 32), (3, 32), (3, 32)]
    assert {e["payload_bytes"] for e in b.wire if e["direction"] == "up"} == {16}
    late = bench()
    late.round(1)
    late.round(2, per_round=1)
    late.round(3)
    asked = next(e["client"] for e in late.wire if e["round"] == 2)
    third = [e for e in late.wire if e["round"] == 3 and e["direction"] == "down"]
    assert {e["client"]: e["payload_bytes"] for e in third} == {asked: 16, 1 - asked: 48}
    model = bench(download="model")
    model.round(1)
    assert {e["payload_bytes"] for e in model.wire if e["direction"] == "down"} == {4}


def test_half_precision_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.dtype=float32, or use fedkseed"):
        Bench(InfinitePool(Config(), seed=0), Toy(dtype=torch.bfloat16), DATA)


def test_a_step_without_a_trained_token_is_a_step_of_nothing_and_the_others_follow() -> None:
    pair = [Encoded((3, 3), (-100, 3)), Encoded((4, 4), (-100, -100))]
    fixed = {"local_steps": 4, "lr": 0.1, "epsilon": 1e-2, "noise": "rademacher", "batch_size": 1}
    b = Bench(Watched(Config.model_validate(fixed), seed=0), Toy(), {0: pair})
    b.round(1)
    scalars = b.method.replies[0].payload.tensors["scalars"]
    assert len(scalars) == 4 and int((scalars == 0).sum()) == 2  # each example twice, in whichever order
    assert b.method.replies[0].metrics["trained_tokens"] == 2
