"""Noise of matrices in subspaces of low rank: `subzero` and `lozo`, each as it is defined and as a fast sum.

Yu et al., "Zeroth-Order Fine-Tuning of LLMs in Random Subspaces" (SubZero, 2024); Chen et al., "Enhancing
Zeroth-order Fine-tuning for Language Models with Low-rank Structures" (LOZO, 2024). Of a matrix W (m x n)

    subzero    z_j = U_g Z_j V_gᵀ / 16    U_g (m x 16), V_g (n x 16), Z_j (16 x 16)
    lozo       z_j = U_j V_gᵀ / 2         U_j (m x 4),  V_g (n x 4)
    g = j mod 16

with entries of mean 0 and variance 1. In the papers U_g and V_g stay for some hundred steps and are drawn
anew then; seeds of a pool come in any order, so 16 subspaces stand beside each other, each for a sixteenth of
the seeds. U, V and Z are random signs. SubZero's U and V are orthogonal, LOZO's factors normal; columns of
signs are orthogonal on average, and need no decomposition whose bits depend on a library. What is no matrix
gets `rademacher` noise; what has more dimensions is a matrix of its first by the rest.

A matrix's noise depends on its shape, so that only whole tensors take it. A sum over seeds is one of products
of low rank, which costs of each weight 256 (subzero) or 64 (lozo) multiplications at most, however many seeds
there are. All are of integers below 2^53 in float64: no order and no fused multiply-add can change a bit.
"""

from __future__ import annotations

import math
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.errors import InputError
from fedtune.zeroth import fast, reference
from fedtune.zeroth.fast import Job, Weights
from fedtune.zeroth.pool import SHAPED, SeedPool, tensor_id
from fedtune.zeroth.reference import F32, F64, I64

SUBSPACES = 16
RANK = {"subzero": 16, "lozo": 4}
SCALE = {"subzero": 1 / 16, "lozo": 1 / 2}  # 1/√(terms of an element's sum): its variance is 1
BITS = 40  # Σ|a| has room in them: with 16 · 16 terms a sum stays below 2^48
CORE = 2 * SUBSPACES  # the group of Z_j and U_j; below it those of U_g and V_g
PIECE = 1 << 16  # elements at a time


def signs(pool: SeedPool, name: str, group: int, elements: I64, width: int, first: int = 0) -> F64:
    """±1, (elements, width): bits `first` to `first` + width − 1 of word e mod 4 of call ⌊e/4⌋, 1 for +1."""
    identity, tag = tensor_id(name), (8 + SHAPED.index(pool.noise)) << 24 | group
    key = (pool.key & 0xFFFFFFFF, pool.key >> 32)
    four = reference.philox((elements // 4, tag, identity & 0xFFFFFFFF, identity >> 32), key)
    word = np.choose(elements % 4, four).astype(np.int64)
    return (2 * (word[:, None] >> np.arange(first, first + width) & 1) - 1).astype(np.float64)


def z(pool: SeedPool, name: str, shape: tuple[int, int], j: int) -> F32:
    """The noise of seed j of a matrix (m, n), as it is defined.

    Raises:
        InputError: j is not a seed of the pool.
    """
    j, (m, n), rank = pool.check_seed(j), shape, RANK[pool.noise]
    g = j % SUBSPACES
    right = signs(pool, name, 2 * g + 1, np.arange(n), rank)
    if pool.noise == "subzero":
        core = signs(pool, name, CORE, rank * j + np.arange(rank), rank)
        left = signs(pool, name, 2 * g, np.arange(m), rank) @ core
    else:
        left = signs(pool, name, CORE, j // 8 * m + np.arange(m), rank, j % 8 * rank)
    return (left @ right.T * SCALE[pool.noise]).astype(np.float32)


class Update:
    """Σ_j a_j z_j of one pool, prepared to be added to whole tensors on a CPU.

    Args:
        pool: The pool, of a kind of `SHAPED`.
        a: K coefficients, float64: already −η times the accumulator.

    Raises:
        InputError: `a` is not K finite numbers.
    """

    def __init__(self, pool: SeedPool, a: object) -> None:
        self.pool, self._a = pool, reference.coefficients(pool, a)
        total = math.fsum(np.abs(self._a))
        shift = min(BITS - math.frexp(total)[1], 1000) if total else 0
        self._q = np.rint(np.ldexp(self._a, shift))
        self._unit = math.ldexp(SCALE[pool.noise], -shift)

    def jobs(self, w: Weights, w0: Weights, name: str, *, first: int = 0) -> list[Job]:
        """The pieces of w = cast(float32(w0) + Δ); see `fast.Update`.

        Raises:
            InputError: As there, or w is a part of a tensor.
        """
        if first:
            raise InputError(
                f"{name}: {self.pool.noise} noise depends on a matrix's shape, and is for whole tensors; got "
                f"a part from element {first} on: take noise hadamard4, or pass the whole"
            )
        if len(w.shape) < 2:
            return self._vectors.jobs(w, w0, name)
        out, base = fast.flat(w, name), fast.flat(w0, name)
        if tuple(w.shape) != tuple(w0.shape) or out.dtype != base.dtype:
            raise InputError(
                f"{name}: w and w0 must have one shape and dtype, got {tuple(w.shape)} {out.dtype} and "
                f"{tuple(w0.shape)} {base.dtype}"
            )
        if not out.numel():
            return []
        m = w.shape[0]
        left, right = self._factors(name, m, out.numel() // m)
        rows = max(PIECE // right.shape[0], 1)
        return [
            partial(self._write, out.view(m, -1), base.view(m, -1), left, right, low, min(low + rows, m))
            for low in range(0, m, rows)
        ]

    @cached_property
    def _vectors(self) -> fast.Update:
        return fast.Update(SeedPool(self.pool.key, self.pool.size, "rademacher"), self._a)

    def _write(self, out: Tensor, base: Tensor, left: F64, right: F64, low: int, high: int) -> None:
        delta = (left[low:high] @ right.T * self._unit).astype(np.float32)
        out[low:high].copy_(base[low:high].to(torch.float32) + torch.from_numpy(delta))

    def _factors(self, name: str, m: int, n: int) -> tuple[F64, F64]:
        """[Σ_j q_j U_0 Z_j | …] (m, rank · subspaces in use) and [V_0 | …] (n, the same)."""
        pool, rank, q = self.pool, RANK[self.pool.noise], self._q
        rows, used = np.arange(m), np.flatnonzero(q)
        subspaces = np.unique(used % SUBSPACES)
        left = np.zeros((len(subspaces), m, rank))
        for place, g in enumerate(subspaces):
            own = used[used % SUBSPACES == g]
            if pool.noise == "subzero":
                elements = (rank * own[:, None] + np.arange(rank)).reshape(-1)
                cores = signs(pool, name, CORE, elements, rank).reshape(len(own), -1)
                core = (q[own] @ cores).reshape(rank, rank)
                left[place] = signs(pool, name, 2 * int(g), rows, rank) @ core
                continue
            for j in own:
                left[place] += q[j] * signs(pool, name, CORE, j // 8 * m + rows, rank, j % 8 * rank)
        right = [signs(pool, name, 2 * int(g) + 1, np.arange(n), rank) for g in subspaces]
        both: NDArray[Any] = np.concatenate(right, axis=1) if right else np.zeros((n, 0))
        return left.transpose(1, 0, 2).reshape(m, -1), both
