"""FedKSeed against numbers worked out by hand, the paper's byte counts, and equal bits on all sides."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from client_weights import computed_with
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.testing import assert_close
from toy import Bench, Toy, items
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.config.file import parse_config
from fedtune.core.cohort import Cohort
from fedtune.core.state import from_payload, to_payload
from fedtune.core.types import Payload, Reply
from fedtune.data.encode import Encoded
from fedtune.errors import FederationError, InputError
from fedtune.federation import checkpoint
from fedtune.methods.fedkseed.aggregation import Fold, Mean, MedianOfMeans, TrimmedMean
from fedtune.methods.fedkseed.method import Config, FedKSeed, ProConfig, State, epsilon_to_try, paper_bytes
from fedtune.methods.fedkseed.order import Fingerprint, Origin, changes, with_changes
from fedtune.methods.fedkseed.step import step_weights
from fedtune.models.tuning import trainable
from fedtune.zeroth import NOISE_VERSION, reference
from fedtune.zeroth.pool import SeedPool

NOISES = ["hadamard4", "rademacher", "gaussian", "binomial32"]


def toy(data: dict[int, list[Encoded]], seed: int = 0, **changes: Any) -> Bench:
    defaults = {"seeds": 8, "local_steps": 1, "lr": 0.25, "epsilon": 2.0**-6}
    return Bench(FedKSeed(Config(**{**defaults, **changes}), seed=seed), Toy(), data)


def altered(bench: Bench, client: int, change: Callable[[Payload], None], *, order: bool = False) -> None:
    """Rewrites a client's reply, or the order before it gets there."""
    step = bench.method.client_step

    def other(job: Payload, env: Any) -> Any:
        if env.client != client:
            return step(job, env)
        if order:
            job = Payload(dict(job.tensors), dict(job.scalars))
            change(job)
            return step(job, env)
        result = step(job, env)
        change(result.payload)
        return result

    bench.method.client_step = other


def tiny(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, **shape, max_position_embeddings=32, tie_word_embeddings=True)
    return LlamaForCausalLM(config).to(dtype).eval()


def text(clients: int = 3) -> dict[int, list[Encoded]]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(3, 32, (clients * 4, 6), generator=generator).tolist()
    return {
        c: [Encoded(tuple(r), tuple(r)) for r in rows[4 * c : 4 * c + 3 + (c == 1)]] for c in range(clients)
    }


def z(bench: Bench, j: int) -> float:
    pool = SeedPool(bench.method.pool_key, bench.method.config.seeds, bench.method.config.noise)
    return float(reference.z(pool, "w", 1, j)[0])


def replies(bench: Bench) -> list[Any]:
    """Keeps the replies of the bench's rounds as the server's step sees them."""
    kept: list[Any] = []
    step = bench.method.server_step
    bench.method.server_step = lambda state, incoming: step(state, (kept.append(r) or r for r in incoming))  # type: ignore[func-returns-value]
    return kept


@pytest.mark.parametrize("kind", NOISES)
def test_one_step_of_one_client_by_hand(kind: str) -> None:
    b = toy({0: items(3)}, noise=kind)
    kept = replies(b)
    outcome = b.round(1)
    j = int(kept[0].payload.tensors["seeds"][0])
    # ((1 + εz - 3)² - (1 - εz - 3)²) / 4ε = (1 - 3) z
    assert_close(kept[0].payload.tensors["scalars"], torch.tensor([-2 * z(b, j)]), rtol=1e-4, atol=1e-6)
    assert_close(b.state.accumulator[j], torch.tensor(-2 * z(b, j)), rtol=1e-4, atol=1e-6)
    assert b.state.accumulator.count_nonzero() == (z(b, j) != 0)
    # mean of (−2 ± εz)²/2
    assert outcome.mean("train_loss") == pytest.approx((4 + (2.0**-6 * z(b, j)) ** 2) / 2, rel=1e-5)
    for _, model in b.method.export(b.state, b.model):
        assert_close(model.w.detach(), torch.tensor([1 + 0.25 * 2 * z(b, j) ** 2]), rtol=1e-4, atol=1e-6)
    assert b.model.w.tolist() == [1.0]  # the base model is as it was


