"""What a person sees while a run lasts. The run only tells; a display decides what to show."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Receives what happens, in the order in which it happens."""

    def note(self, text: str) -> None:
        """One line that should stay in sight."""

    def info(self, text: str) -> None:
        """One line that should stay in sight, and is no warning."""

    def stage(self, text: str) -> None:
        """Something that takes a while begins."""

    def begin(self, rounds: int, name: str) -> None:
        """The rounds begin."""

    def round(self, round: int, clients: int) -> None:
        """A round begins, with so many clients asked."""

    def client(self, done: int) -> None:
        """So many of the round's clients have replied or are left out."""

    def step(self, client: int, done: int, total: int) -> None:
        """A client of this process has done so many of its local steps; told before each."""

    def scores(self, round: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """A round ended with these scores (empty if it was not evaluated)."""


class Silent:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Ignored."""

    def info(self, text: str) -> None:
        """Ignored."""

    def stage(self, text: str) -> None:
        """Ignored."""

    def begin(self, rounds: int, name: str) -> None:
        """Ignored."""

    def round(self, round: int, clients: int) -> None:
        """Ignored."""

    def client(self, done: int) -> None:
        """Ignored."""

    def step(self, client: int, done: int, total: int) -> None:
        """Ignored."""

    def scores(self, round: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Ignored."""


class NotesOnly(Silent):
    """No progress, but what a person should know: a note on stderr, a line each."""

    def note(self, text: str) -> None:
        """Said: that examples were cut, say, is not progress."""
        print(text, file=sys.stderr, flush=True)


class Named:
    """Another display, to which the run has a name of its own: one of several that would be called the same.

    Args:
        progress: That display.
        name: What it is told instead of the method.
    """

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def note(self, text: str) -> None:
        """With the run's own name, since others say the like."""
        self._progress.note(f"{self._name}: {text}")

    def info(self, text: str) -> None:
        """With the run's own name."""
        self._progress.info(f"{self._name}: {text}")

    def stage(self, text: str) -> None:
        """As it is."""
        self._progress.stage(text)

    def begin(self, rounds: int, name: str) -> None:
        """With the run's own name."""
        self._progress.begin(rounds, self._name)

    def round(self, round: int, clients: int) -> None:
        """As it is."""
        self._progress.round(round, clients)

    def client(self, done: int) -> None:
        """As it is."""
        self._progress.client(done)

    def step(self, client: int, done: int, total: int) -> None:
        """As it is."""
        self._progress.step(client, done, total)

    def scores(self, round: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """As they are."""
        self._progress.scores(round, scores)
