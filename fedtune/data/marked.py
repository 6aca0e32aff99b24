"""Texts that say which of their characters are control tokens, and where they are parted."""

from __future__ import annotations

from collections.abc import Sequence


class Marked(str):
    """A text with control tokens of its own. Adding texts keeps them; any other operation gives plain text.

    Attributes:
        own: Start and end of each control token that is no data.
        whole: Whether it is all that the model reads: no begin token goes before it but its own.
        seams: Where it is parted before it becomes tokens, none of which is then on both sides.
    """

    own: tuple[tuple[int, int], ...]
    whole: bool
    seams: tuple[int, ...]
    __slots__ = ("own", "seams", "whole")

    def __new__(
        cls, text: str, own: Sequence[tuple[int, int]] = (), *, whole: bool = False, seams: Sequence[int] = ()
    ) -> Marked:
        """A text with `own` control tokens, in their order; without any it is data alone."""
        marked = super().__new__(cls, text)
        marked.own, marked.whole, marked.seams = tuple(own), whole, tuple(seams)
        return marked

    def __add__(self, after: str) -> Marked:
        far = len(self)
        own = [(start + far, end + far) for start, end in getattr(after, "own", ())]
        seams = [place + far for place in getattr(after, "seams", ())]
        return Marked(
            str(self) + str(after), [*self.own, *own], whole=self.whole, seams=[*self.seams, *seams]
        )

    def __radd__(self, before: str) -> Marked:
        return Marked(before) + self

    def parted(self, seams: Sequence[int]) -> Marked:
        """The same text with these seams."""
        return Marked(str(self), self.own, whole=self.whole, seams=seams)

    def up_to(self, end: int) -> Marked:
        """Its first characters."""
        return self.pieces([end])[0]

    def pieces(self, seams: Sequence[int]) -> list[Marked]:
        """It in pieces, one more than there are seams."""
        ends = [*seams, len(self)]
        return [
            Marked(self[start:end], [(a - start, b - start) for a, b in self.own if start <= a and b <= end])
            for start, end in zip([0, *seams], ends, strict=True)
        ]