def test_clients_are_weighted_by_examples() -> None:
    b = toy({0: items(3), 1: items(5, 5, 5)})
    kept = replies(b)
    b.round(1)
    expected = torch.zeros(8)
    for reply, weight in zip(sorted(kept, key=lambda r: r.client), (0.25, 0.75), strict=True):
        expected[int(reply.payload.tensors["seeds"][0])] += weight * float(
            reply.payload.tensors["scalars"][0]
        )
    assert_close(b.state.accumulator, expected, rtol=1e-6, atol=1e-7)


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
        assert framed <= ours + 2 * 64 + 0.02 * ours  # a frame each way
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


@pytest.mark.parametrize("kind", NOISES)
def test_the_base_model_keeps_its_bits_and_tied_weights_stay_tied(kind: str) -> None:
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    b = Bench(
        FedKSeed(Config(seeds=16, local_steps=3, lr=1e-3, epsilon=1e-3, noise=kind), seed=0), model, text()
    )
    b.round(1)
    for _, exported in b.method.export(b.state, b.model):
        moved = {name: p.detach().clone() for name, p in exported.named_parameters()}
        assert exported.lm_head.weight.data_ptr() == exported.model.embed_tokens.weight.data_ptr()
    assert all(torch.equal(p, before[name]) for name, p in b.model.named_parameters())
    assert all(not torch.equal(moved[name], before[name]) for name in before)


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("kind", "dtype"), [(k, d) for k in NOISES for d in ([torch.float32] if k == "hadamard4" else []) + HALF]
)
def test_after_any_number_of_steps_a_client_computes_with_the_rebuild(kind: str, dtype: torch.dtype) -> None:
    model, lr, draw = tiny(dtype), 2.0**-10, torch.Generator().manual_seed(3)
    method = FedKSeed(Config(seeds=64, lr=lr, noise=kind), seed=0)
    state = method.init(method.client_model(lambda: model))
    total = torch.randint(-8, 9, (64,), generator=draw) / 4.0  # in quarters, so that no sum is rounded
    batch = {name: torch.tensor([[3, 4, 5]]) for name in ("input_ids", "labels")}
    with step_weights(model, SeedPool(method.pool_key, 64, kind), total.clone(), lr) as weights:
        for step, j in enumerate(torch.randint(64, (25,), generator=draw).tolist()):
            for scale in (2.0**-8, -(2.0**-8)):
                weights.loss(batch, j, scale)
            weights.update([(j, (step % 7 - 3) / 4)])
            total[j] += (step % 7 - 3) / 4
        seen = computed_with(model, weights)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _, exported in method.export(replace(state, accumulator=total), model):
        for name, parameter in trainable(exported).items():
            assert parameter.dtype == seen[name].dtype == dtype
            assert torch.equal(seen[name], parameter.data), name
            assert not torch.equal(seen[name], before[name])


def test_probabilities_of_pro() -> None:
    method = FedKSeed(ProConfig(seeds=4), seed=0)
    state = method.init(Toy())
    assert method.probabilities(state).tolist() == [0.25] * 4
    state = replace(
        state,
        magnitude=torch.tensor([2.0, 12.0, 0.0, 4.0], dtype=torch.float64),
        draws=torch.tensor([1, 2, 0, 1]),
    )
    # ψ = 2, 6, mean 4 for the seed never drawn, 4; normalised 0, 1, ½, ½
    weights = [1, math.e, math.exp(0.5), math.exp(0.5)]
    assert_close(method.probabilities(state), torch.tensor([w / sum(weights) for w in weights]))
    assert float(method.probabilities(state).max() / method.probabilities(state).min()) == pytest.approx(
        math.e
    )


