"""PowerSGD as a local low-rank filter of gradients, with error feedback.

Vogels, Karimireddy and Jaggi (2019), Algorithm 1, with one worker and without its all-reduce:

    M ← G + E,   P ← orthonormal(M Q),   Q ← Mᵀ P (repeated),   Ĝ = P Qᵀ,   E ← M − Ĝ

What a step leaves out is in E and comes with a later one. Q is kept from step to step. Tensors that are no
matrices, or whose factors would not be `min_compression_rate` times smaller, pass as they are. PyTorch's hook
has 2 there, and takes tensors of more dimensions as matrices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtune.methods.fedcybgd.settings import PowerSGD


class GradientFilter:
    """Filters the gradients of one block, step after step; its memory ends with the block.

    Args:
        settings: Rank, iterations and start.
        generator: Draws the first Q.
    """

    def __init__(self, settings: PowerSGD, generator: torch.Generator) -> None:
        self._settings, self._generator = settings, generator
        self._steps = 0
        self.memory: dict[str, dict[str, Tensor]] = {"error": {}, "q": {}}

    def step(self, parameters: Mapping[str, Tensor]) -> None:
        """Replaces `.grad` of each matrix among `parameters` in place."""
        self._steps += 1
        if self._steps <= self._settings.start_step:
            return
        for name, parameter in parameters.items():
            gradient = parameter.grad
            if gradient is not None and gradient.ndim == 2 and self._shrinks(gradient):
                gradient.copy_(self._filtered(name, gradient))

    def _shrinks(self, gradient: Tensor) -> bool:
        rows, columns = gradient.shape
        factors = self._settings.rank * (rows + columns)
        return self._settings.min_compression_rate * factors < rows * columns

    def _filtered(self, name: str, gradient: Tensor) -> Tensor:
        error, q = self.memory["error"].get(name), self.memory["q"].get(name)
        whole = gradient if error is None else gradient + error
        if q is None:
            q = torch.randn(whole.shape[1], self._settings.rank, generator=self._generator).to(whole)
        for _ in range(self._settings.iterations):
            p = torch.linalg.qr(whole @ q).Q
            q = whole.T @ p
        low = p @ q.T
        self.memory["error"][name], self.memory["q"][name] = whole - low, q
        return low
