"""Messages of a round that are of no client: between the server and simulated servers of regions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, runtime_checkable

from fedtune.core.cohort import Cohort
from fedtune.core.types import Payload

S = TypeVar("S", contravariant=True)


@dataclass(frozen=True)
class Relayed:
    """One such message.

    Attributes:
        region: The other end.
        direction: `down` from the server, `up` to it.
        payload: What it holds, in names, dtypes and shapes.
    """

    region: int
    direction: Literal["down", "up"]
    payload: Payload


@runtime_checkable
class RelayingMethod(Protocol[S]):
    """A method whose clients may be reached through servers of regions."""

    def relayed(self, state: S, cohort: Cohort, replied: Sequence[int]) -> Iterable[Relayed]:
        """What a round sends beside its clients' messages.

        Args:
            state: The server's, before the round.
            cohort: The round's.
            replied: The clients who answered.
        """
