"""Rounds with clients in other processes: one exchange a client, message by message.

Knows neither Flower nor what a client does with a message. How a message gets to a client is the
`Channel`'s business, and what is said to one client in a round is a generator: it yields messages and is
sent the answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedtune.core.types import Arrival, Frame
from fedtune.measure.clock import Clock
from fedtune.transport.messages import Message

POLL_S = 0.1  # between looking for answers where the channel has none
LONGEST_S = 7 * 24 * 3600.0  # that a message lives, in a round without a deadline
LOST_S = 60.0  # that a client which was lost with its order is waited for
TOGETHER_BYTES = 64 * 1024 * 1024  # of answers that are fetched in one go

Exchange = Generator[Message, Message, Arrival]


class Unreachable(Exception):
    """A client cannot be written to now; the message says why."""


class Channel(Protocol):
    """Carries messages to clients and their answers back."""

    def push(self, client: int, message: Message, *, lifetime_s: float) -> str:
        """Sends a message that means nothing after `lifetime_s`; returns its id. Raises Unreachable."""

    def pull(self, ids: Sequence[str]) -> Iterable[tuple[str, Message]]:
        """The answers that are there, each with the id of the message that it answers, and given out once."""


@dataclass
class _Open:
    """A client's exchange in this round."""

    exchange: Exchange
    order_bytes: int
    message: Message | None = None  # the one that is not answered yet
    name: str = ""  # its id; empty while it has to be sent again
    again_until: float = 0.0  # as long as that is tried
    sending: bool = False  # has parts of the order left
    receiving: bool = False  # holds a part of the reply
    arrival: Arrival | None = None


class Remote:
    """A transport to clients in other processes.

    Args:
        channel: Carries the messages.
        exchange: (round, client, order's frame) -> what is said to the client.
        window: Clients spoken to at the same time; None: all of a round.
        deadline_s: Seconds after which a round does not wait any more.
        clock: Counts the waiting as the clients' training.
        rest: Waits as many seconds for answers, or less if one comes.
    """

    def __init__(
        self,
        channel: Channel,
        exchange: Callable[[int, int, Frame], Exchange],
        *,
        window: int | None,
        deadline_s: float | None,
        clock: Clock,
        rest: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rest = rest
        self._channel, self._exchange_with, self._clock = channel, exchange, clock
        self._window = math.inf if window is None else window
        self._deadline_s = math.inf if deadline_s is None else deadline_s

    def exchange(
        self, round: int, frames: Iterable[tuple[int, Frame]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        """One Arrival a client; of those who are silent at the deadline one that says so.

        An exchange's message with the field `more` is a part of an order that others follow.
        """
        end = time.monotonic() + self._deadline_s
        source, more = iter(frames), True
        open_: dict[int, _Open] = {}
        try:
            while True:
                while more and len(open_) < self._window:
                    order = next(source, None)
                    if order is None:
                        more = False
                        break
                    client, frame = order
                    open_[client] = _Open(self._exchange_with(round, client, frame), len(frame))
                    with self._clock.part("training"):
                        self._say(open_[client], client, None, end)
                    del order, frame  # the exchange has it now, and lets go of what is sent
                if not open_:
                    return
                with self._clock.part("training"):
                    done = self._wait(open_, end, in_plan_order)
                arrival = open_.pop(done).arrival
                assert arrival is not None
                yield arrival
        finally:
            for current in open_.values():
                current.exchange.close()

    def _wait(self, open_: dict[int, _Open], end: float, in_plan_order: bool) -> int:
        """Carries exchanges on until one is over, the first one if their order counts; returns whose."""
        while True:
            for client, current in open_.items():
                if current.arrival is not None:
                    return client
                if in_plan_order:
                    break
            if time.monotonic() >= end:
                client = next(iter(open_))
                open_[client].arrival = Arrival(client, fault=f"no reply within {self._deadline_s:g} s")
                return client
            if not self._carry_on(open_, end, in_plan_order):
                self._rest(max(0.0, min(POLL_S, end - time.monotonic())))

    def _carry_on(self, open_: dict[int, _Open], end: float, in_plan_order: bool) -> bool:
        """Takes answers that are there; False if there are none.

        A reply in parts is taken to its end before another is begun, and in plan order no reply is taken
        before its turn: what waits, waits with the channel, so that replies never are in memory together.
        """
        again = [(c, o) for c, o in open_.items() if o.arrival is None and not o.name]
        for client, current in again:
            self._push(current, client, end)
        waiting = {c: o for c, o in open_.items() if o.arrival is None and o.name}
        if not waiting:
            return False
        first = next(iter(waiting))
        if in_plan_order:  # only the first of all; it may be away
            waiting = {first: waiting[first]} if first == next(iter(open_)) else {}
        elif any(o.receiving for o in waiting.values()):
            waiting = {client: o for client, o in waiting.items() if o.receiving or o.sending}
        if not waiting:
            return False
        names = {o.name: client for client, o in waiting.items()}
        together = max(1, TOGETHER_BYTES // (1 + max(o.order_bytes for o in waiting.values())))
        ids = list(names)
        for at in range(0, len(ids), together):
            answers = list(self._channel.pull(ids[at : at + together]))
            for name, answer in answers:
                current = open_[names[name]]
                if answer.fields.get("lost"):
                    current.name, current.again_until = "", time.monotonic() + LOST_S
                else:
                    self._say(current, names[name], answer, end)
            if answers:
                return True
        return False

    def _say(self, current: _Open, client: int, answer: Message | None, end: float) -> None:
        """The next message of an exchange, after an answer."""
        current.message = None  # a part is not in memory beside the next one
        try:
            message = next(current.exchange) if answer is None else current.exchange.send(answer)
        except StopIteration as over:
            current.arrival = over.value
            return
        current.sending = bool(message.fields.get("more"))
        current.receiving = answer is not None and len(answer.body) > 0
        current.message, current.again_until = message, 0.0
        self._push(current, client, end)

    def _push(self, current: _Open, client: int, end: float) -> None:
        """Sends a message; one that was lost with its client again, as soon as that is back."""
        assert current.message is not None
        lifetime_s = min(end - time.monotonic(), LONGEST_S)
        if lifetime_s <= 0:
            return  # the deadline is noticed where it is waited for
        try:
            current.name = self._channel.push(client, current.message, lifetime_s=lifetime_s)
        except Unreachable as error:
            if not current.again_until:
                current.arrival = Arrival(client, fault=str(error))
            elif time.monotonic() >= current.again_until:
                lost = f"it was lost, and not back within {LOST_S:g} s"
                current.arrival = Arrival(client, fault=lost)
