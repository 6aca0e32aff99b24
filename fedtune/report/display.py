"""A run as people watch it: a progress bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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

EVERY_S = 60.0  # between two lines that say how far a run is, where there is no terminal


class Display:
    """Shows rounds, clients, their steps and scores as they come. Use as a context manager.

    Args:
        label: Stands before what is said until a run begins.
        now: A clock, in seconds.
    """

    def __init__(self, label: str = "", now: Callable[[], float] = time.monotonic) -> None:
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
        self._label, self._rounds, self._round, self._done, self._of = label, 0, 0, 0, 0
        self._replied, self._now, self._said = 0, now, now()

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
        self._say(text)

    def note(self, text: str) -> None:
        """One line that stays."""
        self._print(text)

    def info(self, text: str) -> None:
        """Another."""
        self._print(text)

    def begin(self, rounds: int, name: str) -> None:
        """The rounds begin."""
        self._label, self._rounds, self._done = f"{name}: ", rounds, 0
        self._bar.reset(self._task, total=None)

    def round(self, round: int, clients: int) -> None:
        """The bar counts client steps over all rounds, so that its estimate means something."""
        self._round, self._replied = round, 0
        self._done, self._of = (round - 1) * clients, clients
        description = f"{self._label}round {round} of {self._rounds}"
        self._bar.update(
            self._task, total=self._rounds * clients, completed=self._done, description=description
        )

    def client(self, done: int) -> None:
        """So many of the round's clients are done."""
        self._replied = done
        self._bar.update(self._task, completed=self._done + done)
        self._say(self._where())

    def step(self, client: int, done: int, total: int) -> None:
        """The bar moves within a client's work too."""
        where = f"{self._where()}, client {client}: step {done} of {total}"
        part = done / total if total else 0.0
        self._bar.update(
            self._task, completed=self._done + self._replied + part, description=f"{self._label}{where}"
        )
        self._say(where)

    def scores(self, round: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """One line a round that was evaluated."""
        if line := score_line(round, scores):
            self._print(f"{self._label}{line}")

    def _where(self) -> str:
        return f"round {self._round} of {self._rounds}, {self._replied} of {self._of} clients"

    def _print(self, text: str) -> None:
        self._said = self._now()
        self.console.print(text)

    def _say(self, text: str) -> None:
        """A line where there is no bar and none has come for a minute: a log shows that the run is alive."""
        if not self.console.is_terminal and self._now() - self._said >= EVERY_S:
            self._print(f"{self._label}{text}")
