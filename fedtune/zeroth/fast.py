"""The fast path on a CPU: what `fedtune.zeroth.reference` defines, bit for bit, by Numba kernels over ranges.

`Update` prepares a K-vector once (one transform, or quantised coefficients and tables of partial sums) and
then adds it to any number of tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import InputError
from fedtune.zeroth import reference
from fedtune.zeroth.pool import KINDS, SeedPool, tensor_id
from fedtune.zeroth.reference import F32, TILE

Weights = Tensor | np.ndarray[Any, Any]
Job = Callable[[], None]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_TILES = 16  # of the independent kinds at a time: the integer sums of 16 tiles stay in the second cache
_CHUNK = 1 << 20  # elements of hadamard4 that a thread takes at a time
# The kernels take the bits of half precision, which Numba does not have, and tell them apart by these types.
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


class Update:
    """Σ_j a_j z_j of one pool, prepared to be added to tensors.

    Args:
        pool: The pool.
        a: K coefficients, float64: already −η times the accumulator.

    Raises:
        InputError: `a` is not K finite numbers.
    """

    def __init__(self, pool: SeedPool, a: object) -> None:
        self.pool = pool
        vector = reference.coefficients(pool, a)
        self.tables = _PREPARE[pool.noise](pool, vector)

    def jobs(self, w: Weights, w0: Weights, name: str, *, first: int = 0) -> list[Job]:
        """The pieces of w = cast(float32(w0) + Δ), which may run in any order and at the same time.

        Args:
            w: What is written, a contiguous CPU tensor or array of float32, float16 or bfloat16; may be w0.
            w0: The initial weights, of the same size and dtype; only read unless it is w.
            name: The tensor's name, which its noise depends on.
            first: Where w begins in the flattened tensor, if it is a shard of it.

        Raises:
            InputError: The tensors do not match, or cannot be written as they lie in memory.
        """
        out, base = flat(w, name), flat(w0, name)
        if isinstance(w, np.ndarray) and not w.flags.writeable:
            raise InputError(f"{name}: the array to write is read-only; pass a copy as w and this one as w0")
        if out.shape != base.shape or out.dtype != base.dtype:
            raise InputError(
                f"{name}: w and w0 must have one size and dtype, got {out.numel():,} {out.dtype} "
                f"and {base.numel():,} {base.dtype}"
            )
        n = out.numel()
        reference.check_range(first, n)
        identity, key = tensor_id(name), self.pool.key
        kind = KINDS.index(self.pool.noise)
        halves = (identity & 0xFFFFFFFF, identity >> 32, key & 0xFFFFFFFF, key >> 32)
        stream = np.array([kind << 24, *halves], np.uint64)
        a, b = _array(out), _array(base)
        return [partial(self._run, a, b, first, *span, stream) for span in self._spans(first, n)]

    def _spans(self, first: int, n: int) -> Iterator[tuple[int, int]]:
        """Ranges of blocks or tiles that cover n elements from `first` on."""
        hadamard = self.pool.noise == "hadamard4"
        unit = self.pool.block if hadamard else TILE
        size = max(_CHUNK // unit, 1) if hadamard else _TILES
        end = -(-(first + n) // unit) if n else 0
        for low in range(first // unit, end, size):
            yield low, min(low + size, end)

    def _run(
        self,
        out: np.ndarray[Any, Any],
        base: np.ndarray[Any, Any],
        first: int,
        low: int,
        high: int,
        stream: np.ndarray[Any, Any],
    ) -> None:
        from fedtune.zeroth import kernels  # imports Numba, which only those who perturb need

        kernels.KERNELS[self.pool.noise](out, base, first, low, high, *self.tables, stream)


def run(jobs: Sequence[Job], threads: int | None = None) -> None:
    """Runs all jobs.

    Args:
        jobs: What to run; their order does not matter.
        threads: How many threads share them; PyTorch's setting by default. The bits do not depend on it.

    Raises:
        InputError: Fewer than one thread.
    """
    if threads is None:
        threads = torch.get_num_threads()
    if threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    if min(threads, len(jobs)) <= 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(threads) as workers:
        for done in [workers.submit(job) for job in jobs]:
            done.result()


def _hadamard4(pool: SeedPool, a: reference.F64) -> tuple[Any, ...]:
    from fedtune.zeroth import vector

    y = reference.transformed(pool, a)
    # A register's lanes are exchanged once loaded; where the processor cannot, 16 copies turn the XOR of a
    # lane's index into a choice of copy, so that registers are still loaded and not gathered.
    return _aligned(y if vector.HAS_PERMUTE else permuted_copies(y)), pool.block


def permuted_copies(y: F32) -> F32:
    """Y 16 times over: copy c holds y[m ^ c] at m."""
    lanes = np.arange(16)
    return np.concatenate([y.reshape(-1, 16)[:, lanes ^ c].reshape(-1) for c in range(16)])


def _aligned(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same values from the start of a cache line on, so that no vector load crosses two lines."""
    room = np.empty(values.nbytes + 64, np.uint8)
    skip = -room.ctypes.data % 64
    result = room[skip : skip + values.nbytes].view(values.dtype).reshape(values.shape)
    result[...] = values
    return result


