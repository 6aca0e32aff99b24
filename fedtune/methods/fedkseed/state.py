"""What the servers of FedKSeed and FedKSeed-Pro keep between rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
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

    def for_scoring(self) -> State:
        """The accumulator alone: with it the model is rebuilt."""
        none = torch.zeros(0)
        return State(self.origin, self.accumulator, none, none, none)

    def probabilities(self) -> Tensor:
        """The p of Eq. 14, float32 (K); uniform until something was drawn or while ψ does not vary."""
        drawn = self.draws > 0
        if not bool(drawn.any()):
            return torch.full((len(drawn),), 1 / len(drawn))
        psi = self.magnitude / self.draws.clamp(min=1)
        psi = torch.where(drawn, psi, psi[drawn].mean())
        spread = psi.max() - psi.min()
        normalized = (psi - psi.min()) / spread if spread > 0 else torch.zeros_like(psi)
        return normalized.softmax(0).float()

    def spread(self) -> dict[str, Any]:
        """How p is spread over the seeds.

        Returns:
            `drawn`: seeds that were drawn so far; `probability`: p times K, so that 1 is uniform, of the seed
            behind which so many percent of the seeds lie, the likeliest being behind none.
        """
        times = (self.probabilities() * len(self.draws)).sort(descending=True).values.tolist()
        at = {percent: times[round(percent / 100 * (len(times) - 1))] for percent in range(0, 101, 5)}
        shown = {str(percent): round(value, 6) for percent, value in at.items()}
        return {"drawn": int((self.draws > 0).sum()), "probability": shown}
