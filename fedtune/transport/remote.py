"""Rounds with clients in other processes: one conversation a client, letter by letter.

Knows neither Flower nor what a client does with a letter. How a letter gets to a client is the `Mail`'s
business, and what is said to one client in a round is a generator: it yields letters and is sent the answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedtune.core.loop import Arrival
from fedtune.measure.clock import Clock
from fedtune.transport.letters import Letter

POLL_S = 0.1  # between looking for answers where the mail has none
LONGEST_S = 7 * 24 * 3600.0  # that a letter lives, in a round without a deadline
LOST_S = 60.0  # that a client which was lost with its order is waited for
TOGETHER_BYTES = 64 * 1024 * 1024  # of answers that are fetched in one go

Talk = Generator[Letter, Letter, Arrival]


class Unreachable(Exception):
    """A client cannot be written to now; the message says why."""


class Mail(Protocol):
    """Carries letters to clients and their answers back."""

    def post(self, client: int, letter: Letter, *, lifetime_s: float) -> str:
        """Sends a letter that means nothing after `lifetime_s`; returns its id. Raises Unreachable."""

    def collect(self, ids: Sequence[str]) -> Iterable[tuple[str, Letter]]:
        """The answers that are there, each with the id of the letter that it answers, and given out once."""


@dataclass
class _Open:
    """A client's conversation in this round."""

    talk: Talk
    order_bytes: int
    letter: Letter | None = None  # the one that is not answered yet
    name: str = ""  # its id; empty while it has to be sent again
    again_until: float = 0.0  # as long as that is tried
    sending: bool = False  # has parts of the order left
    receiving: bool = False  # holds a part of the reply
    arrival: Arrival | None = None


class Remote:
    """A transport to clients in other processes.

    Args:
        mail: Carries the letters.
        talk: (round, client, order's frame) -> what is said to the client.
        window: Clients spoken to at the same time; None: all of a round.
        deadline_s: Seconds after which a round does not wait any more.
        clock: Counts the waiting as the clients' training.
    """

    def __init__(
        self,
        mail: Mail,
        talk: Callable[[int, int, bytes], Talk],
        *,
        window: int | None,
        deadline_s: float | None,
        clock: Clock,
    ) -> None:
        self._mail, self._talk, self._clock = mail, talk, clock
        self._window = math.inf if window is None else window
        self._deadline_s = math.inf if deadline_s is None else deadline_s

    def exchange(
        self, round: int, frames: Iterable[tuple[int, bytes]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        """One Arrival a client; of those who are silent at the deadline one that says so.

        A conversation's letter with the field `more` is a part of an order that others follow.
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
                    open_[client] = _Open(self._talk(round, client, frame), len(frame))
                    with self._clock.part("training"):
                        self._say(open_[client], client, None, end)
                    del order, frame  # the conversation has it now, and lets go of what is sent
                if not open_:
                    return
                with self._clock.part("training"):
                    done = self._wait(open_, end, in_plan_order)
                arrival = open_.pop(done).arrival
                assert arrival is not None
                yield arrival
        finally:
            for conversation in open_.values():
                conversation.talk.close()

    def _wait(self, open_: dict[int, _Open], end: float, in_plan_order: bool) -> int:
        """Carries conversations on until one is over, the first one if their order counts; returns whose."""
        while True:
            for client, conversation in open_.items():
                if conversation.arrival is not None:
                    return client
                if in_plan_order:
                    break
            if time.monotonic() >= end:
                client = next(iter(open_))
                open_[client].arrival = Arrival(client, fault=f"no reply within {self._deadline_s:g} s")
                return client
            if not self._carry_on(open_, end, in_plan_order):
                time.sleep(max(0.0, min(POLL_S, end - time.monotonic())))

    def _carry_on(self, open_: dict[int, _Open], end: float, in_plan_order: bool) -> bool:
        """Takes answers that are there; False if there are none.

        A reply in parts is taken to its end before another is begun, and in plan order no reply is taken
        before its turn: what waits, waits with the mail, so that replies never are in memory together.
        """
        again = [(c, o) for c, o in open_.items() if o.arrival is None and not o.name]
        for client, conversation in again:
            self._post(conversation, client, end)
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
            answers = list(self._mail.collect(ids[at : at + together]))
            for name, answer in answers:
                conversation = open_[names[name]]
                if answer.fields.get("lost"):
                    conversation.name, conversation.again_until = "", time.monotonic() + LOST_S
                else:
                    self._say(conversation, names[name], answer, end)
            if answers:
                return True
        return False

    def _say(self, conversation: _Open, client: int, answer: Letter | None, end: float) -> None:
        """The next letter of a conversation, after an answer."""
        try:
            letter = next(conversation.talk) if answer is None else conversation.talk.send(answer)
        except StopIteration as over:
            conversation.arrival = over.value
            return
        conversation.sending = bool(letter.fields.get("more"))
        conversation.receiving = answer is not None and len(answer.body) > 0
        conversation.letter, conversation.again_until = letter, 0.0
        self._post(conversation, client, end)

    def _post(self, conversation: _Open, client: int, end: float) -> None:
        """Sends a letter; one that was lost with its client again, as soon as that is back."""
        assert conversation.letter is not None
        lifetime_s = min(end - time.monotonic(), LONGEST_S)
        if lifetime_s <= 0:
            return  # the deadline is noticed where it is waited for
        try:
            conversation.name = self._mail.post(client, conversation.letter, lifetime_s=lifetime_s)
        except Unreachable as error:
            if not conversation.again_until:
                conversation.arrival = Arrival(client, fault=str(error))
            elif time.monotonic() >= conversation.again_until:
                lost = f"it was lost, and not back within {LOST_S:g} s"
                conversation.arrival = Arrival(client, fault=lost)
