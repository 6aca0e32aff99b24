"""The weights of one zeroth-order step: where the ±ε z_j of a client's step come from.

    L(w0 − η Σ_j a_j z_j ± ε z_j; x)        `loss`
    a_j ← a_j + ĝ                           `update`

With `hadamard4` weights are formed from w0 anew in every forward pass, and the model is never written. A sum
of other noise costs time for each seed in use, so they are rebuilt once and then moved where they lie; except
in half precision, which would lose what is added: there they are formed anew, however long that takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from fedtune.errors import InputError
from fedtune.models.just_in_time import JustInTimeWeights
from fedtune.models.lean_loss import batch_loss
from fedtune.models.on_disk import kept_on_disk
from fedtune.models.tuning import trainable
from fedtune.zeroth import SHAPED, SeedPool, perturb_all_, rebuild_all_
from fedtune.zeroth.pool import Noise
from fedtune.zeroth.tensors import Prepared


class StepWeights(Protocol):
    """The weights w that a client's steps move."""

    def loss(self, batch: Mapping[str, Tensor], j: int, scale: float, labels: Tensor | None = None) -> float:
        """L(w + scale · z_j; x); w is as before afterwards. `labels`: as of `batch_loss`."""

    def update(self, estimates: list[tuple[int, float]]) -> None:
        """W ← w − η Σ ĝ z_j over pairs (j, ĝ)."""


def refuse_narrow(parameters: Mapping[str, nn.Parameter], what: str, other: str) -> None:
    """Raises InputError unless all are float32; `other` is what to use where they are not."""
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise InputError(
                f"{what} moves weights step by step, which {parameter.dtype} ({name}) cannot hold; set "
                f"model.dtype=float32, or use {other}"
            )


def refuse_on_a_gpu(parameters: Mapping[str, nn.Parameter], noise: Noise) -> None:
    """Raises InputError for noise that is made on a CPU alone, of weights that are not there."""
    elsewhere = [str(p.device) for p in parameters.values() if p.device.type == "cuda"]
    if noise in SHAPED and elsewhere:
        raise InputError(
            f"noise: {noise} is made on a CPU, and the model is on {elsewhere[0]}; set model.device=cpu, or "
            "noise: hadamard4"
        )


def coefficients(accumulator: Tensor, lr: float) -> Tensor:
    """−η a, float64 (K)."""
    return accumulator.double() * -lr


@cache
def _compile(noise: Noise, dtype: torch.dtype, device: torch.device, size: int) -> None:
    """Compiles a kind's kernel for weights of one dtype before any step is measured.

    In the middle of one the compiler would keep that step's tensors alive for a while, and its peak would be
    another than that of the same step in a process that has the kernel.
    """
    perturb_all_({"w": torch.zeros(size, dtype=dtype, device=device)}, SeedPool(0, 64, noise), 0, 1.0)


def _alike(parameter: nn.Parameter) -> int:
    """The least size that takes the same kernel: on a GPU there is another where 16 divides the size."""
    size = parameter.numel()
    return 1 if parameter.device.type == "cpu" else min(size, 16 + min(size % 16, 1))


class _FromW0:
    """The model is w0 and stays so; each forward pass forms w0 + Σ a_j z_j ± ε z_j, a piece at a time."""

    def __init__(self, model: nn.Module, pool: SeedPool, a: Tensor, lr: float) -> None:
        self._model, self._pool, self._a, self._lr = model, pool, a, lr
        self._formed = JustInTimeWeights(trainable(model), self._form)
        self._prepared: Prepared | None = None

    def loss(self, batch: Mapping[str, Tensor], j: int, scale: float, labels: Tensor | None = None) -> float:
        shifted = self._a.clone()
        shifted[j] += scale
        self._prepared = Prepared(self._pool, shifted)
        with torch.no_grad(), self._formed:
            return float(batch_loss(self._model, batch, whole=True, labels=labels))

    def update(self, estimates: list[tuple[int, float]]) -> None:
        for j, scalar in estimates:
            self._a[j] -= self._lr * scalar

    def _form(self, name: str, w0: Tensor, out: Tensor, first: int) -> None:
        assert self._prepared is not None
        self._prepared.write(out, w0, name, first=first, threads=1)


class _InPlace:
    """Weights are rebuilt once, then moved by ±ε z_j and −η ĝ z_j where they lie."""

    def __init__(self, model: nn.Module, pool: SeedPool, a: Tensor, lr: float) -> None:
        self._model, self._pool, self._lr = model, pool, lr
        self._weights = {name: parameter.data for name, parameter in trainable(model).items()}
        rebuild_all_(self._weights, self._weights, pool, a)

    def loss(self, batch: Mapping[str, Tensor], j: int, scale: float, labels: Tensor | None = None) -> float:
        self._move(j, scale)
        with torch.no_grad():
            value = float(batch_loss(self._model, batch, labels=labels))
        self._move(j, -scale)
        return value

    def update(self, estimates: list[tuple[int, float]]) -> None:
        for j, scalar in estimates:
            self._move(j, -self._lr * scalar)

    def _move(self, j: int, scale: float) -> None:
        perturb_all_(self._weights, self._pool, j, scale)


@contextmanager
def step_weights(model: nn.Module, pool: SeedPool, accumulator: Tensor, lr: float) -> Iterator[StepWeights]:
    """The local weights of one client, for as long as its steps last.

    Args:
        model: Holds w0, and afterwards holds it again, bit for bit; put in evaluation mode.
        pool: The shared seeds.
        accumulator: a, float (K); the client's weights begin as w0 − η Σ_j a_j z_j.
        lr: η.

    Raises:
        InputError: The temporary file that keeps w0 while it is changed cannot be written.
    """
    model.eval()
    a, parameters = coefficients(accumulator, lr), trainable(model)
    for dtype, device, size in {(p.dtype, p.device, _alike(p)) for p in parameters.values()}:
        _compile(pool.noise, dtype, device, size)
    if pool.noise == "hadamard4" or any(p.dtype != torch.float32 for p in parameters.values()):
        yield _FromW0(model, pool, a, lr)
        return
    with kept_on_disk(parameters):
        yield _InPlace(model, pool, a, lr)
