"""Weighted sums of updates that do not depend on the order in which the updates arrive.

Each update is scaled by its weight's share and rounded once to a multiple of 2^-44; integers are summed.
Integer sums are exact, so ten clients give the same bits in any order, one by one or all at once, and
what has been summed so far is usable after every arrival. The rounding is at most 2.9e-14 a client, far
below a float32's own for any weight above 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.core.one_pass import add_rounded, extremes

FRACTION_BITS = 44
LIMIT = 2.0**18  # largest |value| that can be added: shares sum to at most 1, so no sum overflows


@dataclass(frozen=True)
class WeightedSum:
    """Σ n_i·x_i over the updates so far, as integers, and Σ n_i.

    Memory: 8 bytes a parameter, whatever the number of clients; beside them 16 of each number of a tensor
    that has fewer than `one_pass.SMALLEST`.

    Attributes:
        total: Σ n_i over all clients that may come; fixes the scale before the first one does.
        weight: Σ n_i over those that came.
        sums: By tensor name, int64, in units of 2^-44 · total.
    """

    total: int
    weight: int
    sums: dict[str, Tensor]

    @staticmethod
    def empty(total: int) -> WeightedSum:
        """Nothing summed yet. Raises ValueError unless total > 0."""
        if total <= 0:
            raise ValueError(f"weights must sum to more than 0, got {total}: a cohort without examples")
        return WeightedSum(total, 0, {})

    def add(self, update: Mapping[str, Tensor], weight: int) -> WeightedSum:
        """The sum with `weight` · `update` added. The sums are updated in place: use the result only.

        Raises:
            ValueError: A value's size is 2^18 or more, or the weights exceed `total`.
        """
        if weight < 0 or self.weight + weight > self.total:
            raise ValueError(f"weight {weight} does not fit: {self.weight} of {self.total} are taken")
        for name, tensor in update.items():  # before anything is added: a refused update leaves no trace
            low, high = extremes(tensor) if tensor.numel() else (0.0, 0.0)
            if not -LIMIT < low <= high < LIMIT:
                raise ValueError(f"tensor {name} holds values of {LIMIT:,.0f} or more")
        scale = weight / self.total * 2.0**FRACTION_BITS
        for name, tensor in update.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(
                    tensor, dtype=torch.int64, memory_format=torch.contiguous_format
                )
            add_rounded(self.sums[name], tensor, scale)
        return WeightedSum(self.total, self.weight + weight, self.sums)

    def mean(self, name: str) -> Tensor:
        """Σ n_i·x_i / Σ n_i of one tensor, float32.

        Raises:
            ValueError: Nothing was added.
        """
        if not self.weight:
            raise ValueError("no update arrived: there is nothing to average")
        return self.scaled(name, self.total / self.weight)

    def scaled(self, name: str, factor: float = 1.0) -> Tensor:
        """Factor · Σ n_i·x_i / total of one tensor, float32."""
        return self.sums[name].to(torch.float64).mul_(factor * 2.0**-FRACTION_BITS).to(torch.float32)
