"""Examples kept away from every client, for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune.data.examples import Example
from fedtune.errors import InputError, nearest


def split_holdout(
    examples: Sequence[Example], *, fraction: float | None, category: str | None, rng: np.random.Generator
) -> tuple[list[Example], list[Example]]:
    """Splits examples into those for training and those held out; both keep their order.

    Args:
        examples: What is split.
        fraction: The part to hold out at random, between 0 and 1; the count is rounded and at least 1.
        category: The category to hold out whole; "last" is the last one in sorted order (unless one has that
            name).
        rng: Drawn from for `fraction` only.

    Returns:
        (train, held_out). With neither `fraction` nor `category` nothing is held out.

    Raises:
        InputError: Both are given, the category does not exist, or nothing would be left to train on.
    """
    if fraction is not None and category is not None:
        raise InputError("data.holdout: give a fraction or a category, not both.")
    if category is not None:
        held = _in_category(examples, category)
    elif fraction is not None:
        held = _at_random(len(examples), fraction, rng)
    else:
        held = set()
    train = [example for index, example in enumerate(examples) if index not in held]
    return train, [examples[index] for index in sorted(held)]


Places = NDArray[np.int64]


def own_part(n: int, fraction: float, rng: np.random.Generator, whose: str) -> tuple[Places, Places]:
    """A client's examples in two, by place: those that it trains on, and those that it keeps for evaluation.

    Args:
        n: How many examples it has.
        fraction: The part that it keeps; the count is rounded and at least 1.
        rng: Of this client, so that on one machine and on its own the parts are the same.
        whose: Names it in a message.

    Returns:
        Both ascending.

    Raises:
        InputError: None would be left to train on.
    """
    count = max(1, round(fraction * n))
    if count >= n:
        raise InputError(
            f"data.holdout.client_fraction is {fraction}, but {whose} has {n} examples; "
            "it must keep one to train on. Use fewer clients, or another partition"
        )
    shuffled = rng.permutation(n)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def scored_part(held: Places, most: int | None, rng: np.random.Generator) -> Places:
    """Of what a client keeps for evaluation, the examples that it scores: all, or `most` at random."""
    return np.sort(held[rng.permutation(len(held))[:most]])


def _in_category(examples: Sequence[Example], category: str) -> set[int]:
    known = sorted({example.category for example in examples})
    if known == [""]:
        raise InputError(
            "data.holdout.category: no example has a category; set data.fields.category to the key that "
            "holds it, or hold out a fraction."
        )
    wanted = known[-1] if category == "last" and category not in known and known else category
    if wanted not in known:
        listed = ", ".join(f'"{name}"' for name in known[:20]) + (", …" if len(known) > 20 else "")
        raise InputError(
            f'data.holdout.category: no example has the category "{wanted}"; there are {listed or "none"}.'
            f"{nearest(wanted, known)}"
        )
    if len(known) == 1:
        raise InputError(
            f'data.holdout.category: every example has the category "{wanted}", so none would be left to '
            "train on. Map data.fields.category to a key with several values, or hold out a fraction."
        )
    return {index for index, example in enumerate(examples) if example.category == wanted}


def _at_random(n: int, fraction: float, rng: np.random.Generator) -> set[int]:
    if not 0 < fraction < 1:
        raise InputError(f"data.holdout.fraction must be between 0 and 1, both excluded, got {fraction}.")
    count = max(1, round(fraction * n))
    if count >= n:
        raise InputError(
            f"data.holdout.fraction: holding out {fraction} of {n} examples leaves none to train on."
        )
    return set(rng.permutation(n)[:count].tolist())
