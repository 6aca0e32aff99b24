"""A server under secure aggregation that does what no honest one does, to see one update or less noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from protected import DATA, federation
from secure_rounds import SECURE, equal
from torch import Tensor

from fedtune.core.cohort import QuorumError
from fedtune.protection import masking
from fedtune.protection.identity import SIGNATURE, Identity
from fedtune.protection.secure_client import SecureClient
from fedtune.protection.settings import Privacy

WEIGHTS = [len(DATA[client]) for client in range(4)]
TARGET = 2
Tensors = dict[str, Tensor]


def identities(count: int = 4) -> list[Identity]:
    private = [ec.generate_private_key(ec.SECP384R1()) for _ in range(count)]
    public = [key.public_key() for key in private]
    return [Identity(key, public) for key in private]


def told(change: Callable[[int, Tensors], Tensors]) -> Any:
    """An order of phase `shares` that says to each client what the server likes."""
    return lambda at, client, tensors: tensors | change(client, tensors) if at == "shares" else None


def only_the_target(client: int, tensors: Tensors) -> Tensors:
    return {"weights": torch.tensor([w if c == TARGET else 0 for c, w in enumerate(WEIGHTS)])}


def own_and_no_other(client: int, tensors: Tensors) -> Tensors:
    """Each is told its own weight, and that the others hardly weigh anything."""
    return {"weights": torch.tensor([w if c == client else 1 for c, w in enumerate(WEIGHTS)])}


def number(place: int, to_target: int, to_others: int) -> Callable[[int, Tensors], Tensors]:
    """One of the round's numbers, another for the target than for the others."""

    def change(client: int, tensors: Tensors) -> Tensors:
        terms = tensors["terms"].clone()
        terms[place] = to_target if client == TARGET else to_others
        return {"terms": terms}

    return change


def alone(client: int, tensors: Tensors) -> Tensors:
    """The target is told that the server is everyone else."""
    if client != TARGET:
        return {}
    keys = tensors["keys"].clone()
    for other in range(4):
        if other != TARGET:
            for which in range(2):
                public = masking.public_key(masking.fresh(masking.KEY))
                keys[other, which] = torch.frombuffer(bytearray(public), dtype=torch.uint8)
    return {"keys": keys}


ATTACKS: dict[str, tuple[Callable[[int, Tensors], Tensors], str]] = {
    "others weigh nothing": (only_the_target, "it is said to weigh 0 in the mean, and it weighs"),
    "each hears another weight of the others": (own_and_no_other, "do not open"),
    "each hears another whole": (lambda c, tensors: number(2, 14 + c, 14 + c)(c, tensors), "do not open"),
}
FOR_THE_TARGET: dict[str, Callable[[int, Tensors], Tensors]] = {
    "a whole of its own": number(2, 10**6, sum(WEIGHTS)),
    "a threshold of its own": number(0, 4, 3),
    "a federation of its own": number(3, 5, 4),
    "less noise from it": number(1, 4, 3),
    "everyone else is the server": alone,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_active_server_gets_no_sum(attack: str) -> None:
    bench, bent = federation(SECURE)
    change, reason = ATTACKS[attack]
    bent.order = told(change)
    start = bench.state
    with pytest.raises(QuorumError, match=reason):
        bench.round(1, quorum=0.5)
    assert not bent.of("masked") and bench.state is start  # nobody trained for such a round


@pytest.mark.parametrize("attack", FOR_THE_TARGET)
def test_who_is_told_another_thing_than_the_others_is_in_no_sum(attack: str) -> None:
    bench, bent = federation(SECURE)
    bent.order = told(FOR_THE_TARGET[attack])
    outcome = bench.round(1, quorum=0.5)
    assert sorted(outcome.clients) == [0, 1, 3] and "do not open" in outcome.left_out[TARGET]
    assert TARGET not in bent.of("masked")
    plain, other = federation()
    other.reply = lambda at, client, tensors: "no battery" if client == TARGET else None
    plain.round(1, quorum=0.5)
    assert equal(plain, bench)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda client, tensors: {"weights": torch.tensor([9, 9, 9, 9])}, "said to weigh 9 .* it weighs 1"),
        (
            lambda client, tensors: {"weights": torch.tensor([1 if c == client else 3 for c in range(4)])},
            "with privacy all clients weigh 1",
        ),
        (lambda client, tensors: number(1, 3, 3 + client % 2)(client, tensors), "do not open"),
        (lambda client, tensors: number(2, 4, 4 + client)(client, tensors), "do not open"),
    ],
)
def test_an_active_server_gets_no_less_noise(change: Any, reason: str) -> None:
    bench, bent = federation(SECURE, Privacy(clip=0.5, noise_multiplier=1.0, delta=1e-3))
    bent.order = told(change)
    with pytest.raises(QuorumError, match=reason):
        bench.round(1, quorum=0.5)
    assert not bent.of("masked")


class Between:
    """A server in everyone's place: to each client the others' keys are its own, and it seals all anew.

    It knows what everyone seals, so that all shares open although all clients were told other keys.
    """

    def __init__(self) -> None:
        self.private = {c: [masking.fresh(masking.KEY) for _ in range(2)] for c in range(4)}
        self.terms = dict[int, Tensors]()

    def order(self, at: str, client: int, tensors: Tensors) -> Tensors | None:
        if at != "shares":
            return None
        keys = tensors["keys"].clone()
        for other in set(range(4)) - {client}:
            for which, private in enumerate(self.private[other]):
                public = bytearray(masking.public_key(private))
                keys[other, which] = torch.frombuffer(public, dtype=torch.uint8)
        self.terms[client] = tensors | {"keys": keys}
        return self.terms[client]


