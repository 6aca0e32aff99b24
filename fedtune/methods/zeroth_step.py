"""The weights of one zeroth-order step: where the ±ε z_j of a client's step come from.

    L(w0 − η Σ_j a_j z_j ± ε z_j; x)        `loss`
    a_j ← a_j + ĝ                           `update`

With `hadamard4` weights are formed from w0 anew in every forward pass and the model is never written. Other
noise is rebuilt once and then moved where the weights lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.models.just_in_time import formed
from fedtune.models.tuning import trainable
from fedtune.zeroth import SeedPool, fast, perturb_all_, rebuild_all_


def coefficients(accumulator: Tensor, lr: float) -> Tensor:
    """−η a, float64 (K)."""
    return accumulator.double() * -lr


class _FromW0:
    """hadamard4: the model is w0 and stays so; each forward pass forms w0 + Σ a_j z_j ± ε z_j in one pass."""

    def __init__(self, model: nn.Module, pool: SeedPool, a: Tensor, lr: float) -> None:
        self._model, self._pool, self._a, self._lr = model, pool, a, lr
        self._update: fast.Update | None = None
        self.held: dict[str, Tensor] = {}  # beside the model: nothing

    def form(self, name: str, w0: Tensor, out: Tensor) -> None:
        assert self._update is not None
        # one thread: PyTorch's own still spin on the other cores after the layer before
        fast.run(self._update.jobs(out, w0, name), threads=1)

    def loss(self, batch: Mapping[str, Tensor], j: int, scale: float) -> float:
        shifted = self._a.clone()
        shifted[j] += scale
        self._update = fast.Update(self._pool, shifted)
        return float(self._model(**batch).loss)

    def update(self, estimates: list[tuple[int, float]]) -> None:
        for j, scalar in estimates:
            self._a[j] -= self._lr * scalar


class _InPlace:
    """Other noise: weights are rebuilt once, then moved by ±ε z_j and −η ĝ z_j where they lie."""

    def __init__(self, model: nn.Module, pool: SeedPool, a: Tensor, lr: float) -> None:
        self._model, self._pool, self._lr = model, pool, lr
        self._parameters = trainable(model)
        self.held = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}  # w0
        rebuild_all_(self._weights(), self.held, pool, a)

    def restore(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self.held[name])

    def loss(self, batch: Mapping[str, Tensor], j: int, scale: float) -> float:
        self._move(j, scale)
        with torch.no_grad():
            value = float(self._model(**batch).loss)
        self._move(j, -scale)
        return value

    def update(self, estimates: list[tuple[int, float]]) -> None:
        for j, scalar in estimates:
            self._move(j, -self._lr * scalar)

    def _move(self, j: int, scale: float) -> None:
        perturb_all_(self._weights(), self._pool, j, scale)

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.data for name, parameter in self._parameters.items()}


@contextmanager
def step_weights(model: nn.Module, pool: SeedPool, accumulator: Tensor, lr: float) -> Iterator[Any]:
    """The local weights of one client; afterwards the model holds w0 again, bit for bit."""
    model.eval()
    a = coefficients(accumulator, lr)
    if pool.noise == "hadamard4":
        weights = _FromW0(model, pool, a, lr)
        with formed(model, lambda name, w0, out: weights.form(name, w0, out)):
            yield weights
        return
    moved = _InPlace(model, pool, a, lr)
    try:
        yield moved
    finally:
        moved.restore()
