"""Wall seconds by part of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PARTS = ("total", "training", "aggregation", "evaluation", "rebuild")  # what every run says, if 0


class Clock:
    """Adds up the wall seconds of named parts.

    Parts are exclusive: while an inner part runs, the outer one stands still. A server that pulls its replies
    out of a generator trains its clients in the middle of its own aggregation, and only so do the parts never
    add up to more than the total. On a GPU, work that is still queued counts for the part that waits for it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._called: dict[str, str] = {}
        self._began = self._mark = time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds since the clock was made, in and out of parts."""
        return time.perf_counter() - self._began

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the seconds inside for `name`; a part may be entered any number of times."""
        self._charge()
        self._open.append(self._called.get(name, name))
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    @contextmanager
    def counted_as(self, name: str, other: str) -> Iterator[None]:
        """Inside, what is part `name` counts for `other`."""
        self._called = {name: other}
        try:
            yield
        finally:
            self._called = {}

    def by_part(self, earlier: Mapping[str, float]) -> dict[str, float]:
        """Seconds of each part and in total, without the set-up, with those of an earlier start, in ms."""
        now = self.seconds | {"total": self.total - self.seconds.get("setup", 0.0)}
        names = dict.fromkeys((*PARTS, *now, *earlier))
        return {name: round(now.get(name, 0.0) + earlier.get(name, 0.0), 3) for name in names}

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._mark
        self._mark = now
