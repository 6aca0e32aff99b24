"""Noise over tensors by name, on the device they are on: one at a time, or all of a model's.

Each operation is one pass over the weights, straight from w0, so nothing drifts. A mapping's tensors are
matched by canonical name (`fedtune.zeroth.pool.canonical_name`), never by position. Tied tensors are
written once; tensors that are no floating-point numbers, and parameters that do not require gradients, are
left alone.

Tensors in the CPU's memory and arrays go to `fedtune.zeroth.fast`, those on a GPU to `fedtune.zeroth.gpu`.
Both give the same bits, so one model may lie on several devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import pairwise
from threading import Lock
from typing import TypeGuard

import numpy as np
import torch
from torch import nn

from fedtune.errors import InputError
from fedtune.zeroth import fast, gpu, reference, subspace
from fedtune.zeroth.fast import Weights
from fedtune.zeroth.pool import SHAPED, SeedPool, canonical_name


class Prepared:
    """Σ_j a_j z_j of one pool, prepared once to be added to any number of tensors on any device.

    Several threads may write different tensors, or different shards of one, at the same time.

    Args:
        pool: The pool.
        a: K coefficients, float64: already −η times the accumulator.

    Raises:
        InputError: `a` is not K finite numbers.
    """

    def __init__(self, pool: SeedPool, a: object) -> None:
        self.pool = pool
        self._a = _coefficients(pool, a)
        self._lock = Lock()  # of the preparation: the first thread makes it, the others wait

    def write(
        self, w: Weights, w0: Weights, name: str, *, first: int = 0, threads: int | None = None
    ) -> None:
        """Writes cast(float32(w0) + Σ_j a_j z_j) into w.

        On a GPU this is one launch on the current stream, in order with PyTorch's own.

        Args:
            w: A contiguous tensor (or array) of float32, float16 or bfloat16, of any shape; may be w0.
            w0: The initial weights, of the same size and dtype and on the same device.
            name: The tensor's name, which its noise depends on.
            first: Where w begins in the flattened tensor, if it is a shard of it.
            threads: How many threads share the work on a CPU; PyTorch's setting by default.

        Raises:
            InputError: The tensors do not match, or cannot be written where they are.
        """
        self._write([(w, w0, name)], first, threads)

    def _write(
        self, tensors: Iterable[tuple[Weights, Weights, str]], first: int, threads: int | None
    ) -> None:
        jobs: list[fast.Job] = []
        launches: list[fast.Job] = []
        for w, w0, name in tensors:
            if _device(w) != _device(w0):
                raise InputError(
                    f"{name}: w and w0 must be on one device, got {_device(w)} and {_device(w0)}"
                )
            if on_gpu(w) and on_gpu(w0):
                if self.pool.noise in SHAPED:
                    raise InputError(
                        f"{name} is on {_device(w)}, and {self.pool.noise} noise is made on a CPU: take "
                        "noise hadamard4, or keep the weights on the CPU (model.device=cpu)"
                    )
                with self._lock:
                    launches += self._gpu.jobs(w, w0, name, first=first)  # uploads, once to each device
            else:
                with self._lock:
                    update = self._cpu
                jobs += update.jobs(w, w0, name, first=first)
        # Everything has been checked before the first weight is written.
        fast.run(jobs, threads)
        for launch in launches:  # in this thread: its current stream is the caller's
            launch()

    @cached_property
    def _cpu(self) -> fast.Update | subspace.Update:
        kind = subspace.Update if self.pool.noise in SHAPED else fast.Update
        return kind(self.pool, self._a)

    @cached_property
    def _gpu(self) -> gpu.Update:
        return gpu.Update(self.pool, self._a)


def perturb_(
    w: Weights, pool: SeedPool, name: str, j: int, scale: float, *, first: int = 0, threads: int | None = None
) -> None:
    """Adds scale · z_j to w in place.

    Args:
        w: A contiguous tensor or array of float32, float16 or bfloat16, on a CPU or GPU; of any shape.
        pool: The pool.
        name: The tensor's name.
        j: The seed's index.
        scale: For instance ε.
        first: Where w begins in the flattened tensor, if it is a shard of it.
        threads: How many threads share the work on a CPU (PyTorch's setting by default); the bits do not
            depend on it.

    Raises:
        InputError: j is not in the pool, the scale is not finite, or w cannot be written.
    """
    Prepared(pool, _plus(pool, None, j, scale)).write(w, w, name, first=first, threads=threads)


def rebuild_(
    w: Weights,
    w0: Weights,
    pool: SeedPool,
    name: str,
    a: object,
    *,
    first: int = 0,
    threads: int | None = None,
) -> None:
    """Writes cast(float32(w0) + Σ_j a_j z_j) into w, which may be w0.

    `a` is −η times the accumulator, K numbers in float64.

    Raises:
        InputError: `a` is not K finite numbers, or w and w0 do not match or cannot be written.
    """
    Prepared(pool, a).write(w, w0, name, first=first, threads=threads)


def rebuild_perturbed_(
    w: Weights,
    w0: Weights,
    pool: SeedPool,
    name: str,
    a: object,
    j: int,
    scale: float,
    *,
    first: int = 0,
    threads: int | None = None,
) -> None:
    """Writes cast(float32(w0) + Σ_j a_j z_j + scale · z_j) into w: `scale` is added to the coefficient of j.

    Raises:
        InputError: As `rebuild_` and `perturb_`.
    """
    Prepared(pool, _plus(pool, a, j, scale)).write(w, w0, name, first=first, threads=threads)


def perturb_all_(
    weights: Mapping[str, Weights], pool: SeedPool, j: int, scale: float, *, threads: int | None = None
) -> None:
    """`perturb_` of every tensor of a model."""
    _all(weights, weights, Prepared(pool, _plus(pool, None, j, scale)), threads)


def rebuild_all_(
    weights: Mapping[str, Weights],
    initial: Mapping[str, Weights],
    pool: SeedPool,
    a: object,
    *,
    threads: int | None = None,
) -> None:
    """`rebuild_` of every tensor of a model from its initial weights, which may be the same tensors."""
    _all(weights, initial, Prepared(pool, a), threads)


def rebuild_perturbed_all_(
    weights: Mapping[str, Weights],
    initial: Mapping[str, Weights],
    pool: SeedPool,
    a: object,
    j: int,
    scale: float,
    *,
    threads: int | None = None,
) -> None:
    """`rebuild_perturbed_` of every tensor of a model from its initial weights."""
    _all(weights, initial, Prepared(pool, _plus(pool, a, j, scale)), threads)


def perturbed_names(weights: Mapping[str, Weights]) -> dict[str, Weights]:
    """The tensors that take noise by canonical name, sorted; tied ones once, under the first of their names.

    Give all names of a tied tensor or always the same one of them: its noise follows from the name it is
    given here.

    Raises:
        InputError: Two tensors share a canonical name, or share memory without being the same.
    """
    chosen: dict[str, Weights] = {}
    spans: dict[tuple[str, int, int], str] = {}  # device, first byte, end
    for name, w in sorted(weights.items(), key=lambda pair: canonical_name(pair[0])):
        if isinstance(w, nn.Parameter) and not w.requires_grad:
            continue
        if not (
            w.is_floating_point() if isinstance(w, torch.Tensor) else np.issubdtype(w.dtype, np.floating)
        ):
            continue
        canonical, row = canonical_name(name), gpu.flat(w, name) if on_gpu(w) else fast.flat(w, name)
        span = (str(row.device), row.data_ptr(), row.data_ptr() + row.nbytes)
        if row.numel() and span in spans:
            continue
        if canonical in chosen:
            raise InputError(f"two tensors are called {canonical!r} once wrappers are left out: rename one")
        chosen[canonical] = w
        if row.numel():
            spans[span] = canonical
    ordered = sorted(spans)
    for one, two in pairwise(ordered):
        if one[0] == two[0] and two[1] < one[2]:
            raise InputError(
                f"{spans[one]!r} and {spans[two]!r} share a part of their memory: pass one of them"
            )
    return chosen


def _all(
    weights: Mapping[str, Weights], initial: Mapping[str, Weights], prepared: Prepared, threads: int | None
) -> None:
    origin = {canonical_name(name): w0 for name, w0 in initial.items()}
    chosen = perturbed_names(weights)
    missing = [name for name in chosen if name not in origin]
    if missing:
        raise InputError(f"no initial weights for {missing[0]!r} ({len(missing)} tensors are missing)")
    prepared._write([(w, origin[name], name) for name, w in chosen.items()], 0, threads)


def _plus(pool: SeedPool, a: object | None, j: int, scale: float) -> reference.F64:
    vector = np.zeros(pool.size) if a is None else _coefficients(pool, a)
    vector[pool.check_seed(j)] += scale
    return vector


def _coefficients(pool: SeedPool, a: object) -> reference.F64:
    """A copy of its own, from whichever device."""
    return reference.coefficients(pool, a.detach().cpu() if isinstance(a, torch.Tensor) else a).copy()


def _device(w: Weights) -> torch.device:
    return w.device if isinstance(w, torch.Tensor) else torch.device("cpu")


def on_gpu(w: Weights) -> TypeGuard[torch.Tensor]:
    """Whether the Triton kernels are for it."""
    return _device(w).type == "cuda"
