"""How a command is stopped: SIGTERM and SIGHUP as Ctrl-C, and a second signal at once.

Service managers and batch systems send SIGTERM, and a terminal that is closed SIGHUP. By default both end a
process where it stands: no summary, and what it started or wrote for the time being stays behind.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped:
    """The signal that stopped the command, once one has."""

    def __init__(self) -> None:
        self.by = signal.SIGINT

    @property
    def status(self) -> int:
        """The exit status by a shell's convention: 128 and the signal's number."""
        return 128 + self.by

    def interrupt(self, number: int, frame: FrameType | None) -> NoReturn:
        """Raises KeyboardInterrupt, which everything below cleans up after; the next signal does not wait."""
        self.by = signal.Signals(number)
        for known in SIGNALS:
            if signal.getsignal(known) == self.interrupt:
                signal.signal(known, signal.SIG_DFL)
        raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[Stopped]:
    """Inside, each of the signals is a KeyboardInterrupt; those that are ignored (nohup, `&`) stay so."""
    stopped, before = Stopped(), {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stopped.interrupt)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == stopped.interrupt:
                signal.signal(number, handler)
