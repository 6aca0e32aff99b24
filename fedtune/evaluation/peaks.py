"""The most memory that evaluation takes, over all that a run evaluates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fedtune.measure.memory import MemoryMeter, paused


class Peaks:
    """Follows batches larger than all before of a kind and model, since that costs time.

    Args:
        device: Where the model is.
        meter: Whose peak it is; None: one of its own.
    """

    def __init__(self, device: torch.device, meter: MemoryMeter | None = None) -> None:
        self._meter = meter or MemoryMeter(device)
        self._largest: dict[tuple[str, int], int] = {}

    @property
    def bytes(self) -> int:
        """The highest peak so far, weights included; 0 before the first batch."""
        return self._meter.peak_bytes

    @property
    def by_device(self) -> dict[str, int]:
        """As `MemoryMeter.by_device`."""
        return self._meter.by_device

    @property
    def how(self) -> str:
        """How it is measured."""
        return self._meter.how

    @contextmanager
    def batch(self, kind: str, rows: int, tokens: int, model: nn.Module) -> Iterator[None]:
        """One batch.

        Args:
            kind: What is done with it.
            rows: Examples.
            tokens: Of the longest, answer included.
            model: What it is given to; models of the same size count as one.
        """
        like = kind, sum(parameter.numel() for parameter in model.parameters())
        largest = self._largest.get(like, 0)
        if rows * tokens <= largest:
            yield
            return
        self._largest[like] = max(rows * tokens, largest)
        with paused(), self._meter.whole([model]):  # where replies are scored, the server's step is open
            yield
