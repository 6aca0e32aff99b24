"""The server's side of a federation over a network: who has joined, and what is said to a client in a round.

A client is introduced to a run once: it gets the configuration and tells how many examples it has. One that
lost that (its machine is a new one) says so and is introduced again. A frame travels in parts, each in a
letter of its own, and the answer to the last part of an order is the first of the reply.

What clients keep between rounds stays with them. The server remembers which round it is from, in the same
place where simulated clients' states are, so that checkpoint, journal and resume need to know nothing of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Protocol

from fedtune.core.loop import Arrival
from fedtune.core.types import Payload
from fedtune.core.wire import room
from fedtune.transport.letters import PART_BYTES, Letter
from fedtune.transport.remote import LONGEST_S, Mail, Talk, Unreachable

LOOK_S = 0.5  # between looking for clients that have come


class Network(Mail, Protocol):
    """A mail that also knows who is there."""

    def online(self) -> set[int]:
        """The clients that can be written to now."""


@dataclass(frozen=True)
class Introduction:
    """What a client has to know before its first order.

    Attributes:
        run: Names the run; a resumed run has the name it had.
        config: The whole configuration, as JSON.
        weights_sha256: Of the base model, which a client that holds one must have too.
    """

    run: str
    config: str
    weights_sha256: str

    def letter(self, client: int) -> Letter:
        """The introduction of one client."""
        return Letter(
            {
                "do": "join",
                "run": self.run,
                "client": client,
                "config": self.config,
                "weights": self.weights_sha256,
            }
        )


def gather(
    network: Network,
    introduction: Introduction,
    expected: Mapping[int, str],
    *,
    wait_s: float | None,
    tell: Callable[[str], None],
) -> dict[int, int]:
    """Introduces every client that comes, until all have joined or refused, or `wait_s` is over.

    Args:
        network: Where clients come.
        introduction: What each is told.
        expected: The clients' names.
        wait_s: None: as long as it takes.
        tell: Gets a line for everyone who joins or refuses.

    Returns:
        Examples of each client that joined.
    """
    end = time.monotonic() + (math.inf if wait_s is None else wait_s)
    joined: dict[int, int] = {}
    done: set[int] = set()
    letters: dict[str, int] = {}
    while len(done) < len(expected) and time.monotonic() < end:
        for client in sorted(network.online() & expected.keys() - done - set(letters.values())):
            try:
                letters[network.post(client, introduction.letter(client), lifetime_s=LONGEST_S)] = client
            except Unreachable:
                continue  # it has just gone; it is looked for again
        for name, answer in network.collect(list(letters)):
            client = letters.pop(name)
            if answer.fields.get("lost"):
                continue  # it went away with the letter; once it is back it is introduced again
            done.add(client)
            try:
                joined[client] = examples_of(answer)
            except Refusal as error:
                tell(f"client {client} ({expected[client]}) does not take part: {error}")
            else:
                tell(f"client {client} ({expected[client]}) has joined with {joined[client]} examples")
        time.sleep(LOOK_S)
    for client in sorted(expected.keys() - done):
        tell(f"client {client} ({expected[client]}) did not come within {wait_s:g} s")
    return joined


class Refusal(Exception):
    """A client does not take part; the message is its reason."""


def examples_of(answer: Letter) -> int:
    """Examples of a client, from its answer to an introduction. Raises Refusal."""
    if "fault" in answer.fields:
        raise Refusal(str(answer.fields["fault"]))
    try:
        examples = answer.number("examples")
    except ValueError as error:
        raise Refusal(str(error)) from None
    if not 0 < examples < 2**40:
        raise Refusal(f"it says that it has {examples} examples")
    return examples


def wait_for(network: Network, clients: Mapping[int, str], *, wait_s: float) -> None:
    """Waits until the clients of a resumed run are back, for `wait_s` at most."""
    end = time.monotonic() + wait_s
    while clients.keys() - network.online() and time.monotonic() < end:
        time.sleep(LOOK_S)


class Conversation:
    """What is said to a client in a round.

    Args:
        introduction: For a client that does not know the run any more.
        examples: Examples of each client, as they joined.
        states: Which round each client's kept state is from, by client, in scalar `round`.
        limit: Bytes that a client's reply may have in this round.
    """

    def __init__(
        self,
        introduction: Introduction,
        examples: Mapping[int, int],
        states: MutableMapping[int, Payload],
        *,
        limit: Callable[[int], int],
    ) -> None:
        self._introduction, self._examples = introduction, examples
        self._states, self._limit = states, limit

    def __call__(self, round: int, client: int, frame: bytes) -> Talk:
        """One round with one client; returns its arrival."""
        return self._guarded(round, client, frame)

    def _guarded(self, round: int, client: int, frame: bytes) -> Talk:
        try:
            answer = yield from self._order(round, client, frame)
            if answer.fields.get("unknown"):
                known = examples_of((yield self._introduction.letter(client)))
                if known != self._examples[client]:
                    raise Refusal(f"it joined with {self._examples[client]} examples and now has {known}")
                answer = yield from self._order(round, client, frame)
            del frame
            return (yield from self._reply(round, client, answer))
        except (Refusal, ValueError) as error:
            return Arrival(client, fault=str(error))

    def _order(self, round: int, client: int, frame: bytes) -> Generator[Letter, Letter, Letter]:
        state = self._states.get(client)
        fields: dict[str, int | float | str | bool] = {
            "do": "order",
            "run": self._introduction.run,
            "round": round,
            "state": int(state.scalars["round"]) if state else 0,
            "bytes": len(frame),
        }
        view = memoryview(frame)
        answer = Letter()
        for at in range(0, len(frame), PART_BYTES):
            more = at + PART_BYTES < len(frame)
            part = view[at : at + PART_BYTES]
            answer = yield Letter({**fields, "at": at} | ({"more": True} if more else {}), part)
            if answer.fields.get("unknown") or "fault" in answer.fields:
                break
        return answer

    def _reply(self, round: int, client: int, answer: Letter) -> Talk:
        if "fault" in answer.fields:
            raise Refusal(str(answer.fields["fault"]))
        size, kept = answer.number("bytes"), answer.number("state")
        if size > (limit := self._limit(client)):
            raise Refusal(f"its reply has {size:,} bytes; at most {limit:,} are allowed here")
        buffer, at = room(size), 0
        while True:
            part = answer.body
            if not part or at + len(part) > size:
                raise Refusal(f"its reply was cut: {at:,} of {size:,} bytes came")
            buffer[at : at + len(part)] = part
            at += len(part)
            if at == size:
                break
            del part
            answer = yield Letter({"do": "fetch", "run": self._introduction.run, "round": round, "at": at})
            if "fault" in answer.fields:
                raise Refusal(str(answer.fields["fault"]))
        if kept:
            self._states[client] = Payload(scalars={"round": kept})
        return Arrival(client, buffer)
