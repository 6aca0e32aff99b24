"""The most memory that evaluation takes, over all that a run evaluates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fedtune.measure.memory import MemoryMeter, Resident, paused


class Peaks:
    """Follows batches. On a CPU, where that costs time, only those that are larger than all before of a kind.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._meter = MemoryMeter(device)
        self._largest: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        """The highest peak so far, weights included; 0 before the first batch."""
        return self._meter.peak_bytes

    @property
    def how(self) -> str:
        """How it is measured."""
        return self._meter.how

    @contextmanager
    def batch(self, kind: str, rows: int, tokens: int, resident: Sequence[Resident]) -> Iterator[None]:
        """One batch.

        Args:
            kind: What is done with it.
            rows: Examples.
            tokens: Of the longest, answer included.
            resident: What is in memory when it begins.
        """
        if rows * tokens <= self._largest.get(kind, 0) and self._meter.device.type == "cpu":
            yield
            return
        self._largest[kind] = max(rows * tokens, self._largest.get(kind, 0))
        with paused(), self._meter.whole(resident):  # where replies are scored, the server's step is open
            yield
