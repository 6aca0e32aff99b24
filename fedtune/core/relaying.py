"""Messages of a round that are of no client: between the server and simulated servers of regions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, runtime_checkable

from fedtune.core.cohort import Cohort
from fedtune.core.ledger import Ledger
from fedtune.core.types import Payload
from fedtune.core.wire import Content, frame_bytes

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


def enter(ledger: Ledger, messages: Iterable[Relayed], round: int) -> None:
    """Enters what servers of regions, which are simulated, would get and send in a round."""
    for message in messages:
        ledger.message(
            round=round,
            client=None,
            direction=message.direction,
            kind="train",
            payload_bytes=message.payload.nbytes,
            framed_bytes=frame_bytes(Content(message.payload, {"round": round})),
            region=message.region,
        )
