"""One zeroth-order step: its time against its two forward passes, by dtype.

A random Llama of about 110 M parameters, a wider one of about 260 M, and one sequence of 256 tokens. A step
in half precision is held against forward passes of the same model in the same dtype. The reference step is
the one of the papers' code: four passes of noise from PyTorch's generator over the weights (+ε, −2ε, +ε,
update). A step of full fine-tuning and of LoRA with AdamW on the same batch stand beside it. Each step is
timed in turn with two forward passes, several times, and the ratio is the median of the pairs: a machine's
speed drifts. Where other programs take turns with this one, the CPU seconds of one thread are what to
compare. `fedtune bench memory` compares their memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.bench import DTYPES
from fedtune.bench.random_model import HIDDEN, LAYERS, random_batch, random_llama
from fedtune.bench.seconds import seconds
from fedtune.methods.fedkseed.step import step_weights
from fedtune.models.lora import attach_lora
from fedtune.models.tuning import train_all, trainable
from fedtune.zeroth import SeedPool
from fedtune.zeroth.pool import Noise

REPEATS = 7
WIDE = 2048, 4  # width and layers
EPSILON, LR, SEEDS = 1e-3, 1e-6, 4096


def measure(
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    *,
    wide: tuple[int, int] | None = WIDE,
    dtypes: tuple[str, ...] = DTYPES,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of each kind of step, and ratios of its seconds to those of two forward passes.

    Args:
        hidden: Width of the model that every kind of step is measured on.
        layers: Its layers.
        wide: Width and layers of a second one, for FedKSeed's steps alone; None leaves it out.
        dtypes: In which FedKSeed's steps are measured, of `fedtune.bench.DTYPES`.
    """
    rows = []
    for width, depth in ((hidden, layers), *([wide] if wide else [])):
        for dtype in (getattr(torch, name) for name in dtypes):
            model, plain = random_llama(width, depth), random_llama(width, depth)
            for each in (model, plain):
                nn.Module.to(each, dtype)
            # In half precision a step takes the sum over other noise in every pass: minutes.
            others: tuple[Noise, ...] = ("rademacher",) if dtype == torch.float32 else ()
            kinds: tuple[Noise, ...] = ("hadamard4", *others)
            rows += zeroth_steps(train_all(model), plain, random_batch(), kinds)
    model, batch, plain = random_llama(hidden, layers), random_batch(), random_llama(hidden, layers)

    def twice() -> None:
        _forward(plain, batch, 2)

    of = (plain, twice)
    rows.append(_row("reference step, torch.normal", reference_step(train_all(model), batch), *of))
    rows.append(_row("full fine-tuning, AdamW", _trained(model, batch), *of))
    lora = attach_lora(random_llama(hidden, layers), rank=16, alpha=32.0, dropout=0.0, targets=None, seed=0)
    rows.append(_row("LoRA, AdamW", _trained(lora, batch), *of))
    return rows, step_ratios(rows)


def step_ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ratios to two forward passes, taken out of their rows."""
    ratios = {}
    for row in rows:
        of = f"{row['case']} / two forward passes, {row['parameters']:,} parameters, {row['dtype']}"
        ratios[f"seconds: {of}"], ratios[f"CPU seconds: {of}"] = row.pop("ratios")
    return ratios


def zeroth_steps(
    model: nn.Module, plain: nn.Module, batch: dict[str, Tensor], kinds: tuple[Noise, ...]
) -> list[dict[str, Any]]:
    """Two forward passes, and FedKSeed's steps of the same shape and dtype, on the batch's device.

    Args:
        model: Whose weights the steps move.
        plain: The same model once more, for the passes.
        batch: Of both.
        kinds: Of noise.
    """

    def twice() -> None:
        _forward(plain, batch, 2)

    rows = [_row("two forward passes", twice, plain, twice)]
    for noise in kinds:
        with step_weights(model, SeedPool(0, SEEDS, noise), torch.zeros(SEEDS), LR) as weights:

            def step(weights: Any = weights) -> None:
                plus, minus = weights.loss(batch, 7, EPSILON), weights.loss(batch, 7, -EPSILON)
                weights.update([(7, (plus - minus) / (2 * EPSILON))])

            rows.append(_row(f"FedKSeed step, {noise}", step, plain, twice))
    return rows


@torch.no_grad()
def _forward(model: nn.Module, batch: dict[str, Tensor], times: int) -> None:
    for _ in range(times):
        float(model(**batch).loss)


def reference_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """The step of the papers' code: four passes of noise from PyTorch's generator of the weights' device."""
    parameters = list(trainable(model).values())

    @torch.no_grad()
    def move(scale: float) -> None:
        generator = torch.Generator(parameters[0].device).manual_seed(7)
        for parameter in parameters:
            z = torch.normal(
                0.0,
                1.0,
                parameter.shape,
                generator=generator,
                dtype=parameter.dtype,
                device=parameter.device,
            )
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


def _row(case: str, step: Callable[[], None], plain: nn.Module, passes: Callable[[], None]) -> dict[str, Any]:
    first = next(plain.parameters())
    step()  # compiles kernels, and makes an optimizer's state
    passes()
    pairs = [(seconds(step, first.device), seconds(passes, first.device)) for _ in range(REPEATS)]
    return {
        "case": case,
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
        "dtype": str(first.dtype).removeprefix("torch."),
        "seconds": statistics.median(one[0] for one, _ in pairs),
        "CPU seconds": statistics.median(one[1] for one, _ in pairs),
        "ratios": tuple(statistics.median(one[i] / two[i] for one, two in pairs) for i in range(2)),
    }
