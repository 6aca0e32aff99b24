"""Messages that vanish between Flower's server and a client that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fedtune.core.types import Payload
from fedtune.measure.clock import Clock
from fedtune.transport import lost, network, remote
from fedtune.transport.acceptance import Acceptance
from fedtune.transport.lost import Noticing
from fedtune.transport.messages import HERE, Message
from fedtune.transport.network import Invitation, RoundExchange, invite_clients
from fedtune.transport.remote import Remote, Unreachable
from fedtune.transport.worker import JoinedRun, Worker


class Time:
    """Seconds that pass when somebody looks for answers."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Line:
    """A channel to clients that answer in turn; `loses` says which of a client's messages vanish, from 0.

    A message's answer is there once `takes` seconds have passed since the client had nothing else to do.
    """

    def __init__(
        self,
        time: Time,
        answer: Callable[[int, Message], Message],
        *,
        loses: Sequence[tuple[int, int]] = (),
        takes: Callable[[Message], float] = lambda message: 1.0,
    ) -> None:
        self.time, self.answer, self.loses, self.takes = time, answer, loses, takes
        self.sent: dict[int, list[Message]] = {}
        self.ready: dict[str, float] = {}
        self.busy: dict[int, float] = {}
        self.gone: set[int] = set()

    def online(self) -> set[int]:
        return {0, 1} - self.gone

    def push(self, client: int, message: Message, *, lifetime_s: float) -> str:
        if client in self.gone:
            raise Unreachable("it is not connected")
        before = self.sent.setdefault(client, [])
        before.append(message)
        name = f"{client} {len(before) - 1}"
        if (client, len(before) - 1) not in self.loses:
            start = max(self.busy.get(client, 0.0), self.time.seconds)
            self.busy[client] = self.ready[name] = start + self.takes(message)
        return name

    def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
        self.time.seconds += 1.0
        for name in ids:
            if self.ready.get(name, float("inf")) <= self.time.seconds:
                del self.ready[name]
                client, number = map(int, name.split())
                yield name, self.answer(client, self.sent[client][number])


def echo(client: int, message: Message) -> Message:
    return Message({} if message.fields["do"] == HERE else {"of": message.number("n")})


def until(channel: Noticing, names: list[str], time: Time, seconds: float) -> list[tuple[str, Message]]:
    found: list[tuple[str, Message]] = []
    while time.seconds < seconds and len(found) < len(names):
        found += list(channel.pull([name for name in names if name not in dict(found)]))
    return found


def order(number: int) -> Message:
    return Message({"do": "order", "n": number})


def test_a_message_that_vanished_is_told_as_lost_and_an_answer_that_vanished_too() -> None:
    time = Time()
    line = Line(time, echo, loses=[(0, 0)])
    channel = Noticing(line, time)
    names = [channel.push(client, order(client), lifetime_s=1e6) for client in (0, 1)]
    (first,) = until(channel, names[1:], time, 100)
    assert first == (names[1], Message({"of": 1}))
    (found,) = until(channel, names[:1], time, 1000)
    assert found[0] == names[0] and found[1].fields == {"fault": "it was lost on its way", "lost": True}
    assert lost.SILENT_S <= time.seconds < lost.SILENT_S + 10
    assert [message.fields["do"] for message in line.sent[0]] == ["order", HERE]
    assert [message.fields["do"] for message in line.sent[1]] == ["order"]
    again = channel.push(0, order(0), lifetime_s=1e6)  # and the next one is told apart from it
    assert until(channel, [again], time, 1000) == [(again, Message({"of": 0}))]


def test_a_client_that_takes_long_is_asked_once_and_not_taken_for_lost() -> None:
    """Its second message is answered behind the first; in the next round it has the time that it took."""
    time = Time()
    line = Line(time, echo, takes=lambda message: 1.0 if message.fields["do"] == HERE else 1000.0)
    channel = Noticing(line, time)
    for number, asked in ((0, 1), (1, 1), (2, 1)):
        name = channel.push(0, order(number), lifetime_s=1e6)
        assert until(channel, [name], time, 1e5) == [(name, Message({"of": number}))]
        assert sum(message.fields["do"] == HERE for message in line.sent[0]) == asked