def test_pro_counts_magnitudes_unweighted() -> None:
    b = Bench(
        FedKSeed(ProConfig(seeds=4, local_steps=5, lr=0.01), seed=0), Toy(), {0: items(3), 1: items(5, 5)}
    )
    kept = replies(b)
    b.round(1)
    for j in range(4):
        mine = [
            abs(g)
            for r in kept
            for s, g in zip(
                r.payload.tensors["seeds"].tolist(), r.payload.tensors["scalars"].tolist(), strict=True
            )
            if s == j
        ]
        assert int(b.state.draws[j]) == len(mine)
        assert float(b.state.magnitude[j]) == pytest.approx(sum(mine))


def test_clients_draw_seeds_of_their_own() -> None:
    b = toy({c: items(3) for c in range(4)}, seeds=4096, local_steps=50)
    kept = replies(b)
    b.round(1)
    drawn = {tuple(r.payload.tensors["seeds"].tolist()) for r in kept}
    assert len(drawn) == 4


def test_state_survives_a_checkpoint() -> None:
    b = toy({0: items(3), 1: items(5)})
    b.round(1)
    again = from_payload(State, to_payload(b.state))
    one, two = list(b.method.export(b.state, b.model)), list(b.method.export(again, b.model))
    assert len(one) == len(two) == 1
    assert again.holders == b.state.holders == {"0": True, "1": True}
    assert torch.equal(again.accumulator, b.state.accumulator)


def test_a_checkpoint_holds_what_many_clients_keep_once(tmp_path: Path) -> None:
    b = toy({c: items(3 + c) for c in range(20)}, seeds=1024)
    for round in (1, 2):
        b.round(round, per_round=0.5)
        saved = checkpoint.Checkpoint(round, to_payload(b.state), b.runner.states, {}, {})
        checkpoint.save(tmp_path, saved, config_sha256="x", keep=None)
    kept = {state.tensors["accumulator"].numpy().tobytes() for state in b.runner.states.values()}
    assert len(b.runner.states) > 10 and len(kept) == 2
    assert (tmp_path / "round-0002/clients.safetensors").stat().st_size < 2 * 4096 + 500
    loaded = checkpoint.load(tmp_path, 2, config_sha256="x").clients
    assert loaded.keys() == b.runner.states.keys()
    for client, state in loaded.items():
        assert torch.equal(state.tensors["accumulator"], b.runner.states[client].tensors["accumulator"])
    assert len({state.tensors["accumulator"].data_ptr() for state in loaded.values()}) == len(loaded)


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


def test_a_loss_that_is_no_number_stops_its_client_alone() -> None:
    b = toy({0: items(3), 1: items(5)}, lr=1e22, local_steps=30, noise="rademacher")
    with pytest.raises(FederationError, match=r"the losses became \S+ and \S+ at step \d+; lower method.lr"):
        b.round(1)
    assert b.state.accumulator.count_nonzero() == 0 and b.model.w.tolist() == [1.0]


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


def test_losses_that_are_equal_warn_with_an_epsilon(caplog: pytest.LogCaptureFixture) -> None:
    b = toy({0: items(3)}, epsilon=1e-30, local_steps=3)
    b.round(1)
    # cube root of 2^-23, times the weight's 1
    assert (
        "both losses were equal in 3 of 3 steps: epsilon 1e-30 is too small for torch.float32" in caplog.text
    )
    assert "try method.epsilon=0.005" in caplog.text
    caplog.clear()
    toy({0: items(3)}, epsilon=0.005, local_steps=3, noise="gaussian").round(1)
    assert "too small" not in caplog.text
    assert epsilon_to_try(Toy(w=-4.0, dtype=torch.bfloat16), 1e-9) == pytest.approx(4 * (2**-7) ** (1 / 3))
    assert epsilon_to_try(Toy(), 0.1) == pytest.approx(1.0)


