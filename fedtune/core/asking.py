"""Who is asked in a round: everyone, whom chance draws, or whom the method names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from fedtune.core.cohort import PerRound, wanted_of
from fedtune.core.personal import for_all
from fedtune.core.selection import Selection
from fedtune.core.types import ClientEnv, Payload

LOSS = "loss"  # phase of an order that asks for a loss and no training; name of the reply's one number


@runtime_checkable
class ChoosingMethod(Protocol):
    """A method that may say itself who is asked."""

    def chooses(self, round: int, clients: Sequence[int]) -> tuple[int, ...] | None:
        """The clients of a round, of all that there are in ascending order; None: that is left to others."""


@runtime_checkable
class LossMethod(Protocol):
    """A method whose clients can say what the loss of what they were sent is, without training."""

    def loss_refusal(self) -> str | None:
        """Why they cannot with these settings."""

    def client_loss(self, job: Payload, env: ClientEnv, examples: int | None) -> float:
        """Mean loss over the trained tokens of a client's examples, of a training order's model.

        Args:
            job: The order.
            env: The client.
            examples: On how many, drawn from the client's stream of this round; None: all.
        """


def asked(
    method: Any,
    round: int,
    clients: Iterable[int],
    per_round: PerRound,
    *,
    selection: Selection | None = None,
    seed: int = 0,
) -> PerRound:
    """What `sample_cohort` is to draw for a round.

    Args:
        method: The run's `Method`.
        round: Counted from 1.
        clients: All of the federation.
        per_round: As `federation.clients_per_round`.
        selection: As `federation.selection`; None: an even draw.
        seed: The run's.
    """
    if for_all(method, round):
        return None
    everyone = sorted(clients)
    chosen = method.chooses(round, everyone) if isinstance(method, ChoosingMethod) else None
    if chosen is None and selection is not None:
        wanted = wanted_of(per_round, len(everyone))
        chosen = selection.chosen(everyone, wanted, seed=seed, round=round)
    return per_round if chosen is None else chosen
