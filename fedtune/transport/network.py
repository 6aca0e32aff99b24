"""The server's side of a federation over a network: who has joined, and what is said to a client in a round.

A client is invited to a run once: it gets the configuration and tells how many examples it has. One that
lost that (its machine is a new one) says so and is invited again. A frame travels in parts, each in a
message of its own, and the answer to the last part of an order is the first of the reply.

What clients keep between rounds stays with them. The server remembers which round it is from, in the same
place where simulated clients' states are, so that checkpoint, journal and resume need to know nothing of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Protocol

from fedtune.core.types import Arrival, Frame, Payload
from fedtune.core.wire import empty_frame, part_of
from fedtune.errors import foreign
from fedtune.transport.messages import PART_BYTES, Field, Message, is_whole, of_part
from fedtune.transport.remote import LONGEST_S, Channel, Exchange, Unreachable

LOOK_S = 0.5  # between looking for clients that have come
TRIES = 3  # of a part that comes damaged, and of an exchange whose client loses what it had


class Network(Channel, Protocol):
    """A channel that also knows who is there."""

    def online(self) -> set[int]:
        """The clients that can be written to now."""


@dataclass(frozen=True)
class Invitation:
    """What a client has to know before its first order.

    Attributes:
        run: Names the run; a resumed run has the name it had.
        config: The whole configuration, as JSON.
        weights_sha256: Of the base model, which a client that holds one must have too.
        quantization, quantized_sha256: How its layers are kept, and of the bits that are; the same holds.
    """

    run: str
    config: str
    weights_sha256: str
    quantization: str = "none"
    quantized_sha256: str = ""

    def message(self, client: int) -> Message:
        """The invitation of one client."""
        return Message(
            {
                "do": "join",
                "run": self.run,
                "client": client,
                "config": self.config,
                "weights": self.weights_sha256,
                "quantization": self.quantization,
                "quantized": self.quantized_sha256,
            }
        )


def invite_clients(
    network: Network,
    invitation: Invitation,
    expected: Mapping[int, str],
    *,
    wait_s: float | None,
    log_line: Callable[[str], None],
    most: Mapping[int, int] | None = None,
) -> dict[int, int]:
    """Invites every client that comes, until all have joined or refused, or `wait_s` is over.

    Args:
        network: Where clients come.
        invitation: What each is told.
        expected: The clients' names.
        wait_s: None: as long as it takes.
        log_line: Gets a line for everyone who joins or refuses.
        most: Examples that a client may register at most; who is not in it may register any number.

    Returns:
        Examples of each client that joined.
    """
    end = time.monotonic() + (math.inf if wait_s is None else wait_s)
    joined: dict[int, int] = {}
    done: set[int] = set()
    messages: dict[str, int] = {}
    while len(done) < len(expected) and time.monotonic() < end:
        for client in sorted(network.online() & expected.keys() - done - set(messages.values())):
            try:
                messages[network.push(client, invitation.message(client), lifetime_s=LONGEST_S)] = client
            except Unreachable:
                continue  # it has just gone; it is looked for again
        for name, answer in network.pull(list(messages)):
            client = messages.pop(name)
            if answer.fields.get("lost"):
                continue  # it went away with the message; once it is back it is invited again
            done.add(client)
            try:
                joined[client] = _registered(answer, (most or {}).get(client))
            except Refusal as error:
                log_line(f"client {client} ({expected[client]}) does not take part: {error}")
            else:
                log_line(f"client {client} ({expected[client]}) has joined with {joined[client]} examples")
        time.sleep(LOOK_S)
    for client in sorted(expected.keys() - done):
        log_line(f"client {client} ({expected[client]}) did not come within {wait_s:g} s")
    return joined


def _registered(answer: Message, most: int | None) -> int:
    examples = examples_of(answer)
    if most is not None and examples > most:
        raise Refusal(
            f"it registered {examples:,} examples, and clients.json expects {most:,} at most; if it has got "
            "more since, change that there"
        )
    return examples


class Refusal(Exception):
    """A client does not take part; the message is its reason."""


def examples_of(answer: Message) -> int:
    """Examples of a client, from its answer to an invitation. Raises Refusal."""
    if "fault" in answer.fields:
        raise Refusal(foreign(str(answer.fields["fault"])))
    try:
        examples = answer.number("examples")
    except ValueError as error:
        raise Refusal(str(error)) from None
    if not 0 < examples < 2**40:
        raise Refusal(f"it says that it has {examples} examples")
    return examples


def wait_for_clients(network: Network, clients: Mapping[int, str], *, wait_s: float) -> None:
    """Waits until the clients of a resumed run are back, for `wait_s` at most."""
    end = time.monotonic() + wait_s
    while clients.keys() - network.online() and time.monotonic() < end:
        time.sleep(LOOK_S)


class RoundExchange:
    """What is said to a client in a round.

    Args:
        invitation: For a client that does not know the run any more.
        examples: Examples of each client, as they joined.
        states: Which round each client's kept state is from, by client, in scalar `round`.
        limit: Bytes that a client's reply may have in this round.
    """

    def __init__(
        self,
        invitation: Invitation,
        examples: Mapping[int, int],
        states: MutableMapping[int, Payload],
        *,
        limit: Callable[[int], int],
    ) -> None:
        self._invitation, self._examples = invitation, examples
        self._states, self._limit = states, limit

    def __call__(self, round: int, client: int, frame: Frame) -> Exchange:
        """One round with one client; returns its arrival."""
        return self._guarded(round, client, frame)

    def _guarded(self, round: int, client: int, frame: Frame) -> Exchange:
        try:
            for _ in range(TRIES):
                answer = yield from self._order(round, client, frame)
                if answer.fields.get("unknown"):
                    known = examples_of((yield self._invitation.message(client)))
                    if known != self._examples[client]:
                        raise Refusal(f"it joined with {self._examples[client]} examples and now has {known}")
                    answer = yield from self._order(round, client, frame)
                if (arrival := (yield from self._reply(round, client, answer))) is not None:
                    return arrival
            raise Refusal(f"it was started anew {TRIES} times while its reply was fetched")
        except (Refusal, ValueError) as error:
            return Arrival(client, fault=str(error))

    def _order(self, round: int, client: int, frame: Frame) -> Generator[Message, Message, Message]:
        """Sends an order in parts, from wherever the client says that it is; returns what it answers then."""
        state = self._states.get(client)
        fields: dict[str, Field] = {
            "do": "order",
            "run": self._invitation.run,
            "round": round,
            "state": int(state.scalars["round"]) if state else 0,
            "bytes": len(frame),
        }
        at = tries = 0
        while True:
            end = min(at + PART_BYTES, len(frame))
            answer = yield _part(frame, at, end, fields)
            if "at" not in answer.fields:
                return answer
            at = answer.number("at")
            if at != end:  # the part came damaged, or the client was started anew
                tries += 1
            if at > end or at >= len(frame) or tries == TRIES:
                raise Refusal(
                    f"it has {at:,} bytes of its order, of which {end:,} were sent, and goes no further"
                )

    def _reply(self, round: int, client: int, answer: Message) -> Generator[Message, Message, Arrival | None]:
        """The reply whose first part an answer holds; None if the client has lost it meanwhile."""
        if "fault" in answer.fields:
            raise Refusal(foreign(str(answer.fields["fault"])))
        size, kept = answer.number("bytes"), answer.number("state")
        if size > (limit := self._limit(client)):
            raise Refusal(f"its reply has {size:,} bytes; at most {limit:,} are allowed here")
        buffer, at, tries = empty_frame(size), 0, 0
        while True:
            part = part_of(answer.body, 0, len(answer.body))
            if not part or at + len(part) > size:
                raise Refusal(f"its reply was cut: {at:,} of {size:,} bytes came")
            if is_whole(answer):
                buffer[at : at + len(part)] = part
                at += len(part)
            elif (tries := tries + 1) == TRIES:
                raise Refusal(f"its reply comes damaged: {at:,} of {size:,} bytes came as they were sent")
            if at == size:
                break
            del answer, part  # nothing of it is in memory beside the next one
            answer = yield Message({"do": "fetch", "run": self._invitation.run, "round": round, "at": at})
            if answer.fields.get("gone") or answer.fields.get("unknown"):
                return None
            if "fault" in answer.fields:
                raise Refusal(foreign(str(answer.fields["fault"])))
        if kept:
            self._states[client] = Payload(scalars={"round": kept})
        return Arrival(client, buffer)


def _part(frame: Frame, at: int, end: int, fields: Mapping[str, Field]) -> Message:
    """The message with one part of an order."""
    part = part_of(frame, at, end)
    more = {"more": True} if end < len(frame) else {}
    return Message({**fields, "at": at, **of_part(part), **more}, part)
