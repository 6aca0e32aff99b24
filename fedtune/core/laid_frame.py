"""A frame that is not in memory as one: its head, and the bytes of its tensors where the tensors are.

Joined, a frame of a model is that model once more in memory. Sent in parts it need not be: each part is read
from the tensors when its turn comes. Until then they must not change; `decode` at the other end would see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PIECE_BYTES = 16 * 1024 * 1024  # that are copied to the host at a time of a tensor on another device


class LaidFrame:
    """The bytes of a frame, in order: a head, then each tensor's data.

    Args:
        head: What stands before the tensors.
        tensors: Of any shape, dtype and device; each one's bytes little-endian and contiguous.
    """

    def __init__(self, head: bytes, tensors: Sequence[Tensor]) -> None:
        self._head, self._tensors = head, tuple(tensors)
        self._starts = list(accumulate((tensor.nbytes for tensor in tensors), initial=len(head)))

    def __len__(self) -> int:
        """Bytes of the whole."""
        return self._starts[-1]

    def __bytes__(self) -> bytes:
        """The whole, joined."""
        return self.part(0, len(self))

    def part(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to before `end`, or to the frame's end; a copy."""
        return b"".join(self.pieces(begin, end))

    def pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        """The same without a copy of what lies contiguous in host memory; of the rest a piece at a time."""
        import torch

        if begin < len(self._head):
            yield memoryview(self._head)[begin:end]
        for tensor, start in zip(self._tensors, self._starts, strict=False):
            first, last = max(begin - start, 0), min(end - start, tensor.nbytes)
            if first < last:
                flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                step = last if flat.device.type == "cpu" else PIECE_BYTES
                for at in range(first, last, step):
                    yield memoryview(flat[at : min(at + step, last)].cpu().numpy())  # type: ignore[arg-type]
