"""Where a run stands that is under way: status.json in its folder, for `fedtune status` and a health route.

A thread of its own writes the file, at most once a second and at least every ten: what the run does waits for
nothing, and a file that gets no younger tells even another machine that its process is gone. The file goes
when the run ends; a killed run's stays and says how far it came.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedtune.federation.callbacks import ClientReport, RoundState, Scores
from fedtune.federation.files import dumps
from fedtune.federation.progress import Progress

STANDING = "status.json"
LOOK_S = 1.0
BEAT_S = 10.0


class Standing:
    """A display in front of another one, and a callback; both are told of what happens. A context manager.

    Args:
        path: The run's folder, which may not be there yet.
        progress: The other display.
        there: What is known of clients on other machines, by number: `name`, `here` (connected when last
            looked), `seen` (when it last answered or was found connected).
    """

    def __init__(
        self,
        path: Path,
        progress: Progress,
        there: Callable[[], Mapping[int, Mapping[str, Any]]] = dict,
    ) -> None:
        self._path, self._progress, self._there = path, progress, there
        self._known: dict[str, Any] = {
            "pid": os.getpid(),
            "started": now(),
            "stage": "starting",
            "round": 0,
            "rounds": 0,
            "asked": 0,
            "answered": 0,
            "faults": {},
        }
        self._changed, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="status", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._changed.set()
        self._thread.join()
        with suppress(OSError):
            (self._path / STANDING).unlink(missing_ok=True)

    def document(self) -> dict[str, Any]:
        """What is known now: that of status.json."""
        clients = {str(client): dict(about) for client, about in sorted(self._there().items())}
        return {**self._known, "updated": now(), "clients": clients}

    def note(self, text: str) -> None:
        """Passed on."""
        self._progress.note(text)

    def info(self, text: str) -> None:
        """Passed on."""
        self._progress.info(text)

    def stage(self, text: str) -> None:
        """What takes a while now."""
        self._set(stage=text)
        self._progress.stage(text)

    def begin(self, rounds: int, name: str) -> None:
        """How many rounds there are to be."""
        self._set(rounds=rounds)
        self._progress.begin(rounds, name)

    def round(self, round: int, clients: int) -> None:
        """A round asks so many clients."""
        self._set(stage=f"round {round}", round=round, asked=clients, answered=0, faults={})
        self._progress.round(round, clients)

    def client(self, done: int) -> None:
        """A reply was taken in."""
        self._set(stage=f"round {self._known['round']}")
        self._progress.client(done)

    def step(self, client: int, done: int, total: int) -> None:
        """In the file when it is written next."""
        self._known = {**self._known, "step": {"client": client, "done": done, "total": total}}
        self._progress.step(client, done, total)

    def scores(self, round: int, scores: Scores) -> None:
        """Passed on."""
        self._progress.scores(round, scores)

    def on_client(self, round: int, client: int, report: ClientReport) -> None:
        """One more has answered or is left out of the round under way, and why."""
        faults = self._known["faults"] | ({str(client): report.fault} if report.fault else {})
        self._set(answered=self._known["answered"] + 1, faults=faults)

    def on_round(self, round: int, scores: Scores, state: RoundState) -> None:
        """The round is in the logs now, its faults too."""
        self._set(faults={})

    def _set(self, **fields: Any) -> None:
        self._known = {**self._known, **fields}  # whole: another thread reads it
        self._changed.set()

    def _keep(self) -> None:
        while not self._over.is_set():
            self._changed.clear()
            if (self._path / "config.yaml").is_file():
                self._write()
            self._over.wait(LOOK_S)
            self._changed.wait(BEAT_S)

    def _write(self) -> None:
        """Whole, and not forced onto the disk: who reads it later sees an older one at worst."""
        new = self._path / f".{STANDING}.tmp"
        with suppress(OSError):  # a disk that is full ends the run by what it needs to write
            new.write_text(dumps(self.document(), indent=2) + "\n", encoding="utf-8")
            new.replace(self._path / STANDING)


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
