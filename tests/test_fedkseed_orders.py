"""What FedKSeed sends: the paper's byte counts, changes of an accumulator, and what either side refuses."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from fedkseed_bench import altered, replies, toy
from hypothesis import given
from hypothesis import strategies as st
from toy import Bench, Toy, items

from fedtune.core.types import Payload
from fedtune.errors import FederationError, InputError
from fedtune.methods.fedkseed import settings
from fedtune.methods.fedkseed.method import FedKSeed
from fedtune.methods.fedkseed.order import Fingerprint, Origin, changes, with_changes
from fedtune.methods.fedkseed.settings import Config, ProConfig, paper_bytes
from fedtune.zeroth import MAX_SEEDS, NOISE_VERSION


@pytest.mark.parametrize(
    ("config", "clients", "paper", "ours"),
    [
        # down 51 of what it belongs to, 4 of checksum, 4 a seed (Pro: 8); up 200 pairs of 6
        (Config(seeds=4096, local_steps=200), 3, 17_988, 55 + 16_384 + 1_200),
        (ProConfig(seeds=1024, local_steps=200), 10, 9_796, 55 + 8_192 + 1_200),
        (ProConfig(seeds=2048, local_steps=200), 3, 17_988, 55 + 16_384 + 1_200),
    ],
)
def test_a_round_costs_no_more_than_the_papers_and_less_for_who_was_there_before(
    config: Config, clients: int, paper: int, ours: int
) -> None:
    assert paper_bytes(config) == paper  # Table 3
    b = Bench(FedKSeed(config, seed=0), Toy(), {c: items(3 + c) for c in range(clients)})
    b.round(1)
    zeros, after = b.state.before, b.state.accumulator
    b.round(2)
    changed = int((after != zeros).sum())
    for client in range(clients):
        first, second = (
            [entry for entry in b.wire if entry["client"] == client and entry["round"] == round]
            for round in (1, 2)
        )
        assert sum(entry["payload_bytes"] for entry in first) == ours <= paper
        framed = sum(entry["framed_bytes"] for entry in first)
        assert framed <= ours + 2 * 72 + 0.02 * ours  # a frame each way
        assert framed <= paper
        # not all entries changed: one bit a seed, 4 bytes an entry
        rest = 4 * config.seeds if config.name == "fedkseed-pro" else 0
        expected = 55 + config.seeds // 8 + 4 * changed + rest + 1_200
        assert sum(entry["payload_bytes"] for entry in second) == expected < ours


@pytest.mark.parametrize(("k", "pair"), [(32_768, 6), (32_769, 8), (65_536, 8)])
def test_an_index_takes_two_bytes_as_long_as_it_fits(k: int, pair: int) -> None:
    b = toy({0: items(3), 1: items(5)}, seeds=k, local_steps=20)
    kept = replies(b)
    b.round(1)
    assert [e["payload_bytes"] for e in b.wire if e["direction"] == "up"] == [20 * pair] * 2
    drawn = torch.cat([reply.payload.tensors["seeds"].long() for reply in kept])
    assert int(drawn.min()) >= 0 and 2**14 < int(drawn.max()) < k
    assert set(b.state.accumulator.nonzero().flatten().tolist()) <= set(drawn.tolist())
    for _, model in b.method.export(b.state, b.model):
        assert model.w.item() != 1.0


@given(st.lists(st.tuples(st.floats(-2, 2, width=32), st.booleans()), min_size=1, max_size=40))
def test_changes_give_the_whole_again(entries: list[tuple[float, bool]]) -> None:
    before = torch.tensor([value for value, _ in entries])
    after = torch.where(torch.tensor([change for _, change in entries]), before + 1, before)
    sent = changes(before, after)
    number = sum(change for _, change in entries)
    assert (sent is None) == (-(-len(entries) // 8) + 4 * number >= 4 * len(entries))
    if sent is not None:
        assert torch.equal(with_changes(before, sent), after)
        assert sum(tensor.nbytes for tensor in sent.values()) == -(-len(entries) // 8) + 4 * number


def test_the_dense_sums_go_up_where_they_are_smaller() -> None:
    b = toy({0: items(3)}, seeds=4, local_steps=20)
    pairs = toy({0: items(3)}, seeds=4096, local_steps=20)
    b.round(1), pairs.round(1)
    assert [e["payload_bytes"] for e in b.wire if e["direction"] == "up"] == [16]
    assert [e["payload_bytes"] for e in pairs.wire if e["direction"] == "up"] == [120]


def test_a_state_of_other_weights_noise_or_pool_is_not_exported() -> None:
    b = toy({0: items(3)})
    b.round(1)
    w0 = b.state.origin["w0"][:16]
    with pytest.raises(
        InputError, match=rf"w0 with SHA-256 {w0}, here it is (?!{w0})[0-9a-f]{{16}}: give the"
    ):
        list(b.method.export(b.state, Toy(w=1.5)))
    for part, value, message in (
        (
            "noise_version",
            99,
            f"noise of version 99, here it is {NOISE_VERSION}: use the fedtune that the run began with",
        ),
        ("pool", 7, rf"a pool with the key 7, here it is {b.method.pool_key}: give all the same seed"),
        ("noise", "gaussian", r"noise of the kind gaussian, here it is hadamard4: .* method\.noise"),
        ("seeds", 9, r"a pool of as many seeds as 9, here it is 8: give all the same method\.seeds"),
    ):
        with pytest.raises(InputError, match=f"the run's state is for {message}"):
            list(b.method.export(replace(b.state, origin={**b.state.origin, part: value}), b.model))
    assert b.model.w.tolist() == [1.0]


def other_client(bench: Bench, client: int, method: FedKSeed, model: torch.nn.Module) -> None:
    """Lets another program, with its own method and model, answer for a client."""
    step = bench.method.client_step

    def answer(job: Payload, env: Any) -> Any:
        if env.client != client:
            return step(job, env)
        return method.client_step(job, replace(env, model=method.client_model(lambda: model)))

    bench.method.client_step = answer


@pytest.mark.parametrize(
    ("changes", "seed", "w", "message"),
    [
        ({}, 0, 1.5, r"w0 with SHA-256 {w0}, here it is (?!{w0})[0-9a-f]{{16}}: give the model that the run"),
        ({}, 1, 1.0, r"a pool with the key \d+, here it is \d+: give all the same seed"),
        ({"seeds": 16}, 0, 1.0, r"as many seeds as 8, here it is 16: give all the same method\.seeds"),
        ({"noise": "gaussian"}, 0, 1.0, r"noise of the kind hadamard4, here it is gaussian"),
    ],
)
def test_a_client_with_other_weights_or_another_pool_refuses_and_the_round_goes_on(
    changes: dict[str, Any], seed: int, w: float, message: str
) -> None:
    b, alone = toy({0: items(3), 1: items(5)}), toy({0: items(3)})
    settings: dict[str, Any] = {**b.method.config.model_dump(), **changes}
    other_client(b, 1, FedKSeed(Config(**settings), seed=seed), Toy(w=w))
    outcome = b.round(1, quorum=1)
    alone.round(1)
    assert outcome.clients == [0]
    found = re.search(message.format(w0=b.state.origin["w0"][:16]), outcome.left_out[1])
    assert found, outcome.left_out
    assert torch.equal(b.state.accumulator, alone.state.accumulator)  # its weight is nobody's now


def test_a_client_with_noise_of_another_version_refuses() -> None:
    b = toy({0: items(3), 1: items(5)})
    b.state = replace(b.state, origin={**b.state.origin, "noise_version": 99})
    with pytest.raises(
        FederationError,
        match=rf"noise of version 99, here it is {NOISE_VERSION}: use the fedtune that the run",
    ):
        b.round(1)


def test_weights_of_another_dtype_or_name_have_another_hash() -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = torch.nn.Parameter(torch.tensor([1.0]))

    fingerprint = Fingerprint()
    models = [Toy(), Toy(w=1.5), Toy(dtype=torch.float64), Named()]
    hashes = [fingerprint.of(model) for model in models]
    assert len(set(hashes)) == 4
    assert [fingerprint.of(model) for model in reversed(models)] == hashes[::-1]  # the last one is kept
    assert fingerprint.of(Toy()) == hashes[0]


def test_an_origin_travels_in_51_bytes() -> None:
    origin = Origin("ab" * 32, 2**31 - 1, 65_536, "hadamard4", 1)
    packed = origin.as_tensor()
    assert packed.nbytes == 32 + 4 + 2 + 4 + len("hadamard4")
    assert Origin.of_tensor(packed) == origin == Origin(**asdict(origin))
    assert origin.against(origin.as_mapping()) == ""
    with pytest.raises(ValueError, match="does not say what it belongs to"):
        Origin.of_tensor(packed[:20])


def test_changes_of_another_accumulator_are_found_out_and_the_whole_comes_next() -> None:
    b = toy({0: items(3), 1: items(5), 2: items(4)}, seeds=4096)
    b.round(1)
    kept = b.runner.states[1].tensors["accumulator"]
    b.runner.states[1] = Payload({"accumulator": kept + 1})  # as after a server that was set back
    outcome = b.round(2, quorum=1)
    assert "its accumulator is not the server's" in outcome.left_out[1]
    assert sorted(outcome.clients) == [0, 2]
    b.runner.states[0] = Payload({"accumulator": torch.zeros(9)})
    outcome = b.round(3, quorum=1)
    assert "changes of about 4096 seeds, but holds 9" in outcome.left_out[0]
    assert sorted(outcome.clients) == [1, 2]
    assert b.round(4).left_out == {}


def test_a_damaged_order_is_refused() -> None:
    for change, message in (
        (lambda job: job.tensors.update(accumulator=torch.ones(8)), "its accumulator is not the server's"),
        (lambda job: job.tensors.update(origin=torch.zeros(3, dtype=torch.uint8)), "does not say what it"),
    ):
        b = toy({0: items(3), 1: items(5)})
        altered(b, 1, change, order=True)
        outcome = b.round(1, quorum=1)
        assert outcome.clients == [0] and message in outcome.left_out[1]


@pytest.mark.parametrize(
    ("probability", "message"),
    [
        ([0.5, 0.5, 0.5, 0.5], "sum to 2.0000 and not to 1"),
        ([0.0] * 4, "sum to 0.0000 and not to 1"),
        ([math.nan, 1.0, 0.0, 0.0], "are not 4 finite numbers of 0 or more"),
        ([1.5, -0.5, 0.0, 0.0], "are not 4 finite numbers of 0 or more"),
        ([0.5, 0.5], "are not 4 finite numbers of 0 or more"),
    ],
)
def test_probabilities_that_are_none_are_refused(probability: list[float], message: str) -> None:
    data = {0: items(3), 1: items(5)}
    b = Bench(FedKSeed(ProConfig(seeds=4, local_steps=5, lr=0.01), seed=0), Toy(), data)
    altered(b, 1, lambda job: job.tensors.update(probability=torch.tensor(probability)), order=True)
    outcome = b.round(1, quorum=1)
    assert outcome.clients == [0] and message in outcome.left_out[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dense", [False, True])
def test_scalars_that_are_no_numbers_are_refused_and_named(value: float, dense: bool) -> None:
    b = toy({0: items(3), 1: items(5)}, seeds=4 if dense else 512, local_steps=20)
    name = "sums" if dense else "scalars"

    def spoil(payload: Payload) -> None:
        payload.tensors[name][2] = value

    altered(b, 1, spoil)
    outcome = b.round(1, quorum=1)
    assert outcome.clients == [0]
    assert outcome.left_out[1] == f"tensor {name} holds NaN or infinite values"
    assert torch.isfinite(b.state.accumulator).all()


def test_scalars_beyond_the_limit_and_foreign_seeds_are_refused_and_named() -> None:
    b = toy({0: items(3), 1: items(1000)}, scalar_limit=100.0)
    outcome = b.round(1, quorum=1)
    assert outcome.clients == [0] and "scalars holds values of 100 or more" in outcome.left_out[1]
    for bad in (-1, 8):
        b = toy({0: items(3), 1: items(5)})

        def lie(payload: Payload, bad: int = bad) -> None:
            payload.tensors["seeds"][0] = bad

        altered(b, 1, lie)
        outcome = b.round(1, quorum=1)
        assert outcome.clients == [0] and "seeds holds values" in outcome.left_out[1]


def test_a_client_that_lost_its_accumulator_says_so_and_then_gets_it_whole() -> None:
    data = {0: items(3), 1: items(5), 2: items(4)}
    b = toy(data, seeds=4096)
    b.round(1)
    del b.runner.states[1]
    outcome = b.round(2, quorum=1)
    assert "holds no accumulator any more" in outcome.left_out[1] and sorted(outcome.clients) == [0, 2]
    assert b.round(3).left_out == {}


def test_a_pool_has_at_most_the_seeds_that_an_index_of_16_bits_names() -> None:
    assert settings.MAX_SEEDS == MAX_SEEDS == 2**16
