"""Encoded examples: one as tuples, many as arrays of 32-bit integers, and what became of them."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, overload

import numpy as np
import numpy.typing as npt

IGNORED = -100  # the label that torch's cross-entropy leaves out
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One encoded example, or a row of several (`packing.py`).

    Attributes:
        input_ids: Token ids, without padding.
        labels: For a causal model one label a token, -100 where no loss is taken, not shifted (the model
            shifts them). For classification one class index.
        parts: Of a row, the tokens of each example in it; empty of an example.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    parts: tuple[int, ...] = ()

    @property
    def trained(self) -> int:
        """Labels that carry loss: a class, or a causal model's that are not -100, without the first."""
        labels = self.labels if len(self.labels) == 1 else self.labels[1:]
        return len(labels) - labels.count(IGNORED)


def split_pair(item: Encoded) -> tuple[Encoded, Encoded]:
    """A chosen and a rejected answer, each with its prompt, that `encode_pairs` made one example."""
    labels = item.labels
    at = next(i for i in range(1, len(labels)) if labels[i] == IGNORED != labels[i - 1])
    return Encoded(item.input_ids[:at], labels[:at]), Encoded(item.input_ids[at:], labels[at:])


def split_judged(item: Encoded) -> list[tuple[Encoded, bool]]:
    """The answers that `encode_pairs` made one example, each with its prompt and whether it is a good one.

    Of a pair both; of an answer that was judged alone that one, a bad one without the token behind it that
    says so.
    """
    labels = item.labels
    at = next((i for i in range(1, len(labels)) if labels[i] == IGNORED != labels[i - 1]), None)
    if at is None:
        return [(item, True)]
    if at == len(labels) - 1:
        return [(Encoded(item.input_ids[:at], labels[:at]), False)]
    chosen, rejected = split_pair(item)
    return [(chosen, True), (rejected, False)]


class EncodedList(Sequence[Encoded]):
    """Encoded examples as three arrays: 4 bytes a token and 16 an example. An item is made when asked for.

    Args:
        lengths: int32 (examples,), tokens of each.
        heads: int32 (examples,). Of a causal model: how many tokens at an example's start carry no loss; all
            others are their own labels. Of a classifier: its class.
        ids: int32 (tokens of all examples,), one example after the other. A token that carries no loss
            though one before it does stands as -1 - its id.
        classes: Whether `heads` are classes.

    Raises:
        ValueError: The arrays do not go together.
    """

    def __init__(self, lengths: Ints, heads: Ints, ids: Ints, *, classes: bool) -> None:
        ends = np.cumsum(lengths, dtype=np.int64)
        if len(lengths) != len(heads) or (ends[-1] if len(ends) else 0) != len(ids):
            raise ValueError("lengths, heads and ids are not of the same examples")
        most = lengths if not classes else np.iinfo(np.int32).max
        if (lengths < 0).any() or (heads < 0).any() or (heads > most).any():
            raise ValueError("a length or a head is not possible")
        self.lengths, self.heads, self.ids, self.classes = lengths, heads, ids, classes
        self._ends = ends

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, place: int) -> Encoded: ...

    @overload
    def __getitem__(self, place: slice) -> list[Encoded]: ...

    def __getitem__(self, place: int | slice) -> Encoded | list[Encoded]:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        at = operator.index(place)
        if not -len(self) <= at < len(self):
            raise IndexError(f"example {at} of {len(self)}")
        end, head = int(self._ends[at]), int(self.heads[at])
        ids = tuple(self.ids[end - int(self.lengths[at]) : end].tolist())
        labels = (head,) if self.classes else (IGNORED,) * head + ids[head:]
        if ids and min(ids) < 0:  # several answers, with what is asked between them
            labels = tuple(IGNORED if label < 0 else label for label in labels)
            ids = tuple(-1 - token if token < 0 else token for token in ids)
        return Encoded(ids, labels)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.lengths.nbytes + self.heads.nbytes + self.ids.nbytes + self._ends.nbytes


def lengths_of(items: Sequence[Encoded]) -> list[int]:
    """Tokens of each example."""
    lengths = getattr(items, "lengths", None)  # of a collection that knows them without making each item
    if lengths is None:
        return [len(item.input_ids) for item in items]
    return [int(length) for length in lengths]


def longest_of(items: Sequence[Encoded], count: int) -> list[Encoded]:
    """The `count` longest in descending order, of equal ones the first."""
    return [items[int(at)] for at in np.argsort(-np.array(lengths_of(items)), kind="stable")[:count]]


class EncodedRows:
    """Examples that are put one behind the other into an `EncodedList`."""

    def __init__(self) -> None:
        self._lengths, self._heads, self._ids = array("i"), array("i"), array("i")

    def add(self, ids: Iterable[int], head: int) -> None:
        """One more, as `EncodedList` says."""
        before = len(self._ids)
        self._ids.extend(ids)
        self._lengths.append(len(self._ids) - before)
        self._heads.append(head)

    def all(self, *, classes: bool) -> EncodedList:
        """All of them, in order."""
        lengths, heads, ids = (
            np.frombuffer(one, dtype=np.int32) for one in (self._lengths, self._heads, self._ids)
        )
        return EncodedList(lengths, heads, ids, classes=classes)


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of examples when they were encoded; each may count in several of these.

    Attributes:
        examples: Those encoded.
        cut: Of them, longer than the maximum length.
        without_prompt: Of those cut, with no token of their prompt left.
        without_eos: Of those cut, with the end of their answer gone, and so without the end token.
        empty: With an answer of no text: the end token alone is trained.
        duplicates: Equal to an earlier one in instruction, input and output.
        dropped: Too long and left out; these are not among `examples`.
        turns: Turns that were left out at the start of conversations that are too long.
        unanswered: Turns behind the last answer of a conversation, which are left out.
        parted: Plain texts that are longer than the maximum length, each of which became several examples.
        waiting: Of `examples`, not encoded yet: of these it is not known whether they are cut.
    """

    examples: int = 0
    cut: int = 0
    without_prompt: int = 0
    without_eos: int = 0
    empty: int = 0
    duplicates: int = 0
    dropped: int = 0
    waiting: int = 0
    turns: int = 0
    unanswered: int = 0
    parted: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Counts)))

    def document(self) -> dict[str, Any]:
        """As JSON has it; without what most runs have none of, where there is none."""
        rare = ("waiting", "turns", "unanswered", "parted")
        return {name: count for name, count in asdict(self).items() if count or name not in rare}


@dataclass(frozen=True, slots=True)
class EncodedSet:
    """Encoded examples in the order given, and what was cut, dropped or odd.

    Attributes:
        items: The encoded.
        counts: Of all of them.
        parts: Of plain texts of which some became several, how many each became; else empty.
    """

    items: EncodedList
    counts: Counts
    parts: tuple[int, ...] = ()
