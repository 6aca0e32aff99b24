"""What the servers of FedCyBGD and FedBAvg keep between turns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class State:
    """The server's state.

    Attributes:
        weights: Parameters that are trained, by "part:name": float32 those that have changed, the others in
            the model's dtype, in which clients get all.
        versions: The turn, from 1, that last changed a part, by its name.
        held: What each client has, as JSON: the version of each part by its name.
        answered: The turn, from 1, of each client's last reply.
        heads, channels: What pruning keeps of a block in its present version, by its name.
        turns: Turns that are over, answered or not.
        missed: The last turn, from 1, that nobody answered; 0: none.
        masters: Empty; earlier checkpoints have the float32 values here and rounded ones in `weights`.
    """

    weights: dict[str, Tensor]
    versions: dict[str, int] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    answered: dict[str, int] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)
    turns: int = 0
    missed: int = 0
    masters: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights.update(self.masters)
        self.masters.clear()
