"""A round whose clients come in turn, killed between two of them; and rounds that are not written down."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.file import parse_config
from fedtune.core.types import Arrival, Payload
from fedtune.federation.journal import Journal, Written, written


class Echo:
    """Answers each order with its own frame, and counts."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def exchange(
        self, round: int, frames: Iterable[tuple[int, bytes]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        for client, frame in frames:
            self.asked.append(client)
            yield Arrival(client, b"" if client == 3 else frame, "no battery" if client == 3 else "")


def turn(journal: Journal, client: int) -> list[Arrival]:
    return list(journal.exchange(1, iter([(client, b"order %d" % client)]), in_plan_order=False))


@given(killed=st.integers(0, 5), cut=st.integers(0, 40))
def test_turns_that_were_written_are_not_asked_again(
    tmp_path_factory: pytest.TempPathFactory, killed: int, cut: int
) -> None:
    folder: Path = tmp_path_factory.mktemp("journal")
    states: dict[int, Payload] = {}
    order = [4, 3, 0, 2, 1]
    first = Journal(Echo(), folder, states)
    whole = [turn(first, client) for client in order[:killed]]
    path = folder / "round-0001.replies"
    if killed:
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    echo = Echo()
    resumed = Journal(echo, folder, states)
    again = [turn(resumed, client) for client in order]
    assert again[: len(whole)] == whole
    assert [len(arrivals) for arrivals in again] == [1] * 5
    kept = killed - (1 if killed and cut else 0)  # the last entry is longer than what was cut
    assert echo.asked == order[kept:]
    third = Journal(Echo(), folder, states)
    assert [turn(third, client) for client in order] == again
    third.clear()
    assert not path.exists()


class Counting(Echo):
    """Clients that answer how many rounds they have seen, and keep it."""

    def __init__(self, states: dict[int, Payload]) -> None:
        super().__init__()
        self.states = states

    def exchange(
        self, round: int, frames: Iterable[tuple[int, bytes]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        for client, _ in frames:
            self.asked.append(client)
            seen = int(self.states.get(client, Payload(scalars={"seen": 0})).scalars["seen"]) + 1
            self.states[client] = Payload(scalars={"seen": seen})
            yield Arrival(client, b"%d" % seen)


def played(journal: Journal, round: int) -> list[bytes]:
    orders = iter([(0, b""), (1, b"")])
    return [bytes(arrival.frame) for arrival in journal.exchange(round, orders, in_plan_order=False)]


@pytest.mark.parametrize("keep", ["auto", "always", "never"])
def test_a_round_that_is_run_again_gives_the_same_however_it_is_kept(
    keep: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", itertools.count(step=20).__next__)  # a round takes 20 seconds
    states: dict[int, Payload] = {}
    clients = Counting(states)
    journal = Journal(clients, tmp_path, states, keep)
    on_disk = []
    for round in (1, 2, 3):
        first = played(journal, round)
        on_disk.append(any(tmp_path.iterdir()))
        journal.again(round)
        assert played(journal, round) == first == [b"%d" % round] * 2
        assert {client: state.scalars["seen"] for client, state in states.items()} == {0: round, 1: round}
        journal.clear()
    assert on_disk == {"auto": [True, False, False], "always": [True] * 3, "never": [False] * 3}[keep]
    assert len(clients.asked) == {"auto": 2 + 4 + 4, "always": 6, "never": 12}[keep]


@pytest.mark.parametrize(("seconds", "written"), [(30, True), (29, False)])
def test_a_round_is_written_from_half_a_minute_on(
    seconds: int, written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter([0, seconds, 100])
    monkeypatch.setattr("time.monotonic", lambda: next(moments))
    states: dict[int, Payload] = {}
    journal = Journal(Counting(states), tmp_path, states, "auto")
    played(journal, 1)
    journal.clear()
    played(journal, 2)
    assert any(tmp_path.iterdir()) == written


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, "auto"),
        ({"transport": {"name": "flower-simulation"}}, "auto"),
        ({"federation": {"secure_aggregation": {}}}, "always"),
        ({"federation": {"privacy": {"clip": 1.0, "noise_multiplier": 1.0}}}, "always"),
    ],
)
def test_what_may_not_be_asked_again_is_written(more: dict[str, Any], wanted: str) -> None:
    config = {"method": {"name": "fedavg", "rounds": 1}, **more}
    assert written(parse_config(config, "test")) == wanted
