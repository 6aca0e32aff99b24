"""What is lost between Flower's server and a client that is there, noticed.

Flower hands a message to a client's node once. If the connection breaks under it, or under the answer, the
node forgets it and goes on, Flower counts it as delivered, and nothing says so: without a deadline a round
would wait for ever. A node works on one message after another, in the order in which they were sent. So a
client that is silent for long is sent a second message that asks for nothing; once that is answered and the
first is not, the first was lost, and whoever waits for it is told so, as if Flower had. It also brings what a
node holds back that is one answer behind (`deploy/client.py` starts such a node anew).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from fedtune.transport.messages import HERE, Message
from fedtune.transport.network import Network
from fedtune.transport.remote import LONGEST_S, Unreachable

SILENT_S = 120.0  # after which a client is asked; more where answers have taken longer than half of that
AT_ONCE_S = 10.0  # an answer that comes so soon after a second message came because of it


class Noticing:
    """A channel over one that loses messages without a word.

    Args:
        channel: It delivers the messages of a client in order, and its answers likewise.
        now: A clock, in seconds.
    """

    def __init__(self, channel: Network, now: Callable[[], float] = time.monotonic) -> None:
        self._channel, self._now = channel, now
        self._sent: dict[str, tuple[int, float]] = {}  # client and moment, of messages that are not answered
        self._asked: dict[
            str, tuple[str, float]
        ] = {}  # the second message about each, if any, and its moment
        self._longest = 0.0  # seconds that an answer has taken

    def online(self) -> set[int]:
        """The clients that can be written to now."""
        return self._channel.online()

    def push(self, client: int, message: Message, *, lifetime_s: float) -> str:
        """Sends a message; returns its id. Raises Unreachable."""
        name = self._channel.push(client, message, lifetime_s=lifetime_s)
        self._sent[name] = client, self._now()
        return name

    def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
        """The answers that are there, and of what was lost one that says so."""
        silent = set(ids)
        for name, answer in self._channel.pull(ids):
            silent.discard(name)
            self._over(name, lost=bool(answer.fields.get("lost")))
            yield name, answer
        lost = self._answered(silent)
        for name, answer in self._channel.pull(lost) if lost else ():  # it may have come just before
            lost.remove(name)
            self._over(name, lost=bool(answer.fields.get("lost")))
            yield name, answer
        for name in lost:
            self._over(name, lost=True)
            yield name, Message({"fault": "it was lost on its way", "lost": True})

    def _answered(self, silent: set[str]) -> list[str]:
        """Of silent messages those whose second one has been answered; sends one about others."""
        found, asked = list[str](), {self._asked[name][0]: name for name in silent & self._asked.keys()}
        for second, answer in self._channel.pull(list(asked)) if asked else ():
            del self._asked[asked[second]]
            if not answer.fields.get("lost"):
                found.append(asked[second])
        for name in sorted(silent & self._sent.keys() - self._asked.keys() - set(found)):
            client, since = self._sent[name]
            if self._now() - since >= max(SILENT_S, 2 * self._longest):
                try:
                    second = self._channel.push(client, Message({"do": HERE}), lifetime_s=LONGEST_S)
                    self._asked[name] = second, self._now()
                except Unreachable:
                    continue  # Flower says itself what is lost with a client that is gone
        return found

    def _over(self, name: str, *, lost: bool) -> None:
        now = self._now()
        _, since = self._sent.pop(name, (0, now))
        _, asked = self._asked.pop(name, ("", -AT_ONCE_S))
        if not lost and now - asked >= AT_ONCE_S:  # else it says nothing of how long an answer takes
            self._longest = max(self._longest, now - since)
