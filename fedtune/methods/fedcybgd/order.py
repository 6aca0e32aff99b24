"""Which parts of a model each turn trains: the client-block partition π of FedCyBGD, and BAdam's order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from fedtune.core.seeds import numpy_generator

BlockOrder = Literal["ascending", "descending", "random"]


def turns(parts: Sequence[str], order: BlockOrder, per_turn: int, seed: int) -> Iterator[tuple[str, ...]]:
    """The parts of each turn, without end: passes over all parts, one after another, `per_turn` at a time.

    Every pass has every part once. `random` draws a permutation for each pass. No turn has a part twice:
    where two passes meet, a part that the turn has already waits for the next.

    Args:
        parts: All parts, ascending.
        order: Of each pass.
        per_turn: Parts of one turn, at most as many as there are.
        seed: The run's seed.
    """
    assert 1 <= per_turn <= len(parts)
    waiting: list[str] = []
    passes = 0
    while True:
        turn: list[str] = []
        while len(turn) < per_turn:
            part = next((part for part in waiting if part not in turn), None)
            if part is None:
                waiting += _one_pass(parts, order, seed, passes)
                passes += 1
            else:
                waiting.remove(part)
                turn.append(part)
        yield tuple(turn)


def turn(parts: Sequence[str], order: BlockOrder, per_turn: int, seed: int, index: int) -> tuple[str, ...]:
    """The parts of one turn, counted from 0."""
    return next(islice(turns(parts, order, per_turn, seed), index, None))


def _one_pass(parts: Sequence[str], order: BlockOrder, seed: int, number: int) -> list[str]:
    if order == "random":
        return [parts[i] for i in numpy_generator(seed, "blocks", number).permutation(len(parts))]
    return list(parts) if order == "ascending" else list(reversed(parts))
