"""One zeroth-order step: its time against its two forward passes, its memory against inference.

A random Llama of about 110 M parameters and one sequence of 256 tokens. The reference step is the one of
the papers' code: four passes of noise from PyTorch's generator over the weights (+ε, −2ε, +ε, update). Full
fine-tuning and LoRA take one AdamW step on the same batch, for their memory. Each step is timed in turn with
two forward passes, several times, and the ratio is the median of the pairs: a machine's speed drifts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.measure.memory import MemoryMeter
from fedtune.methods.zeroth_step import step_weights
from fedtune.models.load import seeded
from fedtune.models.tuning import attach_lora, train_all, trainable
from fedtune.zeroth import SeedPool

TOKENS = 256
REPEATS = 7
EPSILON, LR, SEEDS = 1e-3, 1e-6, 4096


def measure(hidden: int = 768, layers: int = 12) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of each kind of step, and ratios of seconds and of peak memory to inference."""
    model = _model(hidden, layers)
    batch = _batch()

    def twice() -> None:
        _forward(model, batch, 2)

    rows = [_row("two forward passes", twice, twice, model)]
    for noise in ("hadamard4", "rademacher"):
        with step_weights(train_all(model), SeedPool(0, SEEDS, noise), torch.zeros(SEEDS), LR) as weights:

            def step(weights: Any = weights) -> None:
                plus, minus = weights.loss(batch, 7, EPSILON), weights.loss(batch, 7, -EPSILON)
                weights.update([(7, (plus - minus) / (2 * EPSILON))])

            # the plain passes must not see formed weights, so they run on a model of their own
            rows.append(
                _row(f"FedKSeed step, {noise}", step, _plain(hidden, layers, batch), model, weights.held)
            )
    rows.append(_row("reference step, torch.normal", _reference(model, batch), twice, model))
    rows.append(_trained("full fine-tuning, AdamW", train_all(model), batch))
    lora = attach_lora(_model(hidden, layers), rank=16, alpha=32.0, dropout=0.0, targets=None, seed=0)
    rows.append(_trained("LoRA, AdamW", lora, batch))
    inference = rows[0]["peak_bytes"]
    ratios = {f"seconds: {row['case']} / two forward passes": row.pop("ratio") for row in rows}
    ratios |= {f"peak_bytes: {row['case']} / inference": row["peak_bytes"] / inference for row in rows}
    return rows, ratios


def _plain(hidden: int, layers: int, batch: dict[str, Tensor]) -> Callable[[], None]:
    model = _model(hidden, layers)
    return lambda: _forward(model, batch, 2)


def _model(hidden: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
    )
    with seeded(0):
        return LlamaForCausalLM(config).eval()


def _batch() -> dict[str, Tensor]:
    tokens = torch.randint(32000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


@torch.no_grad()
def _forward(model: nn.Module, batch: dict[str, Tensor], times: int) -> None:
    for _ in range(times):
        float(model(**batch).loss)


def _reference(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    parameters = list(trainable(model).values())

    @torch.no_grad()
    def move(scale: float) -> None:
        generator = torch.Generator().manual_seed(7)
        for parameter in parameters:
            z = torch.normal(0.0, 1.0, parameter.shape, generator=generator)
            parameter.data.add_(z, alpha=scale)

    @torch.no_grad()
    def step() -> None:
        move(EPSILON)
        plus = float(model(**batch).loss)
        move(-2 * EPSILON)
        minus = float(model(**batch).loss)
        move(EPSILON)
        move(-LR * (plus - minus) / (2 * EPSILON))

    return step


def _trained(case: str, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _row(case, step, lambda: _forward(model, batch, 2), model, optimizer)


def _row(case: str, step: Callable[[], None], passes: Callable[[], None], *resident: Any) -> dict[str, Any]:
    step()  # compiles kernels, and makes an optimiser's state
    passes()
    pairs = [(_seconds(step), _seconds(passes)) for _ in range(REPEATS)]
    meter = MemoryMeter("cpu")
    with meter.whole(resident=resident):
        step()
    return {
        "case": case,
        "seconds": statistics.median(seconds for seconds, _ in pairs),
        "peak_bytes": meter.peak_bytes,
        "ratio": statistics.median(seconds / plain for seconds, plain in pairs),
    }


def _seconds(what: Callable[[], None]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started
