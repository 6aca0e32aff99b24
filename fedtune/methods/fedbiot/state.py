"""What the servers of FedBiOT, FedOT and Offsite-tuning keep between rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class State:
    """The server's state: LoRA factors by block and path, float32.

    Attributes:
        adapter: Of the adapter.
        emulator: Of the emulator, on top of `merged`; empty where it never changes.
        merged: What pre-alignment learnt; part of the emulator's weights.
        holders: Clients that have the emulator's and the adapter's weights.
        round: Rounds that are done.
    """

    adapter: dict[str, Tensor]
    emulator: dict[str, Tensor] = field(default_factory=dict)
    merged: dict[str, Tensor] = field(default_factory=dict)
    holders: dict[str, bool] = field(default_factory=dict)
    round: int = 0
