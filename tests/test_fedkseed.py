"""FedKSeed against numbers worked out by hand, the paper's byte counts, and equal bits on all sides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close
from toy import Bench, Toy, items
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.core.state import from_payload, to_payload
from fedtune.core.types import Payload
from fedtune.data.encode import Encoded
from fedtune.errors import FederationError, InputError
from fedtune.methods.fedkseed import Config, FedKSeed, ProConfig, State
from fedtune.models.tuning import trainable
from fedtune.zeroth import reference
from fedtune.zeroth.pool import SeedPool

NOISES = ["hadamard4", "rademacher", "gaussian", "binomial32"]


def toy(data: dict[int, list[Encoded]], seed: int = 0, **settings: Any) -> Bench:
    defaults = {"seeds": 8, "local_steps": 1, "lr": 0.25, "epsilon": 2.0**-6}
    return Bench(FedKSeed(Config(**{**defaults, **settings}), seed=seed), Toy(), data)


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
    pool = SeedPool(bench.method._key, bench.method.config.seeds, bench.method.config.noise)
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
    ("config", "bytes_first"),
    [
        # 4 + 4K down, τ·8 up (NOTES, section 2)
        (Config(seeds=4096, local_steps=200), 17_988),
        (ProConfig(seeds=1024, local_steps=200), 9_796),
        (ProConfig(seeds=2048, local_steps=200), 17_988),
    ],
)
def test_payload_is_the_papers_and_less_for_who_was_there_before(config: Config, bytes_first: int) -> None:
    b = Bench(FedKSeed(config, seed=0), Toy(), {0: items(3), 1: items(5)})
    b.round(1)
    for client in (0, 1):
        first = [entry for entry in b.wire if entry["client"] == client]
        assert sum(entry["payload_bytes"] for entry in first) == bytes_first
        framed = sum(entry["framed_bytes"] for entry in first)
        assert framed <= bytes_first + 64 * 2 + 0.02 * bytes_first
    b.wire.clear()
    b.round(2)
    second = sum(entry["payload_bytes"] for entry in b.wire if entry["client"] == 0)
    # at most 2·200 seeds changed, 8 bytes each, against 4 K
    if config.seeds == 4096:
        assert second <= 4 + 2 * 200 * 8 + 1600 < bytes_first
    else:
        assert second <= bytes_first


def test_the_dense_sums_go_up_where_they_are_smaller() -> None:
    b = toy({0: items(3)}, seeds=4, local_steps=20)
    pairs = toy({0: items(3)}, seeds=4096, local_steps=20)
    b.round(1), pairs.round(1)
    assert [e["payload_bytes"] for e in b.wire if e["direction"] == "up"] == [16]
    assert [e["payload_bytes"] for e in pairs.wire if e["direction"] == "up"] == [160]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_client_computes_with_is_the_rebuild_bit_for_bit(dtype: torch.dtype) -> None:
    from fedtune.methods.zeroth_step import _FromW0, step_weights

    b = Bench(FedKSeed(Config(seeds=64, local_steps=25, lr=1e-3, epsilon=1e-3), seed=0), tiny(dtype), text(1))
    kept = replies(b)
    b.round(1)
    drawn = zip(*(kept[0].payload.tensors[name].tolist() for name in ("seeds", "scalars")), strict=True)
    pool = SeedPool(b.method._key, 64, "hadamard4")
    seen: dict[str, torch.Tensor] = {}
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[3, 4, 5]])}
    accumulator = torch.zeros(64, dtype=torch.float64)
    for j, g in drawn:
        accumulator[j] += g
    with step_weights(b.model, pool, accumulator.float(), 1e-3) as weights:
        assert isinstance(weights, _FromW0)
        form = weights.form

        def watched(name: str, w0: torch.Tensor, out: torch.Tensor) -> None:
            form(name, w0, out)
            seen[name] = out.clone()

        weights.form = watched  # type: ignore[method-assign]
        weights.loss(batch, 0, 0.0)
    state = State(b.state.w0, accumulator.float(), b.state.before, b.state.magnitude, b.state.draws)
    for _, exported in b.method.export(state, b.model):
        for name, parameter in trainable(exported).items():
            assert torch.equal(seen[name], parameter.data), name
            assert parameter.dtype == dtype


def test_in_place_noise_and_half_precision_do_not_go_together() -> None:
    with pytest.raises(InputError, match=r"set method\.noise=hadamard4 or model\.dtype=float32"):
        Bench(FedKSeed(Config(noise="rademacher"), seed=0), tiny(torch.bfloat16), text())


def test_probabilities_of_pro() -> None:
    method = FedKSeed(ProConfig(seeds=4), seed=0)
    state = method.init(Toy())
    assert method.probabilities(state).tolist() == [0.25] * 4
    state = State(
        state.w0, state.accumulator, state.before,
        magnitude=torch.tensor([2.0, 12.0, 0.0, 4.0], dtype=torch.float64), draws=torch.tensor([1, 2, 0, 1]),
    )  # fmt: skip
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


def test_other_weights_are_refused_with_both_hashes() -> None:
    b = toy({0: items(3)})
    b.round(1)
    with pytest.raises(InputError, match=rf"{b.state.w0[:16]}, this model has (?!{b.state.w0[:16]})"):
        list(b.method.export(b.state, Toy(w=1.5)))


def test_noise_of_another_version_is_refused() -> None:
    b = toy({0: items(3)})
    b.round(1)
    with pytest.raises(InputError, match=r"noise version 99, this fedtune makes version 1"):
        list(b.method.export(replace(b.state, noise_version=99), b.model))


def test_scalars_beyond_the_limit_and_foreign_seeds_are_refused_and_named() -> None:
    b = toy({0: items(3), 1: items(1000)}, scalar_limit=100.0)
    outcome = b.round(1, quorum=1)
    assert outcome.clients == [0] and "scalars holds values of 100 or more" in outcome.left_out[1]
    for bad in (-1, 8):
        b = toy({0: items(3), 1: items(5)})
        step = b.method.client_step

        def lie(job: Payload, env: Any, step: Any = step, bad: int = bad) -> Any:
            result = step(job, env)
            if env.client == 1:
                result.payload.tensors["seeds"][0] = bad
            return result

        b.method.client_step = lie
        outcome = b.round(1, quorum=1)
        assert outcome.clients == [0] and "seeds holds values" in outcome.left_out[1]


def test_losses_that_are_equal_warn_with_an_epsilon(caplog: pytest.LogCaptureFixture) -> None:
    b = toy({0: items(3)}, epsilon=1e-30)
    b.round(1)
    assert "epsilon 1e-30 is too small for torch.float32 weights; try method.epsilon=1e-29" in caplog.text


def test_a_client_that_lost_its_accumulator_says_so_and_then_gets_it_whole() -> None:
    data = {0: items(3), 1: items(5), 2: items(4)}
    b = toy(data, seeds=4096)
    b.round(1)
    del b.runner.states[1]
    outcome = b.round(2, quorum=1)
    assert "holds no accumulator any more" in outcome.left_out[1] and sorted(outcome.clients) == [0, 2]
    assert b.round(3).left_out == {}


@pytest.mark.parametrize(
    "settings", [{"seeds": 0}, {"seeds": 5000}, {"epsilon": 0.0}, {"lr": -1.0}, {"noise": "white"}]
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Config(**settings)


CHANGES: dict[str, Any] = {
    "seeds": 32,
    "noise": "gaussian",
    "epsilon": 0.25,
    "lr": 0.125,
    "local_steps": 4,
    "batch_size": 2,
    "perturbations": 2,
    "scalar_limit": 1e-6,
    "rounds": 2,
}


@pytest.mark.parametrize("field", sorted(Config.model_fields.keys() - {"name"}))
def test_every_setting_changes_something(field: str) -> None:
    def outcome(**change: Any) -> Any:
        settings = {"seeds": 64, "local_steps": 3, "lr": 0.1, "epsilon": 0.01, "rounds": 1, **change}
        b = Bench(FedKSeed(Config(**settings), seed=0), tiny(), text(1))
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
