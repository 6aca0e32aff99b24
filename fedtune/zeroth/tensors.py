"""Noise over tensors by name: one at a time, or all of a model's.

Each operation is one pass over the weights, straight from w0, so nothing drifts. A mapping's tensors are
matched by canonical name (`fedtune.zeroth.pool.canonical_name`), never by position. Tied tensors are
written once; tensors that are no floating-point numbers, and parameters that do not require gradients, are
left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from fedtune.errors import InputError
from fedtune.zeroth import reference
from fedtune.zeroth.fast import Update, Weights, flat, run
from fedtune.zeroth.pool import SeedPool, canonical_name


def perturb_(
    w: Weights, pool: SeedPool, name: str, j: int, scale: float, *, first: int = 0, threads: int | None = None
) -> None:
    """Adds scale · z_j to w in place.

    Args:
        w: A contiguous CPU tensor or array of float32, float16 or bfloat16; of any shape.
        pool: The pool.
        name: The tensor's name.
        j: The seed's index.
        scale: For instance ε.
        first: Where w begins in the flattened tensor, if it is a shard of it.
        threads: How many threads share the work (PyTorch's setting by default); the bits do not depend on it.

    Raises:
        InputError: j is not in the pool, the scale is not finite, or w cannot be written.
    """
    run(Update(pool, _plus(pool, None, j, scale)).jobs(w, w, name, first=first), threads)


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
    run(Update(pool, a).jobs(w, w0, name, first=first), threads)


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
    run(Update(pool, _plus(pool, a, j, scale)).jobs(w, w0, name, first=first), threads)


def perturb_all_(
    weights: Mapping[str, Weights], pool: SeedPool, j: int, scale: float, *, threads: int | None = None
) -> None:
    """`perturb_` of every tensor of a model."""
    _all(weights, weights, Update(pool, _plus(pool, None, j, scale)), threads)


def rebuild_all_(
    weights: Mapping[str, Weights],
    initial: Mapping[str, Weights],
    pool: SeedPool,
    a: object,
    *,
    threads: int | None = None,
) -> None:
    """`rebuild_` of every tensor of a model from its initial weights, which may be the same tensors."""
    _all(weights, initial, Update(pool, a), threads)


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
    _all(weights, initial, Update(pool, _plus(pool, a, j, scale)), threads)


def perturbed_names(weights: Mapping[str, Weights]) -> dict[str, Weights]:
    """The tensors that take noise by canonical name, sorted; tied ones once, under the first of their names.

    Give all names of a tied tensor or always the same one of them: its noise follows from the name it is
    given here.

    Raises:
        InputError: Two tensors share a canonical name, or share memory without being the same.
    """
    chosen: dict[str, Weights] = {}
    spans: dict[tuple[int, int], str] = {}
    for name, w in sorted(weights.items(), key=lambda pair: canonical_name(pair[0])):
        if isinstance(w, nn.Parameter) and not w.requires_grad:
            continue
        if not (
            w.is_floating_point() if isinstance(w, torch.Tensor) else np.issubdtype(w.dtype, np.floating)
        ):
            continue
        canonical, row = canonical_name(name), flat(w, name)
        span = (row.data_ptr(), row.data_ptr() + row.nbytes)
        if row.numel() and span in spans:
            continue
        if canonical in chosen:
            raise InputError(f"two tensors are called {canonical!r} once wrappers are left out: rename one")
        chosen[canonical] = w
        if row.numel():
            spans[span] = canonical
    ordered = sorted(spans)
    for one, two in pairwise(ordered):
        if two[0] < one[1]:
            raise InputError(
                f"{spans[one]!r} and {spans[two]!r} share a part of their memory: pass one of them"
            )
    return chosen


def _all(
    weights: Mapping[str, Weights], initial: Mapping[str, Weights], update: Update, threads: int | None
) -> None:
    origin = {canonical_name(name): w0 for name, w0 in initial.items()}
    chosen = perturbed_names(weights)
    missing = [name for name in chosen if name not in origin]
    if missing:
        raise InputError(f"no initial weights for {missing[0]!r} ({len(missing)} tensors are missing)")
    # Everything is checked before the first weight is written.
    run([job for name, w in chosen.items() for job in update.jobs(w, origin[name], name)], threads)


def _plus(pool: SeedPool, a: object | None, j: int, scale: float) -> reference.F64:
    vector = np.zeros(pool.size) if a is None else reference.coefficients(pool, a).copy()
    vector[pool.check_seed(j)] += scale
    return vector