def test_a_client_that_lost_its_accumulator_says_so_and_then_gets_it_whole() -> None:
    data = {0: items(3), 1: items(5), 2: items(4)}
    b = toy(data, seeds=4096)
    b.round(1)
    del b.runner.states[1]
    outcome = b.round(2, quorum=1)
    assert "holds no accumulator any more" in outcome.left_out[1] and sorted(outcome.clients) == [0, 2]
    assert b.round(3).left_out == {}


@pytest.mark.parametrize(
    "values",
    [{"epsilon": 0.0}, {"lr": -1.0}, {"noise": "white"}, {"clip": 0.0}, {"groups": 0},
     {"aggregation": "trimmed-mean", "trim": 0.5}],
)  # fmt: skip
def test_settings_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Config(**values)


@pytest.mark.parametrize("name", ["fedkseed", "fedkseed-pro"])
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("seeds", 0, r"method\.seeds: input should be greater than or equal to 1, got 0"),
        ("seeds", 65_537, r"method\.seeds: input should be less than or equal to 65536, got 65537"),
        ("trim", 0.2, "trim has no effect with aggregation: mean; it belongs to trimmed-mean"),
        ("groups", 3, "groups has no effect with aggregation: mean; it belongs to median-of-means"),
    ],
)
def test_settings_are_refused_by_name(name: str, setting: str, value: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config({"method": {"name": name, setting: value}}, "test")


def cohort(examples: dict[int, int]) -> Cohort:
    return Cohort(tuple(sorted(examples)), examples, len(examples))


def folded(fold: Fold, drawn: dict[int, list[tuple[int, float]]], together: Cohort, order: list[int]) -> Any:
    for client in order:
        seeds, scalars = zip(*drawn[client], strict=True)
        reply = Reply(client, Payload(), {}, together)
        fold.add(reply, torch.tensor(seeds), torch.tensor(scalars, dtype=torch.float64))
    return fold.change()


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


CHANGES: dict[str, Any] = {
    "seeds": 32,
    "noise": "gaussian",
    "epsilon": 0.25,
    "lr": 0.125,
    "local_steps": 4,
    "batch_size": 2,
    "perturbations": 2,
    "scalar_limit": 1e-6,
    "clip": 1e-3,
    "aggregation": "median-of-means",
    "trim": 0.4,
    "groups": 2,
    "rounds": 2,
}


@pytest.mark.parametrize("field", sorted(Config.model_fields.keys() - {"name"}))
def test_every_setting_changes_something(field: str) -> None:
    # clients that draw the same seeds, for those settings that need it
    needs = {"trim": "trimmed-mean", "groups": "median-of-means"}
    clients = 3 if field in (*needs, "aggregation") else 1

    def outcome(**change: Any) -> Any:
        values: dict[str, Any] = {
            "seeds": 64 if clients == 1 else 2,
            "local_steps": 3,
            "lr": 0.1,
            "epsilon": 0.01,
            "rounds": 1,
        }
        if field in needs:
            values["aggregation"] = needs[field]
        b = Bench(FedKSeed(Config(**{**values, **change}), seed=0), tiny(), text(clients))
        try:
            for round in range(1, b.method.rounds + 1):
                b.round(round)
        except FederationError:
            return "refused"
        return (
            b.state.accumulator.tolist(),
            b.wire,
            [
                p.detach().flatten()[0].item()
                for _, m in b.method.export(b.state, b.model)
                for p in m.parameters()
            ],
        )

    assert outcome() != outcome(**{field: CHANGES[field]})


PEAKS = """
import json, torch
from test_contract import Federation
from fedtune.core.wire import decode
torch.set_num_threads(1)
peaks = []
for _ in range(2):
    federation = Federation("fedkseed", "hadamard4")
    federation.run()
    peaks.append([decode(reply).meta["peak_bytes"] for reply in federation.transport.replies.values()])
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_a_kernel_that_has_to_be_compiled_first_does_not_change_the_peak(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], env=environment, capture_output=True, text=True, check=True
    )
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first == second
