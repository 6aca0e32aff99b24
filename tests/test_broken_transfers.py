"""A frame whose transfer breaks: damaged parts, and clients that are started anew between two parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.types import Arrival, Payload
from fedtune.measure.clock import Clock
from fedtune.transport import network, remote, worker
from fedtune.transport.acceptance import Acceptance
from fedtune.transport.messages import Message, is_whole, of_part
from fedtune.transport.network import Invitation, RoundExchange
from fedtune.transport.remote import Remote
from fedtune.transport.worker import JoinedRun, Worker

ORDER, REPLY = b"abcdefg", b"gfedcba"  # in parts of two bytes: four there and four back


class Mirror:
    """A client that answers with its order, read backwards, and counts how often it was trained."""

    trained = 0
    store: Any = None

    def __init__(self) -> None:
        self.states: dict[int, Payload] = {}

    def handle(self, client: int, frame: bytes) -> bytes:
        Mirror.trained += 1
        return bytes(frame)[::-1]


def started(folder: Path) -> Worker:
    """The client's process, started (anew) on its folder."""
    return Worker(
        lambda fields: JoinedRun(Mirror(), 3, "mirror"),  # type: ignore[arg-type]
        Acceptance(),
        folder,
        lambda text: None,
    )


class Line:
    """A channel to one client; `on` changes what its n-th message, or the answer to it, is.

    Attributes:
        sent: (do, at, bytes of the body) of every message.
    """

    def __init__(self, folder: Path, on: Callable[[Line, int, Message], Message]) -> None:
        self.folder, self.worker, self._on = folder, started(folder), on
        self.sent: list[tuple[str, Any, int]] = []

    def restart(self) -> None:
        self.worker = started(self.folder)

    def push(self, client: int, message: Message, *, lifetime_s: float) -> str:
        self.sent.append((str(message.fields["do"]), message.fields.get("at"), len(message.body)))
        self._answer = self._on(self, len(self.sent), message)
        return "it"

    def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
        yield "it", self._answer


def exchanged(line: Line) -> Arrival:
    exchange = RoundExchange(Invitation("ab12", "{}", ""), {0: 3}, {}, limit=lambda client: 100)
    transport = Remote(line, exchange, window=None, deadline_s=None, clock=Clock())
    (arrival,) = transport.exchange(1, [(0, ORDER)], in_plan_order=False)
    return arrival


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "POLL_S", 0.001)
    monkeypatch.setattr(network, "PART_BYTES", 2)
    monkeypatch.setattr(worker, "PART_BYTES", 2)
    monkeypatch.setattr(Mirror, "trained", 0)


def damaged(message: Message) -> Message:
    return Message(message.fields, bytes([message.body[0] ^ 1]) + bytes(message.body[1:]))


On = Callable[[Line, int, Message], Message]


def only(numbers: Mapping[int, Callable[[Line, Message], Message]]) -> On:
    return lambda line, n, message: numbers.get(n, lambda line, m: line.worker.answer(m))(line, message)


def anew(line: Line, message: Message) -> Message:
    line.restart()
    return line.worker.answer(message)


# the client is asked once before it knows the run, is invited, and then gets its order
START = [("order", 0, 2), ("join", None, 0)]


def test_every_part_says_its_checksum(tmp_path: Path) -> None:
    seen: list[Message] = []

    def on(line: Line, number: int, message: Message) -> Message:
        answer = line.worker.answer(message)
        seen.extend(one for one in (message, answer) if one.body)
        return answer

    assert exchanged(Line(tmp_path, on)).frame == REPLY
    assert [bytes(one.body) for one in seen] == [
        b"ab", b"ab", b"cd", b"ef", b"g", b"gf", b"ed", b"cb", b"a"
    ]  # fmt: skip
    assert all(one.fields["crc"] == of_part(one.body)["crc"] and is_whole(one) for one in seen)
    assert of_part(b"123456789") == {"crc": 0xCBF43926}  # CRC-32's check value
    assert is_whole(Message({}, b"ab")) and not is_whole(damaged(seen[0]))


def test_a_damaged_part_is_sent_again_and_no_other(tmp_path: Path) -> None:
    line = Line(
        tmp_path,
        only(
            {
                4: lambda line, m: line.worker.answer(damaged(m)),
                8: lambda line, m: damaged(line.worker.answer(m)),
            }
        ),
    )
    assert exchanged(line).frame == REPLY
    there = [("order", 0, 2), ("order", 2, 2), ("order", 2, 2), ("order", 4, 2), ("order", 6, 1)]
    assert line.sent == [*START, *there, *[("fetch", at, 0) for at in (2, 2, 4, 6)]]
    assert Mirror.trained == 1


def test_a_client_that_was_started_anew_gets_its_order_from_its_start(tmp_path: Path) -> None:
    line = Line(tmp_path, only({5: anew}))
    assert exchanged(line).frame == REPLY
    orders = [at for do, at, _ in line.sent[2:] if do == "order"]
    assert orders == [0, 2, 4, 0, 2, 4, 6] and Mirror.trained == 1


def test_a_client_that_has_lost_its_reply_trains_once_more(tmp_path: Path) -> None:
    line = Line(tmp_path, only({8: anew}))
    assert exchanged(line).frame == REPLY
    assert [(do, at) for do, at, _ in line.sent[6:]] == [
        ("fetch", 2), ("fetch", 4),
        *[("order", at) for at in (0, 2, 4, 6)],
        *[("fetch", at) for at in (2, 4, 6)],
    ]  # fmt: skip
    assert Mirror.trained == 2


@pytest.mark.parametrize(
    ("on", "reason"),
    [
        (
            lambda line, n, m: line.worker.answer(damaged(m) if m.fields.get("at") == 4 else m),
            "it has 4 bytes of its order, of which 6 were sent, and goes no further",
        ),
        (
            lambda line, n, m: Message({"at": 0}) if n > 2 else line.worker.answer(m),
            "it has 0 bytes of its order, of which 2 were sent, and goes no further",
        ),
        (
            lambda line, n, m: Message({"at": 9}) if n > 2 else line.worker.answer(m),
            "it has 9 bytes of its order, of which 2 were sent, and goes no further",
        ),
        (
            lambda line, n, m: (
                Message({"at": m.fields["at"] + len(m.body)}) if n > 2 else line.worker.answer(m)
            ),
            "it has 7 bytes of its order, of which 7 were sent, and goes no further",
        ),
        (
            lambda line, n, m: damaged(line.worker.answer(m)) if n > 5 else line.worker.answer(m),
            "its reply comes damaged: 0 of 7 bytes came as they were sent",
        ),
        (
            lambda line, n, m: anew(line, m) if m.fields["do"] == "fetch" else line.worker.answer(m),
            "it was started anew 3 times while its reply was fetched",
        ),
    ],
)
def test_what_does_not_end_is_left_out(on: On, reason: str, tmp_path: Path) -> None:
    arrival = exchanged(Line(tmp_path, on))
    assert (arrival.frame, arrival.fault) == (b"", reason)