def _grouped(q: reference.F64, size: int) -> tuple[np.ndarray[Any, Any], reference.F64]:
    """Coefficients in rows of `size` seeds, without the rows that are all zero, which add nothing."""
    rows = np.zeros((-(-q.size // size), size))
    rows.reshape(-1)[: q.size] = q
    used = np.flatnonzero(rows.any(axis=1))
    return used.astype(np.uint64), rows[used]


def tabled(pool: SeedPool, a: object) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    """What `rademacher` and `gaussian` look up: keys (uint64) and rows of 128 int32 by group; the unit.

    Halfword v of a group adds row[v mod 64] + row[64 + ⌊v/64⌋ mod 32] + row[96 + ⌊v/2048⌋]. Groups whose
    coefficients are all zero add nothing and are left out.

    Raises:
        InputError: `a` is not K finite numbers.
    """
    q, unit = reference.quantised(pool, reference.coefficients(pool, a))
    groups, rows = _grouped(q, reference.GROUP[pool.noise])
    parts = []
    for (bit, width), f in zip(reference.FIELDS, reference.gaussian_tables(), strict=True):
        if pool.noise == "gaussian":
            parts.append(np.rint(rows * f.astype(np.float64)))
        else:
            signs = 2.0 * (np.arange(2**width)[:, None] >> np.arange(width) & 1) - 1
            parts.append(rows[:, bit : bit + width] @ signs.T)  # sums of integers below 2^53: exact
    keys = reference.group_keys(pool, groups.astype(np.int64))
    return keys, np.concatenate(parts, axis=1).astype(np.int32), unit


def _looked_up(pool: SeedPool, a: reference.F64) -> tuple[Any, ...]:
    keys, tables, unit = tabled(pool, a)
    low = ((tables + 8192) & 16383) - 8192
    return keys, _aligned(np.concatenate([low, (tables - low) >> 14], axis=1).astype(np.int16)), unit


def _binomial32(pool: SeedPool, a: reference.F64) -> tuple[Any, ...]:
    q, unit = reference.quantised(pool, a)
    groups, rows = _grouped(q, 1)
    return groups, rows.reshape(-1).astype(np.int64), unit


_PREPARE: dict[str, Callable[[SeedPool, reference.F64], tuple[Any, ...]]] = {
    "hadamard4": _hadamard4,
    "rademacher": _looked_up,
    "gaussian": _looked_up,
    "binomial32": _binomial32,
}


def flat(w: Weights, name: str) -> Tensor:
    """A tensor's own memory as one row.

    Raises:
        InputError: Not a contiguous tensor of a supported dtype in the CPU's memory.
    """
    known = _DTYPES if isinstance(w, Tensor) else (np.dtype(np.float32), np.dtype(np.float16))
    if w.dtype not in known:
        # float64 weights would lose half their bits in float32(w0) + Δ
        raise InputError(f"{name}: only float32, float16 and bfloat16 take noise, got {w.dtype}")
    if isinstance(w, Tensor) and w.device.type != "cpu":
        raise InputError(f"{name}: the tensor must be in the CPU's memory, got device {w.device}")
    if not (w.is_contiguous() if isinstance(w, Tensor) else w.flags.c_contiguous):
        raise InputError(
            f"{name}: the tensor must be contiguous in memory, got shape {tuple(w.shape)} in steps"
        )
    if isinstance(w, np.ndarray):
        with warnings.catch_warnings():
            # PyTorch has no read-only tensors. `jobs` refuses to write to such an array, w0 is read.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            w = torch.from_numpy(w)
    return w.detach().view(-1)


def _array(row: Tensor) -> np.ndarray[Any, Any]:
    """The same memory as the kernels take it."""
    return row.view(_BITS.get(row.dtype, row.dtype)).numpy()
