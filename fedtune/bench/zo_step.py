"""One zeroth-order step: its time against its two forward passes.

A random Llama of about 110 M parameters and one sequence of 256 tokens. The reference step is the one of
the papers' code: four passes of noise from PyTorch's generator over the weights (+ε, −2ε, +ε, update). A step
of full fine-tuning and of LoRA with AdamW on the same batch stand beside it. Each step is timed in turn with
two forward passes, several times, and the ratio is the median of the pairs: a machine's speed drifts.
`fedtune bench memory` compares their memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.bench.random_model import HIDDEN, LAYERS, random_batch, random_llama
from fedtune.methods.fedkseed.step import step_weights
from fedtune.models.tuning import attach_lora, train_all, trainable
from fedtune.zeroth import SeedPool

REPEATS = 7
EPSILON, LR, SEEDS = 1e-3, 1e-6, 4096


def measure(hidden: int = HIDDEN, layers: int = LAYERS) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of each kind of step, and ratios of its seconds to those of two forward passes."""
    model, batch = random_llama(hidden, layers), random_batch()
    plain = random_llama(hidden, layers)

    def twice() -> None:
        _forward(plain, batch, 2)

    rows = [_row("two forward passes", twice, twice)]
    for noise in ("hadamard4", "rademacher"):
        with step_weights(train_all(model), SeedPool(0, SEEDS, noise), torch.zeros(SEEDS), LR) as weights:

            def step(weights: Any = weights) -> None:
                plus, minus = weights.loss(batch, 7, EPSILON), weights.loss(batch, 7, -EPSILON)
                weights.update([(7, (plus - minus) / (2 * EPSILON))])

            rows.append(_row(f"FedKSeed step, {noise}", step, twice))
    rows.append(_row("reference step, torch.normal", _reference(model, batch), twice))
    rows.append(_row("full fine-tuning, AdamW", _trained(train_all(model), batch), twice))
    lora = attach_lora(random_llama(hidden, layers), rank=16, alpha=32.0, dropout=0.0, targets=None, seed=0)
    rows.append(_row("LoRA, AdamW", _trained(lora, batch), twice))
    return rows, {f"seconds: {row['case']} / two forward passes": row.pop("ratio") for row in rows}


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


def _trained(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _row(case: str, step: Callable[[], None], passes: Callable[[], None]) -> dict[str, Any]:
    step()  # compiles kernels, and makes an optimizer's state
    passes()
    pairs = [(_seconds(step), _seconds(passes)) for _ in range(REPEATS)]
    return {
        "case": case,
        "seconds": statistics.median(seconds for seconds, _ in pairs),
        "ratio": statistics.median(seconds / plain for seconds, plain in pairs),
    }


def _seconds(what: Callable[[], None]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started
