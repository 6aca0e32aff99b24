"""Who is asked in a round: everyone, whom chance draws, or whom the method names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from fedtune.core.cohort import PerRound
from fedtune.core.personal import for_all


@runtime_checkable
class ChoosingMethod(Protocol):
    """A method that may say itself who is asked."""

    def chooses(self, round: int, clients: Sequence[int]) -> tuple[int, ...] | None:
        """The clients of a round, of all that there are in ascending order; None: that is left to others."""


def asked(method: Any, round: int, clients: Iterable[int], per_round: PerRound) -> PerRound:
    """What `sample_cohort` is to draw for a round.

    Args:
        method: The run's `Method`.
        round: Counted from 1.
        clients: All of the federation.
        per_round: As `federation.clients_per_round`.
    """
    if for_all(method, round):
        return None
    chosen = method.chooses(round, sorted(clients)) if isinstance(method, ChoosingMethod) else None
    return per_round if chosen is None else chosen
