"""Exchanges between server and client without a network: parts, deadlines, states, refusals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.types import ClientError, Payload
from fedtune.errors import InputError
from fedtune.measure.clock import Clock
from fedtune.transport import network, remote, worker
from fedtune.transport.acceptance import Acceptance, NotAccepted
from fedtune.transport.messages import Message
from fedtune.transport.network import Invitation, RoundExchange, invite_clients
from fedtune.transport.remote import Remote, Unreachable
from fedtune.transport.worker import JoinedRun, Worker

INVITATION = Invitation("ab12", "{}", "0" * 64)


class Runner:
    """A client that gives back its order, and counts in what it keeps how often it was asked."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.states: dict[int, Payload] = {}
        self.store: Any = None
        self.orders: list[bytes] = []
        self.fails = fails

    def handle(self, client: int, frame: bytes) -> bytes:
        if self.fails:
            raise self.fails
        self.orders.append(bytes(frame))
        before = self.states.get(client)
        self.states[client] = Payload(
            scalars={"orders": 1 + (int(before.scalars["orders"]) if before else 0)}
        )
        return bytes(frame)[::-1]


def client(
    folder: Path, runner: Runner, *, examples: int = 3, acceptance: Acceptance | None = None
) -> Worker:
    def join(fields: Mapping[str, Any]) -> JoinedRun:
        return JoinedRun(runner, examples, "echo")  # type: ignore[arg-type]

    return Worker(join, acceptance or Acceptance(), folder, lambda text: None)


class Post:
    """A channel to workers of this process, which can lose messages and clients."""

    def __init__(
        self, workers: Mapping[int, Worker], silent: Sequence[int] = (), gone: Sequence[int] = ()
    ) -> None:
        self.workers, self.silent, self.gone = workers, silent, gone
        self.messages: list[tuple[int, Message]] = []

    def online(self) -> set[int]:
        return set(self.workers) - set(self.gone)

    def push(self, client: int, message: Message, *, lifetime_s: float) -> str:
        if client in self.gone:
            raise Unreachable("it is not connected")
        self.messages.append((client, message))
        return str(len(self.messages) - 1)

    def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
        for name in ids:
            client, message = self.messages[int(name)]
            if client not in self.silent:
                yield name, self.workers[client].answer(message)


def exchange(
    post: Post,
    frames: Mapping[int, bytes],
    *,
    round: int = 1,
    states: dict[int, Payload] | None = None,
    limit: int = 10**9,
    deadline_s: float | None = None,
    in_plan_order: bool = False,
) -> dict[int, Any]:
    exchange = RoundExchange(
        INVITATION, dict.fromkeys(frames, 3), {} if states is None else states, limit=lambda client: limit
    )
    transport = Remote(post, exchange, window=None, deadline_s=deadline_s, clock=Clock())
    arrivals = list(transport.exchange(round, frames.items(), in_plan_order=in_plan_order))
    assert len(arrivals) == len(frames)
    return {arrival.client: arrival.fault or bytes(arrival.frame) for arrival in arrivals}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "POLL_S", 0.001)
    monkeypatch.setattr(network, "LOOK_S", 0.001)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), part=st.integers(1, 41))
