"""A client's half of secure aggregation: five answers a round, each given once; see secure_server.py.

What a client keeps between the answers (its secrets, the others' shares) lies with what its method keeps,
under names with a prefix, and is thrown away with the last answer. A client that lost it drops out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.core.robust import RobustMean
from fedtune.core.types import ClientError, ClientResult, Payload, SumMethod
from fedtune.protection import masking
from fedtune.protection.identity import SIGNATURE, Identity
from fedtune.protection.masking import HASH, KEY, NONCE, SECRET, TAG
from fedtune.protection.noise import add_noise_, clip_
from fedtune.protection.settings import LARGEST_DEVIATIONS, Privacy
from fedtune.protection.share import flatten
from fedtune.protection.terms import Terms

SEALED = NONCE + 2 * SECRET + TAG  # bytes of the two shares that one client sends another
BEFORE = {"shares": "keys", "opened": "shares", "masked": "opened", "unmask": "masked"}
ONE_ITSELF, PAIRWISE = b"b", b"s"  # the two secrets: of a client's own mask, of its mask key


@dataclass(frozen=True)
class SecureClient:
    """A client's half of secure aggregation, in every round: what the client runner asks for.

    Attributes:
        method: Whose updates are summed.
        bits: Of a masked number.
        privacy: With it the client clips its update and adds its part of the noise before it masks it.
        identity: With it the client signs its keys, and takes no keys of others that they did not sign; None
            where all clients are in one process.
        robust: With its `max_norm` the client holds its update to that norm before anything else.
        weigh: What a client with so many examples weighs in the mean.
    """

    method: SumMethod[Any]
    bits: int
    privacy: Privacy | None = None
    identity: Identity | None = None
    robust: RobustMean | None = None
    weigh: Callable[[int], int] = lambda examples: examples

    def answer(
        self, phase: str, order: Payload, kept: Payload | None, *, client: int, round: int, examples: int
    ) -> tuple[Payload, Payload | None]:
        """The reply to an order of any phase but `masked`, and what the client keeps after it.

        Raises:
            ClientError: The order does not fit what came before it in this round, or asks for too much.
        """
        with _fits():
            return self._answer(phase, order, kept, client=client, round=round, examples=examples)

    def _answer(
        self, phase: str, order: Payload, kept: Payload | None, *, client: int, round: int, examples: int
    ) -> tuple[Payload, Payload | None]:
        if phase == "keys":
            return _keys(client, round, self.identity)
        kept = of_phase(phase, kept, round)
        if phase == "shares":
            terms = Terms.of(order)
            terms.check(client, self.weigh(examples), privacy=self.privacy is not None)
            if self.identity is not None:
                _check_signatures(terms, round, self.identity)
            bound = self.robust.max_norm if self.robust else None
            digest = terms.digest(round, self.bits, self.privacy, bound)
            return _shares(terms, digest, kept, client, round)
        if phase == "opened":
            return _opened(order, kept, client, round)
        if phase == "unmask":
            return _unmask(order, kept, client), None
        raise ClientError(f"secure aggregation has no phase {phase!r}")

    def mask(
        self, result: ClientResult, order: Payload, kept: Payload | None, *, client: int, round: int
    ) -> tuple[Payload, Payload]:
        """The reply to an order of phase `masked`, in place of what the method's step gave."""
        kept = of_phase("masked", kept, round)
        if self.robust is not None:
            result = replace(result, payload=self.robust.bounded(result.payload))
        with _fits():
            return mask(self.method, result, order, kept, client=client, bits=self.bits, privacy=self.privacy)


@contextmanager
def _fits() -> Iterator[None]:
    """An order that lacks something, a key that is none, an update that is too large: not in this round."""
    try:
        yield
    except ValueError as error:
        raise ClientError(str(error)) from error
    except LookupError as error:
        raise ClientError(f"the order lacks {error}") from error


def of_phase(phase: str, kept: Payload | None, round: int) -> Payload:
    """What is kept, if it is what this phase goes on from.

    Raises:
        ClientError: It is not. A phase that was answered twice could give away a mask.
    """
    if kept is None or kept.scalars["round"] != round or kept.scalars["phase"] != BEFORE[phase]:
        has = "nothing" if kept is None else f"phase {kept.scalars['phase']} of round {kept.scalars['round']}"
        raise ClientError(
            f"it was asked for phase {phase} of round {round}, which comes after phase {BEFORE[phase]} and "
            f"is answered once; it holds {has}"
        )
    return kept


