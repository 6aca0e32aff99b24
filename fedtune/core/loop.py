"""The one round loop: sample a cohort, send orders, check replies, fold them in, hold the quorum.

It knows no method and no transport. A client that fails, is late, or sends something that is not what
was asked is left out and named; a round under its quorum raises, and nothing of it is kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from fedtune.core.asking import LOSS
from fedtune.core.cohort import Cohort, RoundOutcome, hold_quorum
from fedtune.core.compression import Compression
from fedtune.core.faults import faults
from fedtune.core.ledger import EVALUATED, Ledger
from fedtune.core.relaying import RelayingMethod, enter
from fedtune.core.reported import PEAK_BYTES, reported
from fedtune.core.robust import UpdateMethod, Updates
from fedtune.core.types import (
    MODEL,
    SCORES,
    SECURE,
    Arrival,
    Frame,
    Method,
    Order,
    Payload,
    Reply,
    Scalar,
    ServerProtection,
    TensorSpec,
    Transport,
)
from fedtune.core.watch import sketch
from fedtune.core.wire import (
    HEADER,
    Content,
    FrameError,
    check,
    decode,
    encode,
    lay_out,
    manifest_bytes,
    some,
)
from fedtune.errors import foreign
from fedtune.measure.clock import Clock
from fedtune.measure.memory import COLUMNS, MemoryMeter, paused

log = logging.getLogger("fedtune")
S = TypeVar("S")

# of a method that does not say what an update is
_PLAIN = Updates(vector=lambda update: [update[n] for n in sorted(update) if update[n].is_floating_point()])
OPEN_SHAPE_LIMIT = 1 << 30  # bytes of a reply with a dimension that the order leaves open


class RoundLoop:
    """Runs rounds of one method over one transport, entering every message in the ledger."""

    def __init__(
        self,
        method: Method[Any],
        transport: Transport,
        ledger: Ledger,
        clock: Clock,
        device: torch.device,
        server_model: nn.Module | None = None,
        protection: ServerProtection | None = None,
        robust: Callable[[Iterable[Reply]], Iterable[Reply]] | None = None,
        compression: Compression | None = None,
        laid_out: bool = False,
        scores: bool = False,
    ) -> None:
        self._method, self._ledger = method, ledger
        self._scores = scores  # clients are asked to evaluate, and train nothing
        self.transport = transport  # may be another in the next round
        self._protection = protection  # where the server gets a sum, and no replies
        self._robust = robust  # what becomes of replies before the method's step
        self._compression = compression  # how updates travel
        self._encode = lay_out if laid_out else encode  # for a transport that sends orders in parts
        self._server_model = server_model  # counted as the server's memory
        self._clock, self._device = clock, device
        self._expects: dict[int, Order] = {}  # the orders that have no reply yet
        self._without: Mapping[int, str] = {}

    def reply_limit(self, client: int) -> int:
        """Bytes that a client's reply may have, for a transport that can refuse a longer one unread."""
        order = self._expects.get(client)
        return _reply_limit(self._wire_specs(order) if order else {})

    def run(
        self,
        state: S,
        cohort: Cohort,
        round: int,
        *,
        quorum: int,
        on_arrival: Callable[[S, RoundOutcome], None],
        without: Mapping[int, str] = {},
    ) -> tuple[S, RoundOutcome]:
        """One round.

        Args:
            state: The server's state before the round.
            cohort: The clients to ask.
            round: The round, counted from 1.
            quorum: Replies needed.
            on_arrival: Called after each reply that was folded in. With a method that folds replies in
                one by one it gets the state that holds them so far, else the state before the round.
            without: Clients whose replies are not used, and why. With them the round is one that was run
                before, from replies that the transport brings again: nothing is entered in the ledger.

        Returns:
            The server's state after the round, and what happened.

        Raises:
            QuorumError: Fewer than `quorum` clients gave a usable reply; names the others.
        """
        outcome = RoundOutcome(round, cohort.clients)
        self._without = without
        if self._method.arrival == "in-turn":
            for _ in cohort.clients:
                turn = self._replies(self._method.plan(state, round, cohort), cohort, outcome)
                state = self._fold(state, self._looked(list(turn), outcome), round)
                on_arrival(state, outcome)
            hold_quorum(outcome, quorum)
            return state, outcome
        orders = self._method.plan(state, round, cohort)
        if self._protection is not None and self._protection.in_phases:
            step = partial(
                self._protection.phased_step,
                cohort=cohort,
                outcome=outcome,
                quorum=quorum,
                ask=lambda orders: self._asked(orders, cohort, outcome),
                on_arrival=on_arrival,
            )
            return self._fold(state, orders, round, step), outcome
        replies = self._replies(orders, cohort, outcome)
        if self._method.arrival == "one-by-one":
            for reply in replies:
                state = self._fold(state, self._looked([reply], outcome), round)
                on_arrival(state, outcome)
            hold_quorum(outcome, quorum)
            return state, outcome
        watched = self._watched(replies, state, outcome, quorum, on_arrival)
        if self._protection is not None:
            step = partial(self._protection.step, cohort=cohort, outcome=outcome)
            return self._fold(state, watched, round, step), outcome
        new = self._fold(state, self._looked(watched, outcome), round)
        if isinstance(self._method, RelayingMethod) and not self._without:
            enter(self._ledger, self._method.relayed(state, cohort, outcome.clients), round)
        return new, outcome

    def losses(self, state: S, cohort: Cohort, round: int) -> tuple[dict[int, float], dict[int, str]]:
        """Asks clients for the loss of what a round would send them, before it: theirs, and who gave none.

        Args:
            state: The server's state before the round.
            cohort: Whom to ask.
            round: The round, counted from 1.
        """
        outcome, self._without = RoundOutcome(round, cohort.clients), {}
        spec, plan = {LOSS: TensorSpec(torch.float32, (1,))}, self._method.plan(state, round, cohort)
        orders = (Order(order.client, order.payload, spec, LOSS) for order in plan)
        found = {
            reply.client: float(reply.payload.tensors[LOSS])
            for reply in self._replies(orders, cohort, outcome)
        }
        return found, outcome.left_out

    def _fold(self, state: S, received: Iterable[Any], round: int, step: Callable[..., S] | None = None) -> S:
        if step is None and self._robust is not None:
            received = self._robust(received)
        meter = MemoryMeter(self._device)
        held = [self._server_model] if self._server_model is not None else []
        part = self._clock.part("aggregation")
        with faults(f"aggregation of round {round}"), part, meter.whole(resident=[*_tensors(state), *held]):
            state = (step or self._method.server_step)(state, received)
        self._ledger.memory(
            round=round,
            where="evaluation" if self._scores else "server",
            client=None,
            peak_bytes=meter.peak_bytes,
            how=meter.how,
            by_device=meter.by_device,
        )
        return state

    def _looked(self, replies: Iterable[Reply], outcome: RoundOutcome) -> Iterator[Reply]:
        """The replies, each after a look at its update."""
        about = self._method.updates() if isinstance(self._method, UpdateMethod) else _PLAIN
        for reply in replies:
            if self._method.uses_wire:
                with paused():  # some MB, whatever is aggregated: plans do not count it
                    outcome.seen[reply.client] = {
                        part: sketch(vector) for part, vector in about.vectors(reply.payload.tensors).items()
                    }
            yield reply
            del reply  # not in memory beside the next one

    def _watched(
        self,
        replies: Iterator[Reply],
        state: S,
        outcome: RoundOutcome,
        quorum: int,
        on_arrival: Callable[[S, RoundOutcome], None],
    ) -> Iterator[Reply]:
        """The replies as the server's step pulls them; the quorum is held before that step can end."""
        while True:
            with paused():  # in process a client trains here: not the server's memory
                reply = next(replies, None)
                if reply is None:
                    hold_quorum(outcome, quorum)
                    return
            yield reply
            del reply  # whoever takes it decides how long it is in memory
            on_arrival(state, outcome)

    def _asked(self, orders: Iterable[Order], cohort: Cohort, outcome: RoundOutcome) -> Iterator[Reply]:
        """The replies of one of several exchanges of a round; who fails there is left out of the round."""
        exchange = RoundOutcome(outcome.round, outcome.asked, left_out=outcome.left_out)
        replies = self._replies(orders, cohort, exchange)
        while True:
            with paused():
                reply = next(replies, None)
            if reply is None:
                return
            yield reply

    def _replies(self, orders: Iterable[Order], cohort: Cohort, outcome: RoundOutcome) -> Iterator[Reply]:
        expects: dict[int, Order] = {}
        self._expects = expects
        sent: dict[int, tuple[Order, int]] = {}  # and the bytes of its frame: not in the ledger yet

        def enter(client: int) -> None:
            order, framed = sent.pop(client)
            self._enter(outcome.round, order, "down", order.payload, framed)

        arrivals = self.transport.exchange(
            outcome.round,
            self._frames(orders, expects, sent, outcome.round),
            in_plan_order=self._method.arrival == "plan-order",
        )
        try:
            for arrival in arrivals:
                if arrival.client not in expects:
                    log.warning(
                        "round %d: client %d was not asked, or replied twice", outcome.round, arrival.client
                    )
                    continue
                asked = expects.pop(arrival.client)
                enter(arrival.client)  # only now: the same order, however many were sent ahead
                if arrival.client in self._without:
                    outcome.left_out[arrival.client] = self._without[arrival.client]
                    continue
                try:
                    if arrival.fault:
                        raise FrameError(arrival.fault)
                    reply = self._reply(arrival, asked, cohort, outcome.round)
                except FrameError as error:
                    reason = foreign(str(error))
                    outcome.left_out[arrival.client] = reason
                    if self._without:  # said when the round was run first
                        continue
                    log.warning("round %d: client %d is left out: %s", outcome.round, arrival.client, reason)
                    continue
                del arrival  # its frame is not in memory beside its tensors
                outcome.clients.append(reply.client)
                outcome.metrics[reply.client], outcome.examples[reply.client] = reply.metrics, reply.examples
                yield reply
                del reply
        finally:
            for client in list(sent):
                enter(client)

    def _frames(
        self,
        orders: Iterable[Order],
        expects: dict[int, Order],
        sent: dict[int, tuple[Order, int]],
        round: int,
    ) -> Iterator[tuple[int, Frame]]:
        payload: Payload | None = None
        frame: Frame = b""
        for order in orders:
            if order.payload is not payload:  # one payload for all is encoded once
                with self._clock.part("wire"):
                    meta: dict[str, Scalar] = {"round": round, **({SCORES: True} if self._scores else {})}
                    meta |= {"phase": order.phase} if order.phase else {}
                    payload, frame = order.payload, self._encode(Content(order.payload, meta))
            expects[order.client], sent[order.client] = order, (order, len(frame))
            yield order.client, frame

    def _wire_specs(self, order: Order) -> Mapping[str, TensorSpec]:
        compressed = self._compression is not None and order.phase != LOSS
        return self._compression.expects(order.expects) if self._compression and compressed else order.expects

    def _reply(self, arrival: Arrival, asked: Order, cohort: Cohort, round: int) -> Reply:
        specs = self._wire_specs(asked)
        with self._clock.part("wire"):
            content = decode(
                arrival.frame,
                max_bytes=_reply_limit(specs),
                max_manifest=manifest_bytes(specs),
            )
            sender = (content.meta.get("round"), content.meta.get("client"))
            if sender != (round, arrival.client):
                raise FrameError(
                    f"reply says round {sender[0]} of client {sender[1]}; round {round} was asked"
                )
            check(content.payload, specs)
            payload = self._restored(content.payload, asked)
            foreign_scalars = content.payload.scalars.keys() - asked.scalars
            if foreign_scalars:
                raise FrameError(f"scalars that were not asked for: {some(foreign_scalars)}")
            metrics, how = reported(content.meta, more=asked.metrics)
        self._enter(round, asked, "up", content.payload, len(arrival.frame))
        apart = {column: int(metrics.pop(column)) for column in COLUMNS if column in metrics}
        if not asked.phase and not self._without:  # under masks a client reports nothing of its own
            self._ledger.memory(
                round=round,
                where="evaluation" if self._scores else "client",
                client=arrival.client,
                peak_bytes=int(metrics.pop(PEAK_BYTES, 0)),
                how=how,
                by_device=apart,
            )
        return Reply(arrival.client, payload, metrics, cohort)

    def _restored(self, payload: Payload, asked: Order) -> Payload:
        if self._compression is None or asked.phase == LOSS:
            return payload
        payload = replace(payload, tensors=self._compression.restore(payload.tensors, asked.expects))
        check(payload, self._compression.restored(asked.expects))
        return payload

    def _enter(self, round: int, order: Order, direction: str, payload: Payload, framed: int) -> None:
        if not self._method.uses_wire or self._without:
            return
        # what a client is sent to hold is entered on its own: papers count it once, or not at all; and so is
        # what secure aggregation takes beyond the method's own content
        held, secure = (
            sum(t.nbytes for name, t in payload.tensors.items() if name.startswith(prefix))
            for prefix in (MODEL, SECURE)
        )
        if direction == "up":
            secure -= order.plain_bytes
        own = EVALUATED if self._scores else "train"
        parts = {
            "model": (held, held),
            "secure-aggregation": (secure, secure),
            own: (payload.nbytes - held - secure, framed - held - secure),
        }
        if order.phase == LOSS:
            parts = {"selection": (payload.nbytes, framed)}
        elif order.phase and order.phase != "masked":
            parts = {"secure-aggregation": (payload.nbytes, framed)}
        if self._scores:  # all of it: none of its bytes are of training
            parts = {own: (payload.nbytes, framed)}
        for kind, (payload_bytes, framed_bytes) in parts.items():
            if kind == own or framed_bytes:
                self._ledger.message(
                    round=round,
                    client=order.client,
                    direction=direction,
                    kind=kind,
                    payload_bytes=payload_bytes,
                    framed_bytes=framed_bytes,
                )


def _reply_limit(expects: Mapping[str, Any]) -> int:
    total = HEADER.size + manifest_bytes(expects)
    for spec in expects.values():
        if None in spec.shape:
            return OPEN_SHAPE_LIMIT
        total += math.prod(spec.shape) * spec.dtype.itemsize
    return total


def _tensors(state: object) -> Sequence[Any]:
    """Every tensor of a state, for the server's memory."""
    from fedtune.core.state import to_payload

    return list(to_payload(state).tensors.values())
