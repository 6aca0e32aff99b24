"""A program of Flower's that is kept running beside the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedtune.deploy import processes
from fedtune.errors import FederationError

LOOK_S = 1.0  # between looking whether Flower's processes are alive
QUICK_S = 20.0  # a process of Flower's that ends sooner than this after its start has failed
RESTARTS = 3  # of a process that fails again and again, and of the server app in a run


class Supervised:
    """A program of Flower's that is started again when it ends by itself; a few times if it fails at once."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        over: threading.Event,
        ended: Callable[[], None],
    ) -> None:
        self._command, self._environment, self.log = command, environment, log
        self._over, self._ended = over, ended
        self._process = processes.start(command, environment, log)
        self._failed = False
        self._lock = threading.Lock()
        threading.Thread(target=self._keep, name=command[0], daemon=True).start()

    def require(self, end: float) -> None:
        """Raises FederationError if the program fails again and again, or `end` has passed."""
        if self._failed or time.monotonic() > end:
            raise FederationError(
                f"{self._command[0]} does not come up; the end of {self.log} says:\n"
                f"{processes.last_lines(self.log)}"
            )

    def stop(self) -> None:
        """Ends it for good."""
        self._over.set()
        with self._lock:
            processes.stop(self._process)

    def _keep(self) -> None:
        began, quick = time.monotonic(), 0
        while not self._over.wait(LOOK_S):
            with self._lock:
                if self._over.is_set() or self._process.poll() is None:
                    continue
                quick = quick + 1 if time.monotonic() - began < QUICK_S else 0
                if quick > RESTARTS:
                    self._failed = True  # it cannot start at all: `require` says so
                    return
                self._ended()
                self._process = processes.start(self._command, self._environment, self.log)
                began = time.monotonic()
        # the thread must not end before the program that it started: on Linux that would end it