def test_a_node_that_is_one_answer_behind_costs_a_round_the_same_time_each() -> None:
    """It sends an answer when the next message is there: the second message brings the first one's."""

    class Behind(Line):
        def push(self, client: int, message: Message, *, lifetime_s: float) -> str:
            name = super().push(client, message, lifetime_s=lifetime_s)
            before = f"{client} {len(self.sent[client]) - 2}"
            self.held[name] = self.ready.pop(name)
            if before in self.held:
                self.ready[before] = max(self.held.pop(before), self.time.seconds + 2)
            return name

        held: dict[str, float]

    time = Time()
    line = Behind(time, echo)
    line.held = {}
    channel = Noticing(line, time)
    for number in range(5):
        before = time.seconds
        name = channel.push(0, order(number), lifetime_s=1e6)
        assert until(channel, [name], time, 1e5) == [(name, Message({"of": number}))]
        assert lost.SILENT_S <= time.seconds - before < lost.SILENT_S + lost.AT_ONCE_S


def test_an_answer_that_came_just_before_counts() -> None:
    """The order's answer and the second message's come in one look, in either order of the ids."""
    time = Time()
    line = Line(time, echo)
    channel = Noticing(line, time)
    name = channel.push(0, order(0), lifetime_s=1e6)
    line.ready.pop(name)
    for _ in range(200):  # it is asked; both answers come while nobody looks
        assert list(channel.pull([name])) == []
        if len(line.sent[0]) == 2:
            break
    second = "0 1"
    line.ready[second] = time.seconds

    class Between(Line):
        """The first answer comes between two looks."""

    original = line.pull

    def pull(ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
        if ids == [second]:
            line.ready[name] = 0.0
        return original(ids)

    line.pull = pull  # type: ignore[method-assign]
    assert list(channel.pull([name])) == [(name, Message({"of": 0}))]


def test_a_client_that_is_gone_is_left_to_flower() -> None:
    time = Time()
    line = Line(time, echo, loses=[(0, 0)])
    channel = Noticing(line, time)
    name = channel.push(0, order(0), lifetime_s=1e6)
    line.gone = {0}
    assert until(channel, [name], time, 500) == [] and len(line.sent[0]) == 1
    line.gone = set()
    assert until(channel, [name], time, 1000)[0][1].fields["lost"]


class Runner:
    """A client that gives back its order reversed."""

    def __init__(self) -> None:
        self.states: dict[int, Payload] = {}
        self.orders = 0

    def handle(self, client: int, frame: bytes) -> bytes:
        self.orders += 1
        return bytes(frame)[::-1]


@pytest.mark.parametrize("vanishes", [0, 1, 2])
@pytest.mark.parametrize("in_plan_order", [False, True])
def test_joining_and_a_round_go_on_whatever_message_vanishes(
    vanishes: int, in_plan_order: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The invitation, the order, or the order that is sent again."""
    for module, name in ((remote, "POLL_S"), (network, "LOOK_S")):
        monkeypatch.setattr(module, name, 0.0)
    runners = [Runner(), Runner()]
    workers = [
        Worker(
            lambda fields, runner=runner: JoinedRun(runner, 3, "echo"),  # type: ignore[misc]
            Acceptance(),
            tmp_path / str(number),
            lambda text: None,
        )
        for number, runner in enumerate(runners)
    ]
    time = Time()
    line = Line(time, lambda client, message: workers[client].answer(message), loses=[(0, vanishes)])
    invitation = Invitation("ab12", "{}", "0" * 64)
    said: list[str] = []
    joined = invite_clients(
        Noticing(line, time), invitation, {0: "north", 1: "south"}, wait_s=None, log_line=said.append
    )
    assert joined == {0: 3, 1: 3}
    exchange = RoundExchange(invitation, joined, {}, limit=lambda client: 100)
    transport = Remote(Noticing(line, time), exchange, window=None, deadline_s=None, clock=Clock())
    frames = {0: b"abc", 1: b"xyz"}
    arrivals = transport.exchange(1, frames.items(), in_plan_order=in_plan_order)
    assert {arrival.client: bytes(arrival.frame) for arrival in arrivals} == {0: b"cba", 1: b"zyx"}
    assert [runner.orders for runner in runners] == [1, 1]
