"""What the servers of FedKSeed and FedKSeed-Pro keep between rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedtune.core.types import Scalar


@dataclass(frozen=True)
class State:
    """The server's state: a few vectors of length K.

    Attributes:
        origin: The w0 and the pool that the accumulator belongs to.
        accumulator: a, float32: server, clients and replay all rebuild from these bits.
        before: The accumulator that the last round began with.
        holders: Clients that replied in the last round, and so hold `before`.
        magnitude, draws: Σ |ĝ| and the number of draws of each seed (Pro).
        epsilon: ε, the same for all clients in all rounds.
        peers: With `graph`, where there is no accumulator but each peer's, by client.
        messages: What peers passed on in the last round, by "client/name".
        examples: Of those that did.
        steps: Rounds that peers have taken.
    """

    origin: Mapping[str, Scalar]
    accumulator: Tensor
    before: Tensor
    magnitude: Tensor
    draws: Tensor
    holders: Mapping[str, bool] = field(default_factory=dict)
    epsilon: float = 0.0  # in the checkpoints of older runs, which have a number in their settings
    peers: Mapping[str, Tensor] = field(default_factory=dict)
    messages: Mapping[str, Tensor] = field(default_factory=dict)
    examples: Mapping[str, int] = field(default_factory=dict)
    steps: int = 0
