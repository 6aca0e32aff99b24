"""A run as people watch it: a progress bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedtune.report.tables import score_line


class Display:
    """Shows rounds, clients and scores as they come. Use as a context manager."""

    def __init__(self, label: str = "") -> None:
        self.console = Console(stderr=True, highlight=False, markup=False)  # names are no markup
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._label, self._rounds, self._done, self._of = label, 0, 0, 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stage(self, text: str) -> None:
        """Names what is going on where nothing can be counted."""
        self._bar.update(self._task, description=f"{self._label}{text}")

    def note(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text)

    def info(self, text: str) -> None:
        """Another."""
        self.console.print(text)

    def begin(self, rounds: int, name: str) -> None:
        """The rounds begin."""
        self._label, self._rounds, self._done = f"{name}: ", rounds, 0
        self._bar.reset(self._task, total=None)

    def round(self, round: int, clients: int) -> None:
        """The bar counts client steps over all rounds, so that its estimate means something."""
        self._done, self._of = (round - 1) * clients, clients
        description = f"{self._label}round {round} of {self._rounds}"
        self._bar.update(
            self._task, total=self._rounds * clients, completed=self._done, description=description
        )

    def client(self, done: int) -> None:
        """So many of the round's clients are done."""
        self._bar.update(self._task, completed=self._done + done)

    def scores(self, round: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """One line a round that was evaluated."""
        if line := score_line(round, scores):
            self.console.print(f"{self._label}{line}")
