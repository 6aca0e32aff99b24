"""The weights of a zeroth-order step: the bits of the rebuild, and a model that is w0 again afterwards."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import Toy
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.bench.memory import CASES, measure_case
from fedtune.errors import InputError
from fedtune.measure.memory import MemoryMeter
from fedtune.methods.fedkseed import step as zeroth_step
from fedtune.methods.fedkseed.step import coefficients, step_weights
from fedtune.models import just_in_time
from fedtune.models.tuning import train_all, trainable
from fedtune.zeroth import KINDS, SeedPool, rebuild_all_, reference

SEEDS, LR = 64, 1e-3
BATCH = {"input_ids": torch.tensor([[3, 4, 5, 4]]), "labels": torch.tensor([[3, 4, 5, 4]])}


def tiny(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape, tie_word_embeddings=True))
    return train_all(model.to(dtype).eval())


def accumulator() -> Tensor:
    return torch.randn(SEEDS, generator=torch.Generator().manual_seed(4))


def rebuilt(model: LlamaForCausalLM, pool: SeedPool, a: Any) -> LlamaForCausalLM:
    other = copy.deepcopy(model)
    weights = {name: p.data for name, p in trainable(other).items()}
    rebuild_all_(weights, weights, pool, a)
    return other


ANEW = [
    ("hadamard4", torch.float32),
    *((kind, torch.bfloat16) for kind in KINDS),
    ("gaussian", torch.float16),
]


@pytest.mark.parametrize(("noise", "dtype"), ANEW)
@pytest.mark.parametrize("chunk", [1 << 8, 1 << 21])
def test_what_a_client_computes_with_is_the_rebuild_bit_for_bit(
    noise: Any, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(just_in_time, "CHUNK", {"cpu": chunk})
    monkeypatch.setattr(just_in_time, "GAP", {"cpu": 0})
    model, pool = tiny(dtype), SeedPool(3, SEEDS, noise)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = {name: torch.full_like(p, torch.nan).view(-1) for name, p in before.items()}
    write = zeroth_step.Prepared.write

    def watched(self: Any, out: Tensor, w0: Tensor, name: str, *, first: int, threads: int) -> None:
        write(self, out, w0, name, first=first, threads=threads)
        seen[name][first : first + out.numel()] = out.view(-1)

    monkeypatch.setattr(zeroth_step.Prepared, "write", watched)
    a = coefficients(accumulator(), LR)
    with step_weights(model, pool, accumulator(), LR) as weights:
        for j, g in ((5, 2.0), (9, -1.0), (5, 0.5)):
            weights.update([(j, g)])
            a[j] -= LR * g
        found = weights.loss(BATCH, 7, 1e-2)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    a[7] += 1e-2
    other = rebuilt(model, pool, a)
    for name, parameter in trainable(other).items():
        assert torch.equal(seen[name], parameter.data.view(-1)), name
        assert not torch.equal(parameter.data, before[name])
    with torch.no_grad():
        assert found == pytest.approx(
            float(other(**BATCH).loss), rel=1e-5 if dtype == torch.float32 else 0.02
        )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("noise", [kind for kind in KINDS if kind != "hadamard4"])
def test_float32_weights_move_where_they_lie_and_come_back(noise: Any) -> None:
    model, pool = tiny(), SeedPool(3, SEEDS, noise)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    a = coefficients(accumulator(), LR)
    with step_weights(model, pool, accumulator(), LR) as weights:
        for name, parameter in trainable(rebuilt_from(before, pool, a)).items():
            assert torch.equal(trainable(model)[name], parameter)
        weights.update([(5, 2.0)])
        a[5] -= LR * 2.0
        found = weights.loss(BATCH, 7, 1e-2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    a[7] += 1e-2
    with torch.no_grad():
        assert found == pytest.approx(float(rebuilt(model, pool, a)(**BATCH).loss), rel=1e-5)


def rebuilt_from(w0: dict[str, Tensor], pool: SeedPool, a: Any) -> LlamaForCausalLM:
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(w0[name])
    return rebuilt(model, pool, a)


@pytest.mark.parametrize("noise", KINDS)
def test_a_step_by_hand(noise: Any) -> None:
    pool, model = SeedPool(1, 8, noise), train_all(Toy())
    z = float(reference.z(pool, "w", 1, 2)[0])
    batch = {
        "input_ids": torch.tensor([[3]]),
        "attention_mask": torch.tensor([[1]]),
        "labels": torch.tensor([[3]]),
    }
    with step_weights(model, pool, torch.zeros(8), 0.5) as weights:
        assert weights.loss(batch, 2, 0.25) == pytest.approx((1 + 0.25 * z - 3) ** 2 / 2)
        weights.update([(2, 4.0)])
        assert weights.loss(batch, 2, 0.0) == pytest.approx((1 - 0.5 * 4 * z - 3) ** 2 / 2)
    assert model.w.tolist() == [1.0]


def test_an_error_in_a_step_leaves_w0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for noise in ("hadamard4", "rademacher"):
        model = train_all(Toy())
        with (
            pytest.raises(InputError, match="mine"),
            step_weights(model, SeedPool(1, SEEDS, noise), accumulator(), 0.5),  # type: ignore[arg-type]
        ):
            raise InputError("mine")
        assert model.w.tolist() == [1.0] and list(tmp_path.iterdir()) == []


def test_no_disk_for_w0_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    model = train_all(Toy())
    with (
        pytest.raises(InputError, match="64 bytes"),
        step_weights(model, SeedPool(1, SEEDS, "gaussian"), accumulator(), 0.5),
    ):
        pass
    assert model.w.tolist() == [1.0]


@pytest.mark.parametrize("noise", ["hadamard4", "rademacher"])
def test_a_step_needs_hardly_more_memory_than_inference(noise: Any) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = train_all(
        LlamaForCausalLM(LlamaConfig(vocab_size=16000, **shape, tie_word_embeddings=True)).eval()
    )
    tokens = torch.randint(16000, (1, 64), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}
    inference, step = MemoryMeter("cpu"), MemoryMeter("cpu")
    with torch.no_grad(), inference.whole([model]):
        float(model(**batch).loss)
    pool = SeedPool(0, SEEDS, noise)
    with step_weights(model, pool, torch.zeros(SEEDS), LR) as weights, step.whole([model]):
        weights.loss(batch, 7, 1e-3)
        weights.update([(7, 1.0)])
    assert step.peak_bytes <= 1.05 * inference.peak_bytes


@pytest.mark.parametrize("case", CASES)
def test_bench_memory_measures_every_case(case: str) -> None:
    row = measure_case(case, 64, 1)
    assert row["case"] == case
    # with a gradient and two moments for each weight, four times the weights; 32000 rows are most of them
    times = 4 if case.startswith("full") else 1
    assert row["peak_bytes"] > times * 32000 * 64 * 4


def test_coefficients_are_minus_eta_a_in_double_precision() -> None:
    found = coefficients(torch.tensor([0.1, -2.0]), 3e-7)
    assert found.dtype == torch.float64
    assert np.array_equal(found.numpy(), np.float64(np.float32([0.1, -2.0])) * -3e-7)