def mask(
    method: SumMethod[Any],
    result: ClientResult,
    order: Payload,
    kept: Payload,
    *,
    client: int,
    bits: int,
    privacy: Privacy | None,
) -> tuple[Payload, Payload]:
    """What a client's update adds to the sum, under its masks, and what the client keeps.

    With privacy the update is clipped, and noise is added of which `noise_shares` clients together make the
    whole: no client sends anything that is not noisy already.

    Raises:
        ClientError: A number is too large for the sum, or others are in the sum than shared their secrets.
    """
    terms, summed = Terms.of(kept), order.tensors["clients"].tolist()
    opened = kept.tensors["senders"][kept.tensors["opened"]].tolist()
    share, needed = terms.share(client), max(terms.threshold, terms.noise_shares)
    if client not in summed or not set(summed) <= set(opened) or len(summed) < needed:
        raise ClientError(
            f"the sum is to be of clients {summed}; it must hold this one, at least {needed} clients, and "
            f"only those whose shares it could open, {opened}"
        )
    flat = flatten(share.summand(method, result.payload, terms.shapes), terms.shapes)
    if privacy is not None:
        bound = share.clip(privacy, method.unit)
        deviation = privacy.noise_multiplier * bound / math.sqrt(terms.noise_shares)
        add_noise_(clip_(flat, bound), deviation)
        largest = bound + LARGEST_DEVIATIONS * deviation
    else:
        flat = torch.cat([flat, share.loss(result.metrics)])
        largest = float(flat.abs().max())
    limit = 2.0 ** (bits - 1) / len(summed)
    if not largest < limit:
        raise ClientError(
            f"its update has a number of {largest * method.unit:.3g}; with "
            f"federation.secure_aggregation.bits={bits} it must be below {limit * method.unit:.3g}; "
            "set more bits"
        )
    vector = flat.numpy().view(np.uint64)
    masking.add_mask(vector, masking.derive(_bytes(kept.tensors["self"]), "self"), bits)
    private = masking.derive(_bytes(kept.tensors["seed"]), "mask key")
    for other in summed:
        if other != client:
            key = masking.agree(private, _bytes(terms.keys[terms.clients.index(other), 1]), "mask")
            masking.add_mask(vector, key, bits, subtract=other < client)
    now = _with(kept, "masked", summed=order.tensors["clients"])
    return Payload({"masked": masking.pack(vector, bits)}), now


def _keys(client: int, round: int, identity: Identity | None) -> tuple[Payload, Payload]:
    private, seed = masking.fresh(KEY), masking.fresh(SECRET)
    publics = masking.public_key(private), masking.public_key(masking.derive(seed, "mask key"))
    kept = Payload({"private": _tensor(private), "seed": _tensor(seed)}, {"round": round})
    both = b"".join(publics)
    signature = identity.sign(round, client, both) if identity else bytes(SIGNATURE)
    return Payload({"keys": _tensor(both, 2, KEY), "signature": _tensor(signature)}), _with(kept, "keys")


def _check_signatures(terms: Terms, round: int, identity: Identity) -> None:
    """Raises ClientError unless each client's keys were signed by that client."""
    for client, keys, signature in zip(terms.clients, terms.keys, terms.signatures, strict=True):
        if not identity.vouches(round, client, _bytes(keys), _bytes(signature)):
            raise ClientError(
                f"the keys it was sent as client {client}'s were not signed by a client that it knows under "
                "this number from its clients.json: someone takes the place of another, or the federation "
                "has clients that came later and this client needs the new clients.json"
            )


