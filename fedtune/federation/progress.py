"""What a person sees while a run lasts. The run only tells; a display decides what to show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Receives what happens, in the order in which it happens."""

    def stage(self, text: str) -> None:
        """Something that takes a while begins."""

    def begin(self, rounds: int, name: str) -> None:
        """The rounds begin."""

    def round(self, round: int, clients: int) -> None:
        """A round begins, with so many clients asked."""

    def client(self, done: int) -> None:
        """So many of the round's clients have replied or are left out."""

    def scores(self, round: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """A round ended with these scores (empty if it was not evaluated)."""


class Silent:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Ignored."""

    def stage(self, text: str) -> None:
        """Ignored."""

    def begin(self, rounds: int, name: str) -> None:
        """Ignored."""

    def round(self, round: int, clients: int) -> None:
        """Ignored."""

    def client(self, done: int) -> None:
        """Ignored."""

    def scores(self, round: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Ignored."""