def test_frames_of_any_length_cross_whole_in_parts_of_any_length(
    sizes: list[int], part: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("worker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "PART_BYTES", part)
        patch.setattr(worker, "PART_BYTES", part)
        frames = {number: bytes(range(number, number + size)) for number, size in enumerate(sizes)}
        workers = {number: client(folder / str(number), Runner()) for number in frames}
        post = Post(workers)
        assert exchange(post, frames) == {number: frame[::-1] for number, frame in frames.items()}
        assert max(len(message.body) for _, message in post.messages) <= part
        parts = sum(-(-size // part) for size in sizes)
        # each client is asked once before it knows the run, and invited
        again = len(sizes) * 2
        assert len(post.messages) == again + parts + sum(-(-size // part) - 1 for size in sizes)


def test_who_is_silent_at_the_deadline_is_left_out_and_named(tmp_path: Path) -> None:
    workers = {number: client(tmp_path / str(number), Runner()) for number in range(3)}
    for in_plan_order in (False, True):
        found = exchange(
            Post(workers, silent=[0], gone=[1]),
            {0: b"a", 1: b"b", 2: b"xy"},
            deadline_s=0.3,
            in_plan_order=in_plan_order,
        )
        assert found[0] == "no reply within 0.3 s"
        assert found[1] == "it is not connected"
        if not in_plan_order:
            assert found[2] == b"yx"


@pytest.mark.parametrize("in_plan_order", [False, True])
def test_a_letter_that_was_lost_with_its_client_is_sent_again(
    in_plan_order: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that was away for longer than Flower waits: what was trained is not trained again."""
    monkeypatch.setattr(remote, "LOST_S", 5.0)
    monkeypatch.setattr(network, "PART_BYTES", 2)
    monkeypatch.setattr(worker, "PART_BYTES", 2)
    runners = {number: Runner() for number in range(2)}

    class Flaky(Post):
        """Loses the answer to every message once; the message itself had arrived."""

        def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
            for name, answer in super().pull(ids):
                message = self.messages[int(name)]
                again = any(other is message[1] for _, other in self.messages[: int(name)])
                yield name, answer if again else Message({"lost": True, "fault": "it was lost"})

    workers = {number: client(tmp_path / str(number), runners[number]) for number in runners}
    found = exchange(Flaky(workers), {0: b"abcde", 1: b"xyz"}, in_plan_order=in_plan_order)
    assert found == {0: b"edcba", 1: b"zyx"}
    assert [runner.orders for runner in runners.values()] == [[b"abcde"], [b"xyz"]]


def test_a_client_that_does_not_come_back_is_left_out_before_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LOST_S", 0.2)

    class Dead(Post):
        def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
            for name in ids:
                self.gone = [0]
                yield name, Message({"lost": True, "fault": "it was lost"})

    workers = {0: client(tmp_path, Runner())}
    found = exchange(Dead(workers), {0: b"a"}, deadline_s=60.0)
    assert found == {0: "it was lost, and not back within 0.2 s"}


def test_replies_come_in_plan_order_where_that_counts(tmp_path: Path) -> None:
    workers = {number: client(tmp_path / str(number), Runner()) for number in range(3)}

    class Late(Post):
        def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
            return super().pull(list(reversed(ids))[:1])  # the last one asked answers first

    assert list(exchange(Late(workers), {0: b"a", 1: b"b", 2: b"c"}, in_plan_order=True)) == [0, 1, 2]
    assert list(exchange(Late(workers), {0: b"a", 1: b"b", 2: b"c"})) == [2, 1, 0]


def test_a_reply_that_is_too_long_is_refused_unread(tmp_path: Path) -> None:
    class Boast(Worker):
        def answer(self, message: Message) -> Message:
            answer = super().answer(message)
            return (
                Message({**answer.fields, "bytes": 2 << 30}, answer.body)
                if "bytes" in answer.fields
                else answer
            )

    runner = Runner()
    boaster = Boast(lambda fields: JoinedRun(runner, 3, "echo"), Acceptance(), tmp_path, print)  # type: ignore[arg-type]
    post = Post({0: boaster})
    assert exchange(post, {0: b"ab"}, limit=100) == {
        0: "its reply has 2,147,483,648 bytes; at most 100 are allowed here"
    }
    assert not [message for _, message in post.messages if message.fields["do"] == "fetch"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Message({"bytes": 5, "state": 0}, b"abc"), "its reply was cut: 3 of 5 bytes came"),
        (Message({"bytes": 2, "state": 0}, b"abc"), "its reply was cut: 0 of 2 bytes came"),
        (Message({"bytes": 0, "state": 0}), "its reply was cut: 0 of 0 bytes came"),
        (Message({"bytes": -1, "state": 0}, b"a"), "bytes of a message must be a whole number, got -1"),
        (Message({"bytes": 1.5, "state": 0}, b"a"), "bytes of a message must be a whole number, got 1.5"),
        (Message({"bytes": 1}, b"a"), "state of a message must be a whole number, got None"),
        (Message({}), "bytes of a message must be a whole number, got None"),
        (Message({"fault": "because"}), "because"),
        (Message({"unknown": True}), "examples of a message must be a whole number, got None"),
    ],
)
def test_answers_that_are_none_become_faults(answer: Message, reason: str) -> None:
    class Odd:
        def answer(self, message: Message) -> Message:
            if message.fields["do"] == "fetch":
                return Message({})
            return answer if message.fields["do"] == "order" else Message({"joined": True})

    assert exchange(Post({0: Odd()}), {0: b"ab"}) == {0: reason}  # type: ignore[dict-item]


def test_a_client_that_came_back_with_other_data_is_left_out(tmp_path: Path) -> None:
    post = Post({0: client(tmp_path, Runner(), examples=4)})
    assert exchange(post, {0: b"a"}) == {0: "it joined with 3 examples and now has 4"}


def test_a_client_that_was_restarted_knows_its_run_and_what_it_kept(tmp_path: Path) -> None:
    states: dict[int, Payload] = {}
    first = Post({0: client(tmp_path, Runner())})
    for round in (1, 2, 3):
        exchange(first, {0: b"a"}, round=round, states=states)
    assert states[0].scalars == {"round": 3}
    runner = Runner()
    again = Post({0: client(tmp_path, runner)})
    exchange(again, {0: b"a"}, round=4, states=states)
    assert [message.fields["do"] for _, message in again.messages] == ["order"]  # nobody invited it again
    assert runner.states[0].scalars == {"orders": 4}


def test_a_server_that_goes_on_from_its_checkpoint_finds_the_state_of_that_round(tmp_path: Path) -> None:
    runner, states = Runner(), dict[int, Payload]()
    post = Post({0: client(tmp_path, runner)})
    exchange(post, {0: b"a"}, round=1, states=states)
    saved = dict(states)
    exchange(post, {0: b"a"}, round=2, states=states)  # the server is killed before it has this reply
    exchange(post, {0: b"b"}, round=2, states=saved)
    assert runner.states[0].scalars == {"orders": 2}
    assert saved[0].scalars == {"round": 2}


def test_the_same_order_once_more_is_not_trained_again(tmp_path: Path) -> None:
    runner = Runner()
    post = Post({0: client(tmp_path, runner)})
    assert exchange(post, {0: b"ab"}) == exchange(post, {0: b"ab"}) == {0: b"ba"}
    assert runner.orders == [b"ab"]
    exchange(post, {0: b"cd"})
    assert runner.orders == [b"ab", b"cd"]


def test_what_is_lost_on_the_clients_disk_is_gone_on_without(tmp_path: Path) -> None:
    states: dict[int, Payload] = {}
    exchange(Post({0: client(tmp_path, Runner())}), {0: b"a"}, states=states)
    next((tmp_path / "ab12").glob("round-*")).write_bytes(b"damaged")
    runner = Runner()
    exchange(Post({0: client(tmp_path, runner)}), {0: b"a"}, round=2, states=states)
    assert runner.states[0].scalars == {"orders": 1}


def test_only_some_rounds_of_the_newest_run_are_kept(tmp_path: Path) -> None:
    states: dict[int, Payload] = {}
    member = client(tmp_path, Runner())
    for round in range(1, 7):
        exchange(Post({0: member}), {0: b"a"}, round=round, states=states)
    assert [path.name for path in sorted((tmp_path / "ab12").glob("round-*"))] == [
        f"round-{round:06d}" for round in (4, 5, 6)
    ]
    assert member.answer(Invitation("cd34", "{}", "").message(0)).fields == {"examples": 3}
    assert not (tmp_path / "ab12").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ClientError("the loss became nan"), "the loss became nan"),
        (
            InputError("/srv/secret/data.jsonl: broken"),
            "it cannot take part as it is set up; its own log says why",
        ),
        (OSError("/srv/secret"), "it failed: OSError; its own log says more"),
        (MemoryError(), "it failed: MemoryError; its own log says more"),
    ],
)
def test_what_goes_wrong_at_a_client_names_none_of_its_files(
    error: Exception, said: str, tmp_path: Path
) -> None:
    member = client(tmp_path, Runner(error))
    assert exchange(Post({0: member}), {0: b"a"}) == {0: said}
    # a fault of its program or machine ends the client's own process, and the server's never
    assert (member.broken is not None) == said.startswith("it failed")
    member.joined.runner.fails = None  # type: ignore[union-attr]
    assert exchange(Post({0: member}), {0: b"a"}, round=2) == {0: b"a"}


def test_an_operators_bytes_count_in_both_directions(tmp_path: Path) -> None:
    limits = Acceptance(max_bytes=3)
    member = client(tmp_path, Runner(), acceptance=limits)
    assert exchange(Post({0: member}), {0: b"abc"}) == {0: b"cba"}
    said = exchange(Post({0: member}), {0: b"abcd"}, round=2)
    assert said == {0: "the order has 4 bytes, and its operator accepts 3"}


FIELDS = st.dictionaries(
    st.sampled_from(["do", "run", "round", "client", "at", "bytes", "state", "config", "weights", "more"]),
    st.sampled_from(["join", "order", "fetch", "ab12", "../x", "", 0, 1, 7, -1, 2.5, True, 10**6]),
    max_size=8,
)


@given(fields=FIELDS, body=st.binary(max_size=20))
def test_no_letter_ends_a_worker(
    fields: dict[str, Any], body: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("worker")
    member = client(folder / "state", Runner())
    member.answer(Message(fields, body))
    assert member.broken is None
    assert exchange(Post({0: member}), {0: b"ab"}, round=9) == {0: b"ba"}
    assert [path.name for path in folder.iterdir()] == ["state"]  # it wrote nowhere else


def test_an_order_that_is_said_to_be_larger_than_memory_does_not_end_a_client(tmp_path: Path) -> None:
    member = client(tmp_path, Runner())
    assert exchange(Post({0: member}), {0: b"a"}) == {0: b"a"}
    for size in (1 << 62, 1 << 70):
        order = {"do": "order", "run": "ab12", "round": 2, "state": 0, "at": 0, "bytes": size}
        said = member.answer(Message(order, b"a")).fields["fault"]
        assert said == f"it has no room for an order of {size:,} bytes"
    assert member.broken is None
    assert exchange(Post({0: member}), {0: b"ab"}, round=3) == {0: b"ba"}


def test_gathering_tells_who_joined_who_refused_and_who_did_not_come(tmp_path: Path) -> None:
    def refuses(fields: Mapping[str, Any]) -> JoinedRun:
        raise NotAccepted("its operator accepts fedavg, and the method is fedkseed")

    refusing = Worker(refuses, Acceptance(), tmp_path / "1", print)
    post = Post(
        {0: client(tmp_path / "0", Runner()), 1: refusing, 2: client(tmp_path / "2", Runner())}, gone=[2]
    )
    told: list[str] = []
    names = {0: "north", 1: "south", 2: "west"}
    assert invite_clients(post, INVITATION, names, wait_s=0.2, log_line=told.append) == {0: 3}
    assert sorted(told) == [
        "client 0 (north) has joined with 3 examples",
        "client 1 (south) does not take part: its operator accepts fedavg, and the method is fedkseed",
        "client 2 (west) did not come within 0.2 s",
    ]


def test_a_client_that_registers_more_than_is_expected_does_not_take_part(tmp_path: Path) -> None:
    members = {c: client(tmp_path / str(c), Runner()) for c in range(3)}
    told: list[str] = []
    names = {0: "north", 1: "south", 2: "west"}
    most = {0: 3, 1: 2}  # each of them registers three; of the last nothing is expected
    joined = invite_clients(Post(members), INVITATION, names, wait_s=5, log_line=told.append, most=most)
    assert joined == {0: 3, 2: 3}
    assert sorted(told)[1] == (
        "client 1 (south) does not take part: it registered 3 examples, and clients.json expects 2 at most; "
        "if it has got more since, change that there"
    )