def _shares(terms: Terms, digest: bytes, kept: Payload, client: int, round: int) -> tuple[Payload, Payload]:
    clients, threshold, count = terms.clients, terms.threshold, len(terms.clients)
    seed, private = _bytes(kept.tensors["seed"]), _bytes(kept.tensors["private"])
    mine = [masking.public_key(private), masking.public_key(masking.derive(seed, "mask key"))]
    every = [_bytes(key) for key in terms.keys.reshape(-1, KEY)]
    place = clients.index(client)
    if every[2 * place : 2 * place + 2] != mine:
        raise ClientError("the keys it was sent as its own are not those that it made")
    if len(set(every)) != len(every):
        raise ClientError("two of the keys it was sent are the same: someone takes the place of another")
    own = masking.fresh(SECRET)
    dealt = list(
        zip(
            masking.split_secret(own, threshold, count),
            masking.split_secret(seed, threshold, count),
            strict=True,
        )
    )
    sealed, commitments = [], []
    for at, (other, pair) in enumerate(zip(clients, dealt, strict=True)):
        commitments += [commitment(*half, client, other) for half in zip(_KINDS, pair, strict=True)]
        if other == client:
            sealed.append(bytes(SEALED))
            continue
        key = masking.agree(private, every[2 * at], "shares")
        sealed.append(masking.seal(key, b"".join(pair), about(round, client, other, digest)))
    reply = {
        "sealed": _tensor(b"".join(sealed), count, SEALED),
        "commitments": _tensor(b"".join(commitments), count, 2, HASH),
        "secret": _tensor(masking.commit(ONE_ITSELF, own)),
    }
    now = _with(
        kept,
        "shares",
        self=_tensor(own),
        digest=_tensor(digest),
        dealt=_tensor(b"".join(dealt[place]), 2, SECRET),
        **terms.payload().tensors,
    )
    return Payload(reply), Payload(now.tensors, {**now.scalars, **terms.payload().scalars})


def _opened(order: Payload, kept: Payload, client: int, round: int) -> tuple[Payload, Payload]:
    terms, digest = Terms.of(kept), _bytes(kept.tensors["digest"])
    clients, keys = list(terms.clients), terms.keys
    senders = order.tensors["senders"].tolist()
    if senders != sorted(set(senders)) or not set(senders) <= set(clients) or client not in senders:
        raise ClientError(f"the shares it was sent are said to be of clients {senders}, out of {clients}")
    private = _bytes(kept.tensors["private"])
    shares, opened = [], []
    for at, sender in enumerate(senders):
        if sender == client:
            text: bytes | None = _bytes(kept.tensors["dealt"])
        else:
            key = masking.agree(private, _bytes(keys[clients.index(sender), 0]), "shares")
            sealed = _bytes(order.tensors["sealed"][at])
            text = masking.unseal(key, sealed, about(round, sender, client, digest))
        fits = text is not None and len(text) == 2 * SECRET
        for kind, share, wanted in zip(_KINDS, _halves(text), order.tensors["commitments"][at], strict=True):
            fits = fits and commitment(kind, share, sender, client) == _bytes(wanted)
        opened.append(fits)
        shares.append(text if fits and text is not None else bytes(2 * SECRET))
    now = _with(
        kept,
        "opened",
        senders=order.tensors["senders"],
        opened=torch.tensor(opened),
        received=_tensor(b"".join(shares), len(senders), 2, SECRET),
    )
    return Payload({"opened": torch.tensor(opened)}), now


def _unmask(order: Payload, kept: Payload, client: int) -> Payload:
    survivors, summed = order.tensors["survivors"].tolist(), kept.tensors["summed"].tolist()
    terms = Terms.of(kept)
    needed = max(terms.threshold, terms.noise_shares)
    if len(set(survivors)) < needed or not set(survivors) <= set(summed) or client not in survivors:
        raise ClientError(
            f"the sum is said to be of clients {survivors}, out of {summed}; it must hold this one and at "
            f"least {needed}"
        )
    senders, received = kept.tensors["senders"].tolist(), kept.tensors["received"]
    # of who is in the sum its own mask, of who dropped out its mask key: never both of one client
    rows = [received[senders.index(other), 0 if other in survivors else 1] for other in summed]
    return Payload({"shares": torch.stack(rows)})


_KINDS = (ONE_ITSELF, PAIRWISE)


def commitment(kind: bytes, share: bytes, sender: int, receiver: int) -> bytes:
    """What a sender tells the server about a share, so that its receiver cannot return another."""
    return masking.commit(kind, sender.to_bytes(8, "big"), receiver.to_bytes(8, "big"), share)


def about(round: int, sender: int, receiver: int, digest: bytes) -> bytes:
    """What is authenticated with sealed shares: with other terms they do not open."""
    return f"{round} {sender} {receiver} ".encode() + digest


def _halves(text: bytes | None) -> tuple[bytes, bytes]:
    return (text[:SECRET], text[SECRET:]) if text is not None else (b"", b"")


def _with(kept: Payload, phase: str, **tensors: Tensor) -> Payload:
    together: Mapping[str, Tensor] = {**kept.tensors, **tensors}
    return Payload(together, {**kept.scalars, "phase": phase})


def _tensor(data: bytes, *shape: int) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(shape or (-1,))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
