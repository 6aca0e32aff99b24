"""The server's half of secure aggregation: it learns the sum of the clients' vectors and no vector.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (2017), Figure 4. A
round has five exchanges:

    keys      each client makes two key pairs, for sealing shares and for masks, and signs the public keys
    shares    it checks the round's terms and everyone's signature (terms.py, identity.py), and splits its
              mask secret s and the secret b of its own mask among all, sealed for each
    opened    it gets the others' shares and says which of them it could open
    masked    it trains, and sends x + PRG(b) + Σ ± PRG(key with each other client)  mod 2^k
    unmask    who is still there returns, of each client in the sum its share of b, of each other one of s

Pairwise masks cancel between two clients of the sum; those with a client that dropped out are made again from
its s, and each own mask from its b. A client never returns both for one other client.

Deviations: `opened` is an exchange of its own, so that a client whose shares do not open is left out before
anyone trains; every share is committed to by a hash, so that who returns another is named; instead of a last
exchange in which clients compare whom the sum is of, the threshold is above one half and each client answers
each phase once, so that a server alone cannot have enough shares of both secrets of one client.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedtune.core.cohort import QuorumError, RoundOutcome, hold_quorum, who_and_why
from fedtune.core.types import SECURE, Order, Payload, Reply, Scalar, TensorSpec
from fedtune.protection import masking
from fedtune.protection.identity import SIGNATURE
from fedtune.protection.masking import HASH, KEY, SECRET
from fedtune.protection.secure_client import ONE_ITSELF, PAIRWISE, SEALED, commitment
from fedtune.protection.share import CohortShare, Shapes
from fedtune.protection.terms import Terms

log = logging.getLogger("fedtune")
V = TypeVar("V")
Ask = Callable[[Iterable[Order]], Iterator[Reply]]


class SecureRound:
    """One round.

    Args:
        outcome: Of the round; clients are entered as their vectors come, and whoever drops out before.
        ask: Sends orders and yields the replies that are as asked; enters the others in the outcome.
        threshold: Clients that must stay to the end.
        quorum: Vectors that the round needs, if that is more.
        bits: Of a masked number.
    """

    def __init__(self, outcome: RoundOutcome, ask: Ask, *, threshold: int, quorum: int, bits: int) -> None:
        self._outcome, self._ask = outcome, ask
        self._threshold, self._quorum, self._bits = threshold, quorum, bits

    def run(
        self,
        orders: Iterable[Order],
        *,
        shares: Mapping[int, CohortShare],
        shapes: Shapes,
        length: int,
        on_arrival: Callable[[], None],
    ) -> Tensor:
        """The sum of the clients' vectors, int64 (length).

        Args:
            orders: The method's, one a client; they go out with the fourth exchange.
            shares: Of each client in the sum.
            shapes: Of the tensors that the vector is made of.
            length: Of the vector.
            on_arrival: Called after each vector that was added.

        Raises:
            QuorumError: Too few clients stayed, or a client's secrets do not fit together; it is named.
        """
        keys = self._keys()
        dealt = self._shares(keys, shares, shapes)
        self._opened(dealt)
        vector = self._masked(orders, sorted(dealt), length, on_arrival)
        self._unmask(vector, keys, dealt)
        return masking.signed(vector, self._bits)

    def _keys(self) -> dict[int, Tensor]:
        order, expects = Payload(), _spec(keys=(2, KEY), signature=(SIGNATURE,))
        asked = [Order(client, order, expects, "keys") for client in self._outcome.asked]
        replies = {reply.client: reply for reply in self._ask(asked)}
        keys = {client: _own(reply, "keys") for client, reply in replies.items()}
        self._signatures = {client: _own(reply, "signature") for client, reply in replies.items()}
        seen = Counter(_bytes(key) for pair in keys.values() for key in pair)
        for client, pair in sorted(keys.items()):
            if any(seen[_bytes(key)] > 1 for key in pair):
                self._leave_out(client, "it sent a key that came twice: someone takes the place of another")
            elif not all(_is_public_key(_bytes(key)) for key in pair):
                self._leave_out(client, "it sent a key that gives everyone the same secret")
        return self._staying(keys, "keys")

    def _shares(
        self, keys: Mapping[int, Tensor], shares: Mapping[int, CohortShare], shapes: Shapes
    ) -> dict[int, Payload]:
        clients, count = sorted(keys), len(keys)
        one = shares[clients[0]]  # the whole and the federation's size are the same for all
        terms = Terms(
            tuple(clients),
            torch.stack([keys[client] for client in clients]),
            torch.stack([self._signatures[client] for client in clients]),
            tuple(shares[client].weight for client in clients),
            threshold=self._threshold,
            noise_shares=max(self._threshold, self._quorum),
            total=one.total,
            population=one.population,
            shapes=shapes,
        ).payload()
        payload = _payload(terms.scalars, **terms.tensors)
        expects = _spec(sealed=(count, SEALED), commitments=(count, 2, HASH), secret=(HASH,))
        replies = self._ask(Order(client, payload, expects, "shares") for client in clients)
        self._holders = clients
        return self._staying({reply.client: reply.payload for reply in replies}, "shares")

    def _opened(self, dealt: dict[int, Payload]) -> None:
        """Leaves out who dealt shares that do not open, and who does not answer; `dealt` is changed."""
        senders = sorted(dealt)
        asked = []
        for client in senders:
            at = self._holders.index(client)
            payload = _payload(
                senders=torch.tensor(senders),
                sealed=torch.stack([_tensor(dealt[sender], "sealed")[at] for sender in senders]),
                commitments=torch.stack([_tensor(dealt[sender], "commitments")[at] for sender in senders]),
            )
            expects = {SECURE + "opened": TensorSpec(torch.bool, (len(senders),))}
            asked.append(Order(client, payload, expects, "opened"))
        opened = {
            reply.client: dict(zip(senders, _own(reply, "opened").tolist(), strict=True))
            for reply in self._ask(asked)
        }
        self._staying(dealt, "opened", opened)
        for sender in sorted(dealt):  # one against many: which of two is at fault, the others decide
            others = [client for client in opened if client != sender]
            failed = [client for client in others if not opened[client][sender]]
            if 2 * len(failed) > len(others):
                self._leave_out(sender, f"the shares it sent do not open, so clients {failed} say")
        opened = {client: opened[client] for client in self._staying(dealt, "opened")}
        for client, could in opened.items():
            failed = [sender for sender in opened if not could[sender]]
            if failed:
                self._leave_out(
                    client, f"it could not open the shares of clients {failed}, which others could"
                )
        self._staying(dealt, "opened")

    def _masked(
        self, orders: Iterable[Order], clients: list[int], length: int, on_arrival: Callable[[], None]
    ) -> masking.Vector:
        expects, width = _spec(masked=(length, self._bits // 8)), self._bits // 8
        self._summed = clients
        added = _payload(clients=torch.tensor(clients))

        def with_masks() -> Iterator[Order]:
            sent: tuple[Payload, Payload] | None = None
            for order in orders:
                if order.client in clients:
                    if sent is None or sent[0] is not order.payload:  # one payload for all stays one
                        whole = Payload({**order.payload.tensors, **added.tensors}, order.payload.scalars)
                        sent = order.payload, whole
                    plain = sum(math.prod(s.shape) * s.dtype.itemsize for s in order.expects.values())  # type: ignore[arg-type, misc]
                    yield Order(order.client, sent[1], expects, "masked", min(plain, length * width))

        vector = np.zeros(length, dtype=np.uint64)
        outcome = self._outcome
        for reply in self._ask(with_masks()):
            masking.add_packed(vector, _own(reply, "masked"))
            outcome.clients.append(reply.client)
            outcome.metrics[reply.client], outcome.examples[reply.client] = {}, reply.examples
            on_arrival()
        hold_quorum(outcome, self._quorum)
        self._hold(len(outcome.clients), "masked")
        return vector

    def _unmask(
        self, vector: masking.Vector, keys: Mapping[int, Tensor], dealt: Mapping[int, Payload]
    ) -> None:
        """Takes the masks off the sum, in place."""
        survivors = sorted(self._outcome.clients)
        payload, expects = (
            _payload(survivors=torch.tensor(survivors)),
            _spec(shares=(len(self._summed), SECRET)),
        )
        returned: dict[int, Tensor] = {}
        for reply in self._ask(Order(client, payload, expects, "unmask") for client in survivors):
            rows = _own(reply, "shares")
            wrong = self._wrong(reply.client, rows, survivors, dealt)
            if wrong:
                log.warning(
                    "round %d: client %d returned other shares of clients %s than it was given; "
                    "they are not used",
                    self._outcome.round,
                    reply.client,
                    wrong,
                )
            else:
                returned[reply.client] = rows
        self._hold(len(returned), "unmask")
        for client in survivors:  # who fell silent only now is in the sum all the same
            self._outcome.left_out.pop(client, None)
        some = sorted(returned)[: self._threshold]
        for row, client in enumerate(self._summed):
            shares = {self._holders.index(other): _bytes(returned[other][row]) for other in some}
            secret = masking.join_shares(shares)
            if client in survivors:
                self._check(
                    client, masking.commit(ONE_ITSELF, secret) == _bytes(_tensor(dealt[client], "secret"))
                )
                masking.add_mask(vector, masking.derive(secret, "self"), self._bits, subtract=True)
                continue
            private = masking.derive(secret, "mask key")
            self._check(client, masking.public_key(private) == _bytes(keys[client][1]))
            for other in survivors:  # what `other` added for this pair is taken away again
                key = masking.agree(private, _bytes(keys[other][1]), "mask")
                masking.add_mask(vector, key, self._bits, subtract=other < client)

    def _wrong(
        self, client: int, rows: Tensor, survivors: list[int], dealt: Mapping[int, Payload]
    ) -> list[int]:
        """Whose shares a client returned otherwise than they were committed to."""
        at, wrong = self._holders.index(client), []
        for row, sender in zip(rows, self._summed, strict=True):
            kind, which = (ONE_ITSELF, 0) if sender in survivors else (PAIRWISE, 1)
            wanted = _bytes(_tensor(dealt[sender], "commitments")[at, which])
            if commitment(kind, _bytes(row), sender, client) != wanted:
                wrong.append(sender)
        return wrong

    def _check(self, client: int, fits: bool) -> None:
        if not fits:
            raise QuorumError(
                f"round {self._outcome.round}: the shares that client {client} dealt do not give the secret "
                "that it committed to, and without it the sum cannot be unmasked. Leave that client out, and "
                "continue with --resume"
            )

    def _leave_out(self, client: int, reason: str) -> None:
        self._outcome.left_out[client] = reason
        log.warning("round %d: client %d is left out: %s", self._outcome.round, client, reason)

    def _staying(
        self, those: dict[int, V], phase: str, answered: Iterable[int] | None = None
    ) -> dict[int, V]:
        """Takes out of `those`, in place, who was left out or did not answer; they must still be enough."""
        for client in list(those):
            if client in self._outcome.left_out or (answered is not None and client not in answered):
                del those[client]
        self._hold(len(those), phase)
        return those

    def _hold(self, there: int, phase: str) -> None:
        if there >= self._threshold:
            return
        left_out = who_and_why(self._outcome.left_out)
        raise QuorumError(
            f"round {self._outcome.round}: {there} of {len(self._outcome.asked)} clients were there after "
            f"phase {phase} of secure aggregation, whose threshold is {self._threshold}. Nothing was "
            f"unmasked. Left out: {left_out or 'nobody else'}. See to that and continue with --resume; "
            "other settings, such as a lower federation.secure_aggregation.threshold, need a new run."
        )


def _payload(scalars: Mapping[str, Scalar] | None = None, **tensors: Tensor) -> Payload:
    named = {SECURE + name: value for name, value in (scalars or {}).items()}
    return Payload({SECURE + name: tensor for name, tensor in tensors.items()}, named)


def _spec(**shapes: tuple[int, ...]) -> dict[str, TensorSpec]:
    return {SECURE + name: TensorSpec(torch.uint8, shape) for name, shape in shapes.items()}


def _own(reply: Reply, name: str) -> Tensor:
    return _tensor(reply.payload, name)


def _tensor(payload: Payload, name: str) -> Tensor:
    return payload.tensors[SECURE + name]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _is_public_key(key: bytes) -> bool:
    try:
        masking.agree(masking.fresh(KEY), key, "test")
    except ValueError:
        return False
    return True
