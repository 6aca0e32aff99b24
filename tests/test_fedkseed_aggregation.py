"""How FedKSeed folds scalars in: robust means by hand, in any order, and in the memory of one client."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from fedkseed_bench import altered, toy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from toy import Bench, Toy, items

from fedtune.core.cohort import Cohort
from fedtune.core.types import Payload, Reply
from fedtune.methods.fedkseed.aggregation import Aggregator, Mean, MedianOfMeans, TrimmedMean
from fedtune.methods.fedkseed.method import FedKSeed
from fedtune.methods.fedkseed.settings import Config, ProConfig
from fedtune.methods.fedkseed.state import State


def cohort(examples: dict[int, int]) -> Cohort:
    return Cohort(tuple(sorted(examples)), examples, len(examples))


def folded(
    aggregator: Aggregator, drawn: dict[int, list[tuple[int, float]]], together: Cohort, order: list[int]
) -> Any:
    for client in order:
        seeds, scalars = zip(*drawn[client], strict=True)
        reply = Reply(client, Payload(), {}, together)
        aggregator.add(reply, torch.tensor(seeds), torch.tensor(scalars, dtype=torch.float64))
    return aggregator.change()


def test_robust_means_by_hand() -> None:
    # n = 1, 1, 2, 4: c = 1/8, 1/8, 1/4, 1/2. Seed 0: client 0 has −1 and 3 (mean 1), 1 has 2, 2 has 4, 3 has
    # 1000. Seed 1: client 3 alone. Seed 2: nobody.
    together = cohort({0: 1, 1: 1, 2: 2, 3: 4})
    drawn = {
        0: [(0, -1.0), (0, 3.0)],
        1: [(0, 2.0)],
        2: [(0, 4.0)],
        3: [(0, 1000.0), (1, -6.0)],
    }
    everyone = [0, 1, 2, 3]
    mean = folded(Mean(3, together), drawn, together, everyone)
    assert mean.tolist() == [2 / 8 + 2 / 8 + 4 / 4 + 1000 / 2, -6 / 2, 0.0]
    trimmed = folded(TrimmedMean(3, together, 0.25), drawn, together, everyone)
    # Σ c n = 2/8 + 1/8 + 1/4 + 1/2 = 9/8; of 1, 2, 4, 1000 the middle two, with weights 1/8 and 1/4
    assert_close(trimmed, torch.tensor([9 / 8 * (2 / 8 + 4 / 4) / (3 / 8), -3.0, 0.0]))
    median = folded(MedianOfMeans(3, together, 2), drawn, together, everyone)
    # groups {0, 2}: (2/8 + 4/4) / (2/8 + 1/4); {1, 3}: (2/8 + 1000/2) / (1/8 + 1/2); the median of two
    assert_close(median, torch.tensor([9 / 8 * (2.5 + 800.4) / 2, -3.0, 0.0]))
    median = folded(MedianOfMeans(3, together, 9), drawn, together, everyone)  # each client is a group
    assert_close(median, torch.tensor([9 / 8 * (2 + 4) / 2, -3.0, 0.0]))
    three = [0, 1, 2]  # c = 1/4, 1/4, 1/2 of those that replied
    assert folded(Mean(3, together), drawn, together, three).tolist() == [2 / 4 + 2 / 4 + 4 / 2, 0.0, 0.0]
    trimmed = folded(TrimmedMean(3, together, 0.34), drawn, together, three)
    assert_close(trimmed, torch.tensor([(2 / 4 + 1 / 4 + 1 / 2) * 2, 0.0, 0.0]))
    median = folded(MedianOfMeans(3, together, 3), drawn, together, three)
    assert_close(median, torch.tensor([(2 / 4 + 1 / 4 + 1 / 2) * 2, 0.0, 0.0]))


scalar = st.floats(-1e3, 1e3, allow_nan=False, width=32)

rounds = st.lists(
    st.tuples(st.integers(1, 50), st.lists(st.tuples(st.integers(0, 5), scalar), min_size=1, max_size=12)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60)
@given(rounds, st.randoms(use_true_random=False), st.integers(1, 4), st.floats(0, 0.49))
def test_folds_do_not_depend_on_order_and_without_robustness_are_the_mean(
    clients: list[tuple[int, list[tuple[int, float]]]], draw: random.Random, groups: int, trim: float
) -> None:
    together = cohort({3 * i + 1: n for i, (n, _) in enumerate(clients)})
    drawn = {3 * i + 1: pairs for i, (_, pairs) in enumerate(clients)}
    order = list(drawn)
    draw.shuffle(order)
    for fold in (
        lambda: Mean(6, together),
        lambda: MedianOfMeans(6, together, groups),
        lambda: TrimmedMean(6, together, trim),
    ):
        once, again = (folded(fold(), drawn, together, way) for way in (sorted(order), order))
        assert torch.equal(once, again)
    mean = folded(Mean(6, together), drawn, together, order)
    plain = np.zeros(6)
    for client, pairs in drawn.items():
        for j, g in pairs:
            plain[j] += together.examples[client] / together.total_examples * g
    assert_close(mean, torch.tensor(plain).float(), rtol=1e-6, atol=1e-7)
    one_group = folded(MedianOfMeans(6, together, 1), drawn, together, order)
    untrimmed = folded(TrimmedMean(6, together, 0.0), drawn, together, order)
    assert_close(one_group, mean, rtol=3e-7, atol=1e-9)
    assert_close(untrimmed, mean, rtol=3e-7, atol=1e-7)  # cancellation: scalars of 1000 that sum to little


@pytest.mark.parametrize("robust", [{"aggregation": "trimmed-mean", "trim": 0.0},
                                    {"aggregation": "median-of-means", "groups": 1}])  # fmt: skip
@pytest.mark.parametrize("perturbations", [1, 2])
def test_robust_settings_that_ask_for_nothing_give_the_plain_sum(
    robust: dict[str, Any], perturbations: int
) -> None:
    data = {0: items(3), 1: items(5, 5, 5), 2: items(4, 2)}
    settings: dict[str, Any] = {
        "seeds": 4,
        "local_steps": 20,
        "noise": "gaussian",
        "perturbations": perturbations,
        "lr": 0.01,
    }
    plain, other = toy(data, **settings), toy(data, **settings, **robust)
    plain.round(1), other.round(1)
    assert [e["payload_bytes"] for e in plain.wire if e["direction"] == "up"] == [16] * 3  # dense sums
    assert [e["payload_bytes"] for e in other.wire if e["direction"] == "up"] == [120 * perturbations] * 3
    assert_close(other.state.accumulator, plain.state.accumulator, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "robust",
    [
        {"aggregation": "trimmed-mean", "trim": 0.2},
        {"aggregation": "median-of-means", "groups": 5},
        {"clip": 6.0},
    ],
)
def test_one_bad_client_of_five_moves_a_robust_mean_little(robust: dict[str, Any]) -> None:
    data = {c: items(3, 4) for c in range(5)}
    settings: dict[str, Any] = {"seeds": 4, "local_steps": 40, "noise": "rademacher", "lr": 1e-3}
    honest, plain, safe = toy(data, **settings), toy(data, **settings), toy(data, **settings, **robust)

    def lie(payload: Payload) -> None:
        for name in payload.tensors.keys() & {"sums", "scalars"}:
            payload.tensors[name].mul_(-1000)

    altered(plain, 2, lie)
    altered(safe, 2, lie)
    honest.round(1), plain.round(1), safe.round(1)
    a = honest.state.accumulator
    assert float((plain.state.accumulator - a).norm() / a.norm()) > 100
    assert float((safe.state.accumulator - a).norm() / a.norm()) < 1
    assert float(torch.dot(safe.state.accumulator, a)) > 0  # still downhill


def test_clipped_scalars_are_cut_and_counted_by_client(caplog: pytest.LogCaptureFixture) -> None:
    data = {0: items(3), 1: items(1000), 2: items(2000)}
    b = toy(data, seeds=512, local_steps=5, clip=100.0, noise="rademacher", lr=1e-5)
    b.round(1)
    assert "scalars cut to ±100, of 5 each: client 1: 5, client 2: 5" in caplog.text
    assert float(b.state.accumulator.abs().max()) <= 2 * 100 / 3 + 3
    bound = Bench(FedKSeed(ProConfig(seeds=4, local_steps=5, lr=1e-5, clip=100.0), seed=0), Toy(), data)
    bound.round(1)
    assert float((bound.state.magnitude / bound.state.draws).max()) <= 100  # ψ sees what was folded in


def test_ten_thousand_replies_take_memory_for_one() -> None:
    from fedtune.measure.memory import MemoryMeter

    def peak(clients: int) -> int:
        method = FedKSeed(Config(seeds=4096), seed=0)
        state = method.init(Toy())
        together = cohort(dict.fromkeys(range(clients), 3))
        draw = torch.Generator().manual_seed(0)

        def incoming() -> Any:
            for client in together.clients:
                seeds = torch.randint(4096, (200,), generator=draw, dtype=torch.int16)
                scalars = torch.randn(200, generator=draw)
                yield Reply(client, Payload({"seeds": seeds, "scalars": scalars}), {}, together)

        meter = MemoryMeter("cpu")
        with meter.whole():
            method.server_step(state, incoming())
        return meter.peak_bytes

    # vectors of 4,096 numbers of 8 bytes
    assert peak(500) == peak(5) <= 9 * 8 * 4096


def test_how_probabilities_are_spread_is_told_by_round() -> None:
    """ψ is 2, 2, none and 0: the unseen seed has the mean of the others, and p is the softmax of ψ / 2."""
    state = State(
        {},
        torch.zeros(4),
        torch.zeros(4),
        torch.tensor([4.0, 2.0, 0.0, 0.0], dtype=torch.float64),
        torch.tensor([2, 1, 0, 1]),
    )
    raised = [math.e, math.e, math.exp(4 / 3 / 2), 1.0]
    wanted = [4 * value / sum(raised) for value in raised]
    spread = state.spread()
    assert spread["drawn"] == 3 and list(spread["probability"]) == [str(at) for at in range(0, 101, 5)]
    found = spread["probability"]
    assert [found[at] for at in ("0", "35", "65", "100")] == pytest.approx(wanted, abs=1e-5)
    none = torch.zeros(4)
    even = State({}, none, none, none.double(), none.long())
    assert even.spread()["drawn"] == 0 and set(even.spread()["probability"].values()) == {1.0}
    method = FedKSeed(ProConfig(seeds=4), 0)
    assert method.told(state) == {"seeds": spread} and FedKSeed(Config(seeds=4), 0).told(state) == {}
