"""What `federation.selection` asks for: whom a round asks; see core/selection.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from fedtune.core.cohort import PerRound, wanted_of
from fedtune.core.selection import there, tier
from fedtune.core.settings import Settings

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class AtRandom(Settings):
    """All clients alike."""

    name: Literal["random"] = "random"

    def chosen(self, clients: Sequence[int], wanted: int, *, seed: int, round: int) -> None:
        """As `sample_cohort` draws them."""


class ByLoss(Settings):
    """Of some clients drawn at random those of highest loss (power of choice)."""

    name: Literal["loss"] = "loss"
    candidates: Count | Share | None = None  # d: a count, a fraction, or everyone
    losses: Literal["asked", "last"] = "asked"  # of the global model, before the round; or as trained last
    examples: Count | None = None  # of a client that is asked, drawn anew in each round; null: all

    def chosen(self, clients: Sequence[int], wanted: int, *, seed: int, round: int) -> None:
        """Losses decide, which the seed does not know."""


class BySpeed(Settings):
    """Clients of one tier of speed in a round (TiFL)."""

    name: Literal["speed"] = "speed"
    seconds: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)  # of a client's training; in turn
    tiers: int = Field(3, ge=2)  # of clients of like speed, as many in each

    def chosen(self, clients: Sequence[int], wanted: int, *, seed: int, round: int) -> tuple[int, ...]:
        """See `tier`."""
        return tier(clients, self.seconds, self.tiers, wanted, seed=seed, round=round)


class ByAvailability(Settings):
    """Clients that are there now and then; simulated."""

    name: Literal["availability"] = "availability"
    chances: list[Share] = Field(min_length=1)  # that a client is there at a moment; in turn
    prefer: Literal["random", "least-asked"] = "random"  # of those who are there

    def chosen(self, clients: Sequence[int], wanted: int, *, seed: int, round: int) -> tuple[int, ...]:
        """See `there`."""
        return there(clients, self.chances, wanted, prefer=self.prefer, seed=seed, round=round)


SelectionSettings = Annotated[AtRandom | ByLoss | BySpeed | ByAvailability, Field(discriminator="name")]


def simulated_refusal(settings: Any, per_round: PerRound, *, network: bool) -> str | None:
    """Why a method that simulates speeds or regions does not go with these settings; None if it does."""
    if getattr(settings, "buffer", None) is not None:
        if per_round is not None:
            return (
                "federation.clients_per_round does not go with method.buffer, whose size says how many "
                "updates a step has; all clients train all the time. Leave it out"
            )
        if network:
            return (
                "method.buffer has clients whose speeds are simulated; over a network a round waits for "
                "those that it asked. Leave it out, or take another transport"
            )
    if getattr(settings, "regions", None) is not None and network:
        return (
            "method.regions has servers of regions that are simulated; over a network all clients send to "
            "the one server. Leave it out, or take another transport"
        )
    return None


def selection_refusal(federation: Any, method: Any, *, network: bool) -> str | None:
    """Why clients cannot be chosen so; None if they can.

    Args:
        federation: The settings of that name.
        method: The run's.
        network: Whether clients are elsewhere.
    """
    selection, per_round = federation.selection, federation.clients_per_round
    secure, privacy = federation.secure_aggregation is not None, federation.privacy is not None
    if isinstance(selection, AtRandom) or not method.uses_wire:  # references ask everyone
        return None
    name = method.config.name
    if privacy:
        return (
            "federation.privacy counts on an even and secret draw of each round's clients, and what others "
            f"can know of {selection.name} is neither; take random"
        )
    if per_round is None:
        return "it chooses some clients of all; set federation.clients_per_round"
    if getattr(method.config, "buffer", None) is not None:
        return "method.buffer says itself whose updates a step has; leave one of them out"
    if isinstance(selection, ByAvailability) and network:
        return "chances are simulated, and clients over a network are there or not; leave it out"
    if not isinstance(selection, ByLoss):
        return None
    return _loss_refusal(selection, method, name, secure=secure)


def _loss_refusal(selection: ByLoss, method: Any, name: str, *, secure: bool) -> str | None:
    from fedtune.core.asking import LossMethod  # here, so that settings are read without torch

    if secure:
        return "federation.secure_aggregation keeps clients' own numbers from the server, their loss as well"
    if selection.losses == "last":
        if selection.examples is not None:
            return "examples is of losses that are asked for; with losses: last leave it out"
        if method.rounds == 1:
            return "with losses: last no client has one before the only round; take losses: asked"
        if method.arrival == "in-turn":
            return (
                f"the loss that clients of {name} train at is of their own turn's model, not of one for all"
            )
        return None
    if not isinstance(method, LossMethod):
        return f"clients of {name} do not tell their loss without training; take losses: last"
    reason = method.loss_refusal()
    return reason and f"{reason}; take losses: last"


def check_selection(selection: SelectionSettings, clients: int, per_round: PerRound) -> str | None:
    """Why there are too few clients for it; None if there are enough."""
    wanted = wanted_of(per_round, clients)
    if isinstance(selection, BySpeed):
        smallest = clients // selection.tiers
        if smallest < wanted:
            return (
                f"{clients} clients in {selection.tiers} tiers are {smallest} in the smallest, and a round "
                f"asks {wanted}; lower federation.selection.tiers or federation.clients_per_round"
            )
    if isinstance(selection, ByLoss) and selection.candidates is not None:
        among = wanted_of(selection.candidates, clients)
        if among < wanted:
            return (
                f"federation.selection.candidates is {selection.candidates}, which is {among} of {clients} "
                f"clients, and a round asks {wanted}; raise it"
            )
        if isinstance(selection.candidates, int) and selection.candidates > clients:
            return (
                f"federation.selection.candidates is {selection.candidates}, but there are {clients} clients"
            )
    return None
