"""What a split must be, and splits that a file holds: which client has which examples, by index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.errors import InputError

Parts = list[npt.NDArray[np.int64]]
SHOWN = 5  # indices in a message


@dataclass(frozen=True)
class Dealt:
    """A split: each client's indices, sorted, and the clients' names in the same order, if they have any."""

    parts: Parts
    names: tuple[str, ...] = ()


def checked(
    split: Any, n: int, clients: int | None, who: str, *, leave_out: bool = False, hint: str = ""
) -> Dealt:
    """A split that is one: `clients` clients, none empty, and every index from 0 to n - 1 exactly once.

    Args:
        split: One sequence of indices a client, or a mapping from clients' names to them.
        n: Number of examples.
        clients: Number of clients; None: any.
        who: Where the split comes from, for messages.
        leave_out: Whether there may be examples that nobody has.
        hint: How else than by giving them to someone that can be had.

    Raises:
        InputError: It is something else; says what and where.
    """
    names = tuple(map(str, split)) if isinstance(split, Mapping) else ()
    rows = list(split.values()) if isinstance(split, Mapping) else split
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise InputError(f"{who}: a split is one list of indices a client, got {type(split).__name__}")
    parts = [
        _client_indices(row, n, f"{who}: client {names[at] if names else at}") for at, row in enumerate(rows)
    ]
    if clients is not None and len(parts) != clients:
        raise InputError(f"{who}: it has {len(parts)} clients, and data.clients is {clients}")
    if not parts:
        raise InputError(f"{who}: it has no client")
    counts = np.bincount(np.concatenate(parts), minlength=n)
    twice, nobody = np.flatnonzero(counts > 1), np.flatnonzero(counts == 0)
    if len(twice):
        raise InputError(f"{who}: {len(twice)} examples are given more than once: {_some(twice)}")
    if len(nobody) and not leave_out:
        raise InputError(
            f"{who}: {len(nobody)} of {n} training examples belong to nobody: {_some(nobody)}. Give "
            f"each of them to a client{hint}"
        )
    return Dealt([np.sort(part) for part in parts], names)


def read_split(path: str, n: int, clients: int | None, *, leave_out: bool) -> Dealt:
    """The split that a JSON file holds, checked against the examples.

    Args:
        path: As `load_split`.
        n: Number of training examples.
        clients: Number of clients; None: as many as the file has.
        leave_out: Whether there may be examples that nobody has.

    Raises:
        InputError: As `load_split`, or it is not a split of these examples.
    """
    hint = " in the file, or set data.partition.rest: leave-out"
    return checked(load_split(path), n, clients, _who(path), leave_out=leave_out, hint=hint)


def load_split(path: str) -> dict[str, Any] | list[Any]:
    """The JSON of a split: {"client's name": [indices], ...}, or a list of such lists.

    Args:
        path: A relative one starts from the working directory.

    Raises:
        InputError: The file cannot be read, or holds something else.
    """
    who = _who(path)
    try:
        split = json.loads(Path(path).read_bytes(), object_pairs_hook=lambda pairs: _object(pairs, who))
    except OSError as error:
        raise InputError(f"{who}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not text
        raise InputError(f"{who}: not JSON: {error}") from None
    if not isinstance(split, dict | list):
        raise InputError(
            f'{who}: must be an object {{"client": [indices], ...}} or a list of lists, got {split!r:.40}'
        )
    return split


def _who(path: str) -> str:
    return f"data.partition.path {path}"


def _object(pairs: Sequence[tuple[str, Any]], who: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InputError(f"{who}: a client's name stands twice")
    return found


def _client_indices(row: Any, n: int, who: str) -> npt.NDArray[np.int64]:
    """One client's indices, each of which an example has."""
    if isinstance(row, str) or not isinstance(row, Iterable):
        raise InputError(f"{who}: must have a list of indices, got {row!r}")
    given = list(row)
    wrong = [index for index in given if isinstance(index, bool) or not isinstance(index, int | np.integer)]
    if wrong:
        raise InputError(f"{who}: an index is a whole number, got {wrong[0]!r}")
    if not given:
        raise InputError(f"{who} is empty; every client needs an example")
    outside = [index for index in given if not 0 <= index < n]
    if outside:
        raise InputError(
            f"{who}: there are {n} training examples, so indices go from 0 to {n - 1}, got {_some(outside)}"
        )
    return np.array(given, dtype=np.int64)


def _some(indices: Sequence[int] | npt.NDArray[np.int64]) -> str:
    shown = ", ".join(str(index) for index in indices[:SHOWN])
    return shown + (", ..." if len(indices) > SHOWN else "")
