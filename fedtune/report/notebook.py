"""A run as people watch it in a notebook: one output that is redrawn in place."""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from collections.abc import Mapping
from html import escape
from types import TracebackType
from typing import Any, Self


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def import_bars_quietly() -> None:
    """Imports tqdm, which warns in a notebook without ipywidgets; fedtune shows no bar of it."""
    if in_notebook() and "tqdm.auto" not in sys.modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("tqdm.auto")


class NotebookDisplay:
    """Shows a bar, what is going on, and a line a round that was evaluated. Use as a context manager."""

    def __init__(self) -> None:
        self._label, self._doing, self._lines = "", "starting", list[str]()
        self._rounds, self._round, self._before, self._done, self._of = 0, 0, 0, 0, 0
        self._drawn = 0.0  # when, by a clock that only goes forward
        self._ended = False
        self._handle: Any = None

    def __enter__(self) -> Self:
        from IPython.display import display

        self._handle = display(self, display_id=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._doing = f"{self._label}ended by {kind.__name__}" if kind else "done"
        self._label, self._ended = "", True
        self._redraw()

    def _repr_html_(self) -> str:
        done, most = self._before + self._done, self._rounds * self._of or 1
        if self._ended and self._doing == "done":
            done = most  # where nothing was counted too: a bar without a value moves for ever
        value = f' value="{done}"' if self._of or self._ended else ""
        bar = f'<progress{value} max="{most}"></progress>'
        lines = "".join(f"<div>{escape(line)}</div>" for line in self._lines)
        return f"{bar} {escape(self._label + self._doing)}{lines}"

    def __repr__(self) -> str:
        return "\n".join([self._label + self._doing, *self._lines])

    def stage(self, text: str) -> None:
        """Names what is going on where nothing can be counted."""
        self._doing = text
        self._redraw()

    def note(self, text: str) -> None:
        """One line that stays."""
        self._lines.append(text)
        self._redraw()

    def info(self, text: str) -> None:
        """Another."""
        self.note(text)

    def begin(self, rounds: int, name: str) -> None:
        """The rounds begin."""
        self._label, self._rounds, self._before, self._done, self._of = f"{name}: ", rounds, 0, 0, 0
        self._redraw()

    def round(self, round: int, clients: int) -> None:
        """A round begins; the bar counts client steps over all rounds."""
        self._round, self._before, self._done, self._of = round, (round - 1) * clients, 0, clients
        self.stage(f"round {round} of {self._rounds}")

    def client(self, done: int) -> None:
        """So many of the round's clients are done."""
        self._done = done
        self._redraw()

    def step(self, client: int, done: int, total: int) -> None:
        """A client's steps, drawn at most twice a second."""
        if time.monotonic() - self._drawn >= 0.5:
            self.stage(f"round {self._round} of {self._rounds}, client {client}: step {done} of {total}")

    def scores(self, round: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """One line a round that was evaluated."""
        from fedtune.report.tables import score_line  # not above: importing fedtune imports this module

        if line := score_line(round, scores):
            self.note(f"{self._label}{line}")

    def _redraw(self) -> None:
        self._drawn = time.monotonic()
        if self._handle is not None:
            self._handle.update(self)
