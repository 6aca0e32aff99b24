"""Where in a rendered conversation the answers are."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fedtune.data.marked import Marked

Span = tuple[int, int]


@dataclass(frozen=True)
class Laid:
    """A conversation as text.

    Attributes:
        text: Up to the end of the last answer, with the template's control tokens marked.
        spans: Start and end of each answer in it, in order.
        silent: Of them, those that are not to be learned (`weight: 0`).
        ended: Whether the last answer ends with a control token.
    """

    text: Marked
    spans: Sequence[Span]
    silent: frozenset[int] = frozenset()
    ended: bool = True

    @property
    def seams(self) -> tuple[int, ...]:
        """Where answers begin and end."""
        return tuple(place for span in self.spans for place in span)


@dataclass(frozen=True)
class Around:
    """Where an answer's own characters are, and those of other turns around it.

    Attributes:
        before: End of what another turn says before it; 0 where there is nothing.
        first: Its first character.
        last: End of its last character.
        after: Start of what another turn says behind it; None where there is nothing.
    """

    before: int
    first: int
    last: int
    after: int | None


def around(runs: Sequence[tuple[int, int, int]], turn: int) -> Around | None:
    """Where a turn's characters are; None if it has none.

    Args:
        runs: (start, end, turn) of characters that are some turn's, in order.
        turn: Which one.
    """
    own = [place for place, run in enumerate(runs) if run[2] == turn]
    if not own:
        return None
    before = runs[own[0] - 1][1] if own[0] else 0
    after = runs[own[-1] + 1][0] if own[-1] + 1 < len(runs) else None
    return Around(before, runs[own[0]][0], runs[own[-1]][1], after)


def closing(controls: Sequence[Span], start: int, stop: int | None) -> Span | None:
    """The first control token between two places."""
    return next((c for c in controls if c[0] >= start and (stop is None or c[1] <= stop)), None)


def adjacent(controls: Sequence[Span], first: Span) -> Span:
    """A control token with those right behind it."""
    rest = [c for c in controls if c[0] >= first[0]]
    end = first[1]
    for (_, before), (at, after) in pairwise(rest):
        if at != before:
            break
        end = after
    return first[0], end


def without(text: Marked, letters: Sequence[int], spans: Sequence[Span]) -> tuple[Marked, list[Span]]:
    """A text, and spans of it, without the letters at these places, which stand in ascending order."""
    if not letters:
        return text, list(spans)

    def moved(span: Span) -> Span:
        return span[0] - bisect_left(letters, span[0]), span[1] - bisect_left(letters, span[1])

    ends = [*letters, len(text)]
    kept = "".join(text[a:b] for a, b in zip([0, *(at + 1 for at in letters)], ends, strict=True))
    return Marked(kept, [moved(own) for own in text.own]), [moved(span) for span in spans]
