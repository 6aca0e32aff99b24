"""What FedAvg's server keeps between rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """The server's state.

    Attributes:
        weights: The global trainable parameters, float32.
        dtypes: The dtype in which each of them is held and sent, by name.
        scaling: alpha / rank of each LoRA module.
        moments: The server optimiser's moments, by "moment/name".
        control: SCAFFOLD's c.
        product: What is added to the base weights, stacked or dense: of all rounds so far the products
            Σ p_i B_i A_i (aggregation: stack), or what they are beside their factors' (residual).
        ranks: Of clients that prune, the rank that each has left, by its number.
        steps, begun: With a buffer: steps so far, and the step that each client began at, by its number.
        versions: The weights of steps before, as long as a client has yet to come from them, by "step/name".
        start, sums, weight: Asynchronous: the weights that clients started from and Σ n_i Δ_i, Σ n_i so far.
    """

    weights: dict[str, Tensor]
    dtypes: dict[str, str]
    scaling: dict[str, float] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    control: dict[str, Tensor] = field(default_factory=dict)
    product: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    weight: int = 0
    steps: int = 0
    begun: dict[str, int] = field(default_factory=dict)
    versions: dict[str, Tensor] = field(default_factory=dict)

    def sent(self) -> dict[str, Tensor]:
        """The weights in the dtypes in which they are held and sent."""
        return {name: w.to(getattr(torch, self.dtypes[name])) for name, w in self.weights.items()}

    def for_scoring(self) -> State:
        """The weights as they are sent, and what is added to the base: all that makes up the model."""
        return State(self.sent(), {}, self.scaling, product=self.product)
