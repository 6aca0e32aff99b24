"""Rows of several examples: which examples share one, and what a row is.

An example stays whole and is in one row. Longest first, each goes into the row that has least room left for
it (best fit, decreasing), or begins a new one; among examples of one length, the shuffle decides. So how many
rows there are, and how full, depends on the lengths alone, and a pass has as many steps as the one before.

That examples of a row do not see each other is the model's to keep: it knows them by positions that begin at
0 again (`collate`), and whether it does is tried on the model itself (`models/packable.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import overload

import torch

from fedtune.data.encoded import IGNORED, Encoded, lengths_of


def pack(lengths: Sequence[int], room: int, order: Sequence[int]) -> list[list[int]]:
    """Which examples each row holds, in the order in which they were put there.

    Args:
        lengths: Tokens of each example.
        room: The most tokens of a row.
        order: All examples once; of equally long ones the earlier is put first.

    Raises:
        ValueError: An example has more tokens than a row.
    """
    rows: list[list[int]] = []
    with_room: dict[int, deque[int]] = {}  # rows by the tokens that they still have room for
    some = 0  # a bit for each key of it: the smallest that is enough is the lowest bit from there on
    for example in sorted(order, key=lambda place: -lengths[place]):
        length = lengths[example]
        if length > room:
            raise ValueError(f"an example has {length} tokens, and a row room for {room}")
        enough = some >> length
        if enough:
            free = length + (enough & -enough).bit_length() - 1
            row = with_room[free].popleft()
            if not with_room[free]:
                some ^= 1 << free
            rows[row].append(example)
        else:
            free, row = room, len(rows)
            rows.append([example])
        with_room.setdefault(free - length, deque()).append(row)
        some |= 1 << (free - length)
    return rows


def joined(examples: Sequence[Encoded]) -> Encoded:
    """Examples one behind the other. The first token of each has nothing before it, so it carries no loss."""
    return Encoded(
        tuple(token for each in examples for token in each.input_ids),
        tuple(label for each in examples for label in (IGNORED, *each.labels[1:])),
        tuple(len(each.input_ids) for each in examples),
    )


class Packed(Sequence[Encoded]):
    """Rows of examples. A row is made when asked for.

    Args:
        items: The examples, of a causal model.
        rows: Which of them each row holds.
    """

    def __init__(self, items: Sequence[Encoded], rows: Sequence[Sequence[int]]) -> None:
        self._items, self._rows = items, rows

    @staticmethod
    def of(items: Sequence[Encoded], room: int, generator: torch.Generator) -> Packed:
        """Packs them.

        Args:
            items: The examples, of a causal model.
            room: The most tokens of a row.
            generator: A CPU generator; one permutation is drawn.

        Raises:
            ValueError: An example has more tokens than a row.
        """
        order = torch.randperm(len(items), generator=generator).tolist()
        return Packed(items, pack(lengths_of(items), room, order))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Encoded: ...

    @overload
    def __getitem__(self, place: slice) -> list[Encoded]: ...

    def __getitem__(self, place: int | slice) -> Encoded | list[Encoded]:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        return joined([self._items[at] for at in self._rows[place]])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        of_items = lengths_of(self._items)
        return [sum(of_items[at] for at in row) for row in self._rows]
