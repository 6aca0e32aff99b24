"""The server's own processes beside Flower: started again when they fail, but not for ever."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

import httpx

from fedtune.core.types import Payload
from fedtune.deploy import supervised as supervising
from fedtune.deploy.server import ServerChannel
from fedtune.deploy.supervised import RESTARTS, Supervised
from fedtune.errors import FederationError
from fedtune.measure.clock import Clock
from fedtune.transport import flower, remote
from fedtune.transport.messages import Message, connect, listening, receive, send
from fedtune.transport.network import Invitation, RoundExchange
from fedtune.transport.remote import Remote

FAILS = """
import pathlib, sys, time
starts = pathlib.Path(sys.argv[1])
with starts.open("a") as file:
    file.write("x")
if len(starts.read_text()) <= int(sys.argv[2]):
    raise SystemExit("TLS time-out")
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "LOOK_S", 0.02)
    monkeypatch.setattr(remote, "POLL_S", 0.001)


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[[int], tuple[Supervised, list[str]]]]:
    started: list[Supervised] = []

    def start(fails: int) -> tuple[Supervised, list[str]]:
        told: list[str] = []
        command = ["python", "-c", FAILS, str(tmp_path / "starts"), str(fails)]
        over = threading.Event()
        started.append(Supervised(command, {}, tmp_path / "log", over, lambda: told.append("again")))
        return started[-1], told

    yield start
    for program in started:
        program.stop()


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_program_that_fails_at_its_start_is_started_again(supervised: Any, tmp_path: Path) -> None:
    program, told = supervised(fails=2)
    wait(lambda: (tmp_path / "starts").exists() and len((tmp_path / "starts").read_text()) == 3)
    program.require(time.monotonic() + 60)
    assert told == ["again", "again"]


def test_one_that_fails_each_time_is_given_up(supervised: Any, tmp_path: Path) -> None:
    program, told = supervised(fails=99)

    def given_up() -> bool:
        try:
            program.require(time.monotonic() + 60)
        except FederationError as error:
            assert "python does not come up" in str(error) and "TLS time-out" in str(error)
            return True
        return False

    wait(given_up)
    assert told == ["again"] * RESTARTS
    assert (tmp_path / "starts").read_text() == "x" * (RESTARTS + 1)


class App:
    """Flower's server app and the one client behind it; the app dies before its n-th answer of a kind."""

    def __init__(self, dies: dict[str, int]) -> None:
        self.dies, self.starts, self.trained = dies, 0, list[int]()

    def serve(self, address: str) -> None:
        self.starts += 1
        posted: dict[str, Message] = {}
        with connect(address) as connection:
            while True:
                try:
                    asked = receive(connection)
                except (EOFError, OSError):
                    return
                kind = str(asked.fields["ask"])
                self.dies[kind] = self.dies.get(kind, 0) - 1
                if self.dies[kind] == 0:
                    return
                if kind == "nodes":
                    send(connection, Message({"nodes": json.dumps([[7, "key"]])}))
                elif kind == "post":
                    posted[str(len(posted))] = Message(json.loads(str(asked.fields["letter"])), asked.body)
                    send(connection, Message({"id": str(len(posted) - 1)}))
                else:
                    for name in json.loads(str(asked.fields["ids"])):
                        order = posted.pop(name)
                        self.trained.append(order.number("round"))
                        fields = json.dumps({"bytes": len(order.body), "state": 0})
                        send(connection, Message({"id": name, "letter": fields}, order.body))
                    send(connection, Message({"id": ""}))


def channel(app: App, told: list[str], listener: Any, address: str) -> ServerChannel:
    def start() -> Connection:
        threading.Thread(target=app.serve, args=(address,), daemon=True).start()
        return listener.accept()  # type: ignore[no-any-return]

    return ServerChannel(start, {"key": 0}, Path("superexec.log"), told.append)


@pytest.mark.parametrize("dies", [{"nodes": 1}, {"post": 1}, {"collect": 1}, {"post": 2}, {"collect": 2}])
def test_a_round_goes_on_when_flowers_server_app_ends(dies: dict[str, int]) -> None:
    app, told = App(dies), list[str]()
    states: dict[int, Payload] = {}
    with listening() as (listener, address):
        channel_ = channel(app, told, listener, address)
        exchange = RoundExchange(Invitation("ab", "{}", ""), {0: 3}, states, limit=lambda client: 99)
        transport = Remote(channel_, exchange, window=None, deadline_s=None, clock=Clock())
        for round in (1, 2):
            (arrival,) = transport.exchange(round, [(0, b"order")], in_plan_order=False)
            assert (arrival.fault, bytes(arrival.frame)) == ("", b"order")
        channel_.close()
    assert app.starts == 2 and len(told) == 1 and set(app.trained) == {1, 2}


def test_an_app_that_ends_again_and_again_ends_the_run() -> None:
    app, told = App({}), list[str]()
    app.serve = lambda address: connect(address).close()  # type: ignore[method-assign]
    with listening() as (listener, address):
        channel_ = channel(app, told, listener, address)
        with pytest.raises(FederationError, match=r"(?s)server app ended 4 times .*Continue with --resume"):
            channel_.online()
    assert len(told) == RESTARTS


def test_a_question_to_the_superlink_may_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower.time, "sleep", lambda seconds: None)
    calls: list[int] = []

    def busy(times: int) -> Any:
        def call() -> str:
            calls.append(1)
            if len(calls) <= times:
                raise httpx.ConnectTimeout("the handshake timed out")
            return "answer"

        return call

    assert flower.patiently(busy(2)) == "answer" and len(calls) == 3
    calls.clear()
    with pytest.raises(FederationError, match="does not answer: ConnectTimeout: the handshake timed out"):
        flower.patiently(busy(99))
    assert len(calls) == flower.TRIES
