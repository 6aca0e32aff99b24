"""The path on a GPU: what `fedtune.zeroth.reference` defines, bit for bit, by the Triton kernels.

`Update` prepares a K-vector once on the CPU (one transform of K numbers, or quantised coefficients and tables
of partial sums), uploads it once to each device, and then adds it to any number of tensors there, one launch
a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import InputError
from fedtune.zeroth import fast, reference
from fedtune.zeroth.pool import KINDS, SeedPool, tensor_id
from fedtune.zeroth.reference import TILE

# Each warp draws all words of the sign planes, so few are better; with one a thread holds too much for many
# to run at a time. The others take 4.
_WARPS = {"hadamard4": 2}


class Update:
    """Σ_j a_j z_j of one pool, prepared to be added to tensors on GPUs.

    Args:
        pool: The pool.
        a: K coefficients, float64: already −η times the accumulator.

    Raises:
        InputError: `a` is not K finite numbers.
    """

    def __init__(self, pool: SeedPool, a: object) -> None:
        self.pool = pool
        self._tables = _PREPARE[pool.noise](pool, reference.coefficients(pool, a))
        self._uploaded: dict[torch.device, tuple[Any, ...]] = {}

    def jobs(self, w: Tensor, w0: Tensor, name: str, *, first: int = 0) -> list[fast.Job]:
        """The launch that writes w = cast(float32(w0) + Δ); none for an empty tensor.

        A job launches on the current stream of w's device and does not wait for the result.

        Args:
            w: What is written, a contiguous tensor of float32, float16 or bfloat16 on a GPU; may be w0.
            w0: The initial weights, of the same size and dtype and on the same device.
            name: The tensor's name, which its noise depends on.
            first: Where w begins in the flattened tensor, if it is a shard of it.

        Raises:
            InputError: The tensors do not match, cannot be written as they lie in memory, or Triton is not
                installed.
        """
        out, base = flat(w, name), flat(w0, name)
        if out.shape != base.shape or out.dtype != base.dtype:
            raise InputError(
                f"{name}: w and w0 must have one size and dtype, got {out.numel():,} {out.dtype} "
                f"and {base.numel():,} {base.dtype}"
            )
        n = out.numel()
        reference.check_range(first, n)
        kernel = _kernels(name, out.device).KERNELS[self.pool.noise]
        if not n:
            return []
        if out.device not in self._uploaded:
            self._uploaded[out.device] = tuple(
                torch.from_numpy(table).to(out.device, non_blocking=True)
                if isinstance(table, np.ndarray)
                else table
                for table in self._tables
            )
        if out.dtype == torch.bfloat16:
            out, base = out.view(torch.uint16), base.view(torch.uint16)
        identity, key = tensor_id(name), self.pool.key
        stream = (KINDS.index(self.pool.noise) << 24, identity, identity >> 32, key, key >> 32)
        arguments = (out, base, n, first, *self._uploaded[out.device], *map(_int32, stream))
        # A program a tile; 2^34 elements are 2^24 tiles, and a grid holds 2^31 − 1.
        tiles = -(-(first + n) // TILE) - first // TILE
        options = {"num_warps": _WARPS.get(self.pool.noise, 4), "enable_fp_fusion": False}
        return [partial(_launch, kernel, tiles, arguments, options)]


def flat(w: Tensor, name: str) -> Tensor:
    """A tensor's own memory as one row.

    Raises:
        InputError: Not a contiguous tensor of a supported dtype.
    """
    if w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"{name}: only float32, float16 and bfloat16 take noise, got {w.dtype}")
    if not w.is_contiguous():
        raise InputError(
            f"{name}: the tensor must be contiguous in memory, got shape {tuple(w.shape)} in steps"
        )
    return w.detach().view(-1)


def _launch(kernel: Any, tiles: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    device = arguments[0].device
    # Triton launches on the current device, which its interpreter, on the CPU, does not have.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(tiles,)](*arguments, **options)


def _kernels(name: str, device: torch.device) -> Any:
    try:
        from fedtune.zeroth import triton_kernels  # imports Triton, which only those with a GPU need
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise InputError(
            f"{name} is on {device}, where noise needs Triton, which is not installed: "
            "pip install triton, or keep the weights on the CPU (model.device=cpu)"
        ) from error
    return triton_kernels


def _int32(word: int) -> int:
    """The low 32 bits as the signed number of the same bits."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _hadamard4(pool: SeedPool, a: reference.F64) -> tuple[Any, ...]:
    return reference.transformed(pool, a), (pool.block // TILE).bit_length() - 1


def _looked_up(pool: SeedPool, a: reference.F64) -> tuple[Any, ...]:
    keys, tables, unit = fast.tabled(pool, a)
    return keys, tables, keys.size, np.array([unit])  # an array: Triton takes Python's floats for float32


def _binomial32(pool: SeedPool, a: reference.F64) -> tuple[Any, ...]:
    q, unit = reference.quantised(pool, a)
    used = np.flatnonzero(q)  # the others add nothing
    return used.astype(np.int32), q[used].astype(np.int32), used.size, np.array([unit])


_PREPARE: dict[str, Callable[[SeedPool, reference.F64], tuple[Any, ...]]] = {
    "hadamard4": _hadamard4,
    "rademacher": _looked_up,
    "gaussian": _looked_up,
    "binomial32": _binomial32,
}
