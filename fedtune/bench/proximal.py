"""FedBiOT's proximal term with its gradient: from products of the rank's size, against the dense product.

One linear layer with LoRA after it has moved. Memory is the peak of live tensor bytes, with the factors and
their gradients; seconds are of the two ways in turn, and the ratio is the median of the pairs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedtune.measure.memory import MemoryMeter
from fedtune.models.proximal import moved_squared

WIDTH, RANK, REPEATS = 4096, 8, 7


def measure(width: int = WIDTH, rank: int = RANK) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each way, and the ratios of the dense one to the other."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    a0, b0 = drawn(rank, width, scale=width**-0.5), drawn(width, rank, scale=width**-0.5)
    a = (a0 + drawn(rank, width, scale=1e-3)).requires_grad_()
    b = (b0 + drawn(width, rank, scale=1e-3)).requires_grad_()

    def dense() -> Tensor:
        return (2.0 * (b @ a - b0 @ a0)).square().sum()

    def algebraic() -> Tensor:
        return moved_squared(a, b, a0, b0, 2.0)

    def seconds(term: Callable[[], Tensor]) -> float:
        a.grad = b.grad = None
        started = time.perf_counter()
        term().backward()
        return time.perf_counter() - started

    ways = {"dense product": dense, "algebraic": algebraic}
    rows: list[dict[str, Any]] = []
    for case, term in ways.items():
        seconds(term)  # libraries take their time once
        a.grad = b.grad = None
        meter = MemoryMeter("cpu")
        with meter.whole([a, b, a0, b0]):
            value = term()
            value.backward()
        rows.append({"case": case, "value": float(value.detach()), "peak_bytes": meter.peak_bytes})
    pairs = [[seconds(term) for term in ways.values()] for _ in range(REPEATS)]
    for row, each in zip(rows, zip(*pairs, strict=True), strict=True):
        row["seconds"] = statistics.median(each)
    return rows, {
        "peak_bytes: dense product / algebraic": rows[0]["peak_bytes"] / rows[1]["peak_bytes"],
        "seconds: dense product / algebraic": statistics.median(slow / fast for slow, fast in pairs),
    }
