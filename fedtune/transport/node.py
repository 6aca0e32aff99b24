"""Flower's node, which asks soon after a message and ever more seldom while there is none.

    python -m fedtune.transport.node ARGUMENTS OF flower-supernode

Flower's own program rests three seconds whenever the server has no message for it, so that every message of
a round waits a second and a half. How long it rests is no setting of Flower's. Here its loop sleeps by
`Rests` instead of the module `time`, and does everything else as Flower wrote it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fedtune.transport.flower import run_node

FIRST_S, GROWTH = 0.1, 1.5


class Rests:
    """The module `time` as Flower's loop sees it: the same, but for how long it sleeps.

    Whoever asks again and again for one thing sleeps `FIRST_S` at first and `GROWTH` times as long each time,
    and never longer than it meant to: what it asks for lies there for a tenth of a second and half as long
    as it was waited for, at most. The loop means to sleep 3 s for want of a message and 0.5 s for want of its
    answer; another number of seconds says that something else is waited for.

    Args:
        sleep: Sleeps so many seconds.
    """

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep, self._meant_s, self._next_s = sleep, 0.0, FIRST_S

    def sleep(self, seconds: float) -> None:
        """Sleeps `seconds`, or less where it has not been asked for this often yet."""
        if seconds != self._meant_s:
            self._meant_s, self._next_s = seconds, FIRST_S
        self._sleep(min(seconds, self._next_s))
        self._next_s *= GROWTH if self._next_s < seconds else 1

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


if __name__ == "__main__":
    run_node(Rests())
