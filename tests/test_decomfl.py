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
from fedtune.methods.fedkseed.decomfl import directions
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
    b, w = bench({0: items(3), 1: items(5)}, perturbations=2), 1.0
    key = b.method.directions_key
    for round in (1, 2):
        b.round(round)
        pool = directions(key, round, 4, "gaussian")
        z = [float(reference.z(pool, "w", 1, j)[0]) for j in range(4)]
        means = [0.0] * 4
        for client, y in ((0, 3), (1, 5)):
            own = w
            for step in (0, 1):
                slopes = [(own - y) * z[2 * step + p] for p in (0, 1)]
                sent = b.method.replies[client].payload.tensors["scalars"][2 * step : 2 * step + 2]
                assert sent.tolist() == pytest.approx(slopes, rel=1e-3, abs=1e-4)
                own -= 0.1 / 2 * sum(slope * z[2 * step + p] for p, slope in enumerate(slopes))
                for p in (0, 1):
                    means[2 * step + p] += slopes[p] / 2
        assert b.state.scalars[-4:].tolist() == pytest.approx(means, rel=1e-3, abs=1e-4)
        w -= 0.1 / 2 * sum(mean * along for mean, along in zip(means, z, strict=True))
        assert exported(b) == pytest.approx(w, rel=1e-4)
    assert w != 1.0 and torch.equal(b.model.w, torch.tensor([1.0]))  # w0 again


def test_clients_of_a_round_try_the_same_directions_and_rounds_others() -> None:
    pools = [directions(key, round, 4, "gaussian") for key, round in ((5, 1), (5, 2), (6, 1))]
    assert pools[0] == directions(5, 1, 4, "gaussian") and len({pool.key for pool in pools}) == 3


def test_clients_are_weighted_by_examples() -> None:
    b = bench(local_steps=1)
    b.round(1)
    slopes = [float(b.method.replies[client].payload.tensors["scalars"][0]) for client in (0, 1)]
    assert float(b.state.scalars[0]) == pytest.approx(0.25 * slopes[0] + 0.75 * slopes[1], rel=1e-6)


def test_it_costs_4_bytes_a_direction_both_ways_and_who_was_away_gets_what_it_lacks() -> None:
    b = bench(perturbations=3)
    b.round(1)
    b.round(2, per_round=1)
    b.round(3)
    assert {e["payload_bytes"] for e in b.wire if e["direction"] == "up"} == {24}
    asked = next(e["client"] for e in b.wire if e["round"] == 2)
    down = {(e["round"], e["client"]): e["payload_bytes"] for e in b.wire if e["direction"] == "down"}
    lacking = {(1, 0): 0, (1, 1): 0, (2, asked): 24, (3, asked): 24, (3, 1 - asked): 48}
    assert down == {which: 4 + sent for which, sent in lacking.items()}  # and the pool's key


def test_a_client_whose_directions_are_others_refuses() -> None:
    b = bench()
    other, step = InfinitePool(b.method.config, seed=1), b.method.client_step
    b.method.client_step = lambda job, env: (other.client_step if env.client else step)(job, env)
    outcome = b.round(1, quorum=1)
    assert outcome.clients == [0] and "give all the same seed" in outcome.left_out[1]


def test_two_directions_a_step_with_seeds_of_ones_own_are_of_the_same_weights() -> None:
    """`perturbations` of `download: steps`."""
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
