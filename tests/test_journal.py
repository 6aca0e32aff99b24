"""A round whose clients come in turn, killed between two of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.types import Arrival, Payload
from fedtune.federation.journal import Journal


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
