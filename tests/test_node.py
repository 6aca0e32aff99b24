"""Flower's node rests as long as there is reason to, in Flower's own loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.nodestate import NodeStateFactory

from fedtune.errors import FederationError
from fedtune.transport import flower
from fedtune.transport.flower import NODE_LOOP, rest_by
from fedtune.transport.node import Rests
from fedtune.transport.programs import supernode_command


def test_who_waits_longer_asks_more_seldom_and_never_more_seldom_than_it_meant_to() -> None:
    slept: list[float] = []
    rests = Rests(slept.append)
    for _ in range(12):
        rests.sleep(3)
    assert slept == pytest.approx([0.1 * 1.5**n for n in range(9)] + [3, 3, 3])
    for n in range(9):  # what comes while it sleeps lies there for half of what was waited and 0.1 s, at most
        assert slept[n] == pytest.approx(0.5 * sum(slept[:n]) + 0.1)
    slept.clear()
    for seconds in (0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 3, 0.05):  # another number: something else is waited for
        rests.sleep(seconds)
    assert slept == pytest.approx([0.1, 0.15, 0.225, 0.3375, 0.5, 0.5, 0.1, 0.05])
    assert rests.time is time.time and rests.monotonic is time.monotonic


def test_flowers_own_loop_sleeps_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its real loop, with a connection that has no message eleven times, and then ends it."""
    loop = flower.importlib.import_module(NODE_LOOP)
    monkeypatch.setattr(loop, "time", time)  # put back in the end
    slept: list[float] = []
    asked: list[int] = []

    class Over(Exception):
        """Ends the loop, which has no end of its own."""

    def receive() -> None:
        asked.append(len(slept))
        if len(asked) == 12:
            raise Over

    @contextmanager
    def connection(**_: Any) -> Iterator[tuple[Any, ...]]:
        yield 7, receive, *([None] * 6)

    monkeypatch.setattr(loop, "_init_connection", connection)
    rest_by(Rests(slept.append))
    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    with pytest.raises(Over):
        loop.start_client_internal(
            server_address="localhost:1",
            node_config={},
            insecure=True,
            isolation="process",
            state_factory=factory,
        )
    assert asked == list(range(12))  # it asks, then sleeps
    assert slept == pytest.approx([0.1 * 1.5**n for n in range(9)] + [3, 3])


def test_a_loop_that_sleeps_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower.importlib, "import_module", lambda name: ModuleType(name))
    with pytest.raises(FederationError, match="sleeps by no module `time`; install a Flower"):
        rest_by(Rests())


def test_the_node_is_started_by_it_whatever_lies_in_the_working_folder(tmp_path: Path) -> None:
    command = supernode_command(tmp_path, "localhost:1", 2, "worker")
    assert command[1:4] == ["-P", "-m", "fedtune.transport.node"]
