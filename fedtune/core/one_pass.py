"""What is done with every number of an update, in one pass over it where the update is large.

PyTorch's operations each read and write the whole. For a large tensor in host memory a compiled kernel does
the same in one pass, in all threads; the plain form beside it serves everything else. Both give the same
bits, however many threads there are.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fedtune.zeroth.fast import run
from fedtune.zeroth.reference import F32

PIECE = 1 << 20  # numbers that a thread takes at a time
SMALLEST = 1 << 17  # for fewer there is no kernel to compile; PyTorch's temporaries then stay in the cache


def extremes(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest value of a tensor that has one; both NaN where one is NaN."""
    low, high = torch.aminmax(tensor.detach())
    return float(low), float(high)


def large(tensor: Tensor) -> bool:
    """Whether kernels serve it: there is enough of it, and they can read it."""
    return (
        tensor.numel() >= SMALLEST
        and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
    )


def floats(piece: Tensor) -> F32:
    """A piece of a large tensor in one dimension as float32; its own memory, where that is its dtype."""
    if piece.dtype == torch.float32:
        return piece.numpy()
    if piece.dtype == torch.float16:
        return piece.numpy().astype(np.float32)
    return (piece.view(torch.uint16).numpy().astype(np.uint32) << 16).view(np.float32)


def add_rounded(sums: Tensor, values: Tensor, scale: float) -> None:
    """Adds values · scale, in float64, rounded to whole numbers (halves to even), to int64 sums in place."""
    if not (large(values) and sums.is_contiguous()):
        sums.add_(values.to(torch.float64, copy=True).mul_(scale).round_().to(torch.int64))
        return
    if isinstance(values, FakeTensor):  # a plan's: nothing to read, and a kernel takes no memory
        return
    from fedtune.core import kernels  # imports Numba

    to, of = sums.view(-1), values.detach().view(-1)

    def add(at: int) -> None:
        kernels.add_rounded(to[at : at + PIECE].numpy(), floats(of[at : at + PIECE]), scale)

    run([partial(add, at) for at in range(0, len(of), PIECE)])