def test_a_server_in_everyones_place_is_found_by_the_signatures() -> None:
    server = Between()
    bench, bent = federation(SECURE, identities=identities())
    bent.order = server.order
    with pytest.raises(QuorumError, match="were not signed by a client that it knows under this number"):
        bench.round(1, quorum=0.5)
    # without identities it gets as far as seals that it could make anew: signatures are what stops it
    bench, bent = federation(SECURE)
    bent.order = server.order
    with pytest.raises(QuorumError, match="do not open"):
        bench.round(1, quorum=0.5)
    assert len(bent.of("shares")) == 4


def test_keys_of_another_round_or_another_client_do_not_pass_for_this_ones() -> None:
    bench, bent = federation(SECURE, identities=identities())
    bench.round(1)
    old = bent.of("keys")[TARGET]

    def replayed(client: int, tensors: Tensors) -> Tensors:
        if client == TARGET:
            return {}
        keys, signatures = tensors["keys"].clone(), tensors["signatures"].clone()
        keys[TARGET], signatures[TARGET] = old["keys"], old["signature"]
        return {"keys": keys, "signatures": signatures}

    bent.order = told(replayed)
    with pytest.raises(QuorumError, match="were not signed"):
        bench.round(2, quorum=0.5)

    def swapped(client: int, tensors: Tensors) -> Tensors:
        order = [1, 0, 2, 3] if client > 1 else [0, 1, 3, 2]
        return {"keys": tensors["keys"][order], "signatures": tensors["signatures"][order]}

    bent.order = told(swapped)
    with pytest.raises(QuorumError, match="were not signed"):
        bench.round(3, quorum=0.5)


def test_an_invented_client_is_nobody() -> None:
    """The server adds a client to the cohort, whose secrets it knows."""
    bench, bent = federation(SECURE, identities=identities())
    sybil = Identity(ec.generate_private_key(ec.SECP384R1()), [])

    def one_more(client: int, tensors: Tensors) -> Tensors:
        publics = [masking.public_key(masking.fresh(masking.KEY)) for _ in range(2)]
        key = torch.frombuffer(bytearray(b"".join(publics)), dtype=torch.uint8).reshape(1, 2, masking.KEY)
        signed = bytearray(sybil.sign(1, 4, b"".join(publics)))
        return {
            "clients": torch.tensor([0, 1, 2, 3, 4]),
            "weights": torch.tensor([*WEIGHTS, 1]),
            "keys": torch.cat([tensors["keys"], key]),
            "signatures": torch.cat(
                [tensors["signatures"], torch.frombuffer(signed, dtype=torch.uint8).reshape(1, SIGNATURE)]
            ),
            "terms": tensors["terms"] + torch.tensor([0, 0, 1, 1]),
        }

    bent.order = told(one_more)
    with pytest.raises(QuorumError, match="client 4's were not signed"):
        bench.round(1, quorum=0.5)


def test_a_threshold_below_the_runs_own_settings_is_refused_by_all() -> None:
    """Everyone is told the same, so that all shares would open: three of four would do for a sum."""
    guards: list[SecureClient] = []
    bench, bent = federation(SECURE, guards=guards)
    guards[:] = [replace(guard, threshold=1.0) for guard in guards]
    bent.order = told(lambda client, tensors: number(0, 3, 3)(client, tensors))
    with pytest.raises(QuorumError, match="said to be 3 of 4 clients, and by the run's own settings it is 4"):
        bench.round(1, quorum=0.5)
    assert not bent.of("shares")


PRIVACY = Privacy(clip=0.5, noise_multiplier=1.0, delta=1e-3)


@pytest.mark.parametrize(
    "other",
    [
        {"privacy": Privacy(clip=0.5, noise_multiplier=1e-6, delta=1e-3)},
        {"privacy": Privacy(clip=1e6, noise_multiplier=1.0, delta=1e-3)},
        {"privacy": None},
        {"settings": b"another method"},
    ],
)
@pytest.mark.parametrize("phase", ["opened", "masked"])
def test_who_is_invited_anew_in_mid_round_with_other_settings_sends_nothing(phase: str, other: Any) -> None:
    """All agree on the round's noise and share their secrets; then the target is told that there is none."""
    guards: list[SecureClient] = []
    bench, bent = federation(SECURE, PRIVACY, guards=guards)

    def invited_anew(at: str, client: int, tensors: Tensors) -> None:
        if (at, client) == (phase, TARGET):
            guards[TARGET] = replace(guards[TARGET], **other)

    bent.order = invited_anew  # type: ignore[assignment]
    outcome = bench.round(1, quorum=0.5)
    assert sorted(outcome.clients) == [0, 1, 3]
    assert "other ones than those that it and the other clients agreed to" in outcome.left_out[TARGET]
    assert TARGET not in bent.of("masked")


def test_who_was_invited_with_other_settings_is_in_no_sum_with_the_others() -> None:
    guards: list[SecureClient] = []
    bench, _ = federation(SECURE, PRIVACY, guards=guards)
    guards[:] = [replace(g, settings=b"none" if c == TARGET else b"noise") for c, g in enumerate(guards)]
    outcome = bench.round(1, quorum=0.5)
    assert sorted(outcome.clients) == [0, 1, 3] and "do not open" in outcome.left_out[TARGET]


def test_signatures_change_no_bit_of_the_sum() -> None:
    signed, _ = federation(SECURE, identities=identities())
    plain, _ = federation()
    signed.round(1)
    plain.round(1)
    assert equal(signed, plain)
