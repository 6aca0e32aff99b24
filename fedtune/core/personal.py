"""Models of clients' own, beside the global one or in its place: what a method says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from fedtune.core.types import Payload

if TYPE_CHECKING:
    from torch import nn

S = TypeVar("S", contravariant=True)


@runtime_checkable
class PersonalMethod(Protocol[S]):
    """A method whose clients may have models of their own, which they keep between rounds and never send.

    Attributes:
        personal: Whether they stand beside the global model, or in its place, for then it lacks parts that
            clients alone have; empty where there are none.
    """

    personal: Literal["", "beside", "instead"]

    def asks_all(self, round: int) -> bool:
        """Whether a round is for every client, whatever `federation.clients_per_round` says."""

    def client_models(
        self, state: S, clients: Mapping[int, Payload], model: nn.Module
    ) -> Iterator[tuple[str, nn.Module]]:
        """Each client's own model, named client-0000 and so on, in `model`'s memory, as `Method.export`.

        Args:
            state: The server's.
            clients: What each client keeps, as far as it is known here: over a network it is not.
            model: The server's.
        """


def result_models(
    method: Any, state: Any, clients: Mapping[int, Payload], model: nn.Module
) -> Iterator[tuple[str, nn.Module]]:
    """The models that a run has come to, by name, one at a time, in `model`'s memory.

    Those that `state` stands for, and clients' own; these alone where the global one lacks parts. Over a
    network, where clients' own are not known here, it is the global one as clients began it.

    Args:
        method: The run's `Method`.
        state: The server's.
        clients: What each client keeps.
        model: The server's.
    """
    personal = method.personal if isinstance(method, PersonalMethod) else ""
    if personal != "instead":
        yield from method.export(state, model)
    found = False
    for one in method.client_models(state, clients, model) if personal else ():
        found = True
        yield one
    if personal == "instead" and not found:
        yield from method.export(state, model)


def for_all(method: Any, round: int) -> bool:
    """Whether a round is for every client: always where nothing is sent."""
    return not method.uses_wire or (isinstance(method, PersonalMethod) and method.asks_all(round))
