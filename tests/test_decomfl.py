"""`infinite-pool` with `download: means`: shared directions, means by hand, a rebuild, bytes, plans."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fedkseed_bench import text, tiny
from pydantic import ValidationError
from toy import Bench, Toy, items

from fedtune.config.file import parse_config
from fedtune.core.types import Reply
from fedtune.data.encoded import Encoded
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.methods.fedkseed.infinite_pool import InfinitePool, State
from fedtune.methods.fedkseed.settings import InfinitePoolConfig as Config
from fedtune.models.tuning import trainable
from fedtune.planning.plan import plan
from fedtune.zeroth import SeedPool, reference

DATA = {0: items(3), 1: items(5, 6, 7)}
FIXED = {"local_steps": 2, "lr": 0.1, "epsilon": 1e-2, "noise": "gaussian", "download": "means"}


class Watched(InfinitePool):
    """Writes down the replies of a round, and folds them in from the last to the first."""

    replies: dict[int, Any]

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        self.replies = {reply.client: reply for reply in replies}
        return super().server_step(state, reversed(list(self.replies.values())))


def bench(data: dict[int, list[Encoded]] = DATA, **settings: object) -> Bench:
    return Bench(Watched(Config.model_validate({**FIXED, **settings}), seed=0), Toy(), data)


def exported(b: Bench) -> float:
    (value,) = [trainable(model)["w"].item() for _, model in b.method.export(b.state, b.model)]
    return value


def test_two_rounds_by_hand() -> None:
    """A slope of (w − y)²/2 along z is (w − y) z, by a central difference exactly; one example a client."""
    b = bench({0: items(3)}, download="steps", perturbations=2, local_steps=1)
    b.round(1)
    sent = b.method.replies[0].payload.tensors
    z = [float(reference.z(SeedPool(seed, 1, "gaussian"), "w", 1, 0)[0]) for seed in sent["seeds"].tolist()]
    assert sent["scalars"].tolist() == pytest.approx([-2 * along for along in z], rel=1e-3)
    assert exported(b) == pytest.approx(1 + 0.1 / 2 * 2 * (z[0] ** 2 + z[1] ** 2), rel=1e-4)


def test_a_client_ends_a_round_where_it_began() -> None:
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    b = Bench(
        InfinitePool(Config.model_validate({**FIXED, "lr": 1e-3, "noise": "hadamard4"}), 0), model, text()
    )
    for round in (1, 2):
        b.round(round)
        assert all(torch.equal(p, before[name]) for name, p in b.model.named_parameters())


def test_more_directions_than_a_pool_has_are_refused() -> None:
    with pytest.raises(ValidationError, match="local_steps times perturbations is 80,000; lower one"):
        Config(download="means", local_steps=400, perturbations=200)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "infinite-pool", "download": "means", "perturbations": 2},
        {"name": "fedkseed", "graph": "ring", "seeds": 64},
        {"name": "fedkseed", "graph": "random", "degree": 1, "seeds": 8},
    ],
    ids=["means", "ring", "random"],
)
def test_a_plan_has_a_runs_bytes(method: dict[str, Any], tmp_path: Path) -> None:
    settings = {
        "model": {"name": "bundled"},
        "data": {"train": "bundled", "clients": 4, "max_examples": 40, "holdout": {"fraction": 0.2}},
        "method": {"rounds": 3, "local_steps": 2, "lr": 1e-4, **method},
        "federation": {"clients_per_round": 3},
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "every": 0, "bootstrap": 0},
    }
    config = parse_config(settings, "here")
    done, planned = run(config, tmp_path / "run", Silent()), plan(config).document
    total = done["payload_bytes"]["down"] + done["payload_bytes"]["up"]
    assert planned["payload_bytes"]["total"] == total
    assert planned["client_peak_memory_bytes"]["total"] == pytest.approx(
        done["peak_memory_bytes"]["client"], rel=0.02
    )
