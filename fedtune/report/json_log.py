"""What happens as lines of JSON on stderr, for programs that collect logs: one object a line."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

EVERY_S = 60.0  # between two lines of a client's steps


def line(event: str, **fields: Any) -> str:
    """One event: `time` (UTC), `event`, and what it has to say."""
    moment = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": moment, "event": event, **fields}, default=str)


def say(event: str, **fields: Any) -> None:
    """Writes one line."""
    print(line(event, **fields), file=sys.stderr, flush=True)


class JsonLines(logging.Formatter):
    """Warnings and errors as lines like the others."""

    def format(self, record: logging.LogRecord) -> str:
        """One record, its traceback in the same line."""
        more = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        return line(record.levelname.lower(), text=record.getMessage(), **more)


def log_as_json() -> None:
    """Has this process's warnings written so, and what `say_or_print` says."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines())


def is_json() -> bool:
    """Whether `log_as_json` was called in this process."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def say_or_print(event: str, text: str, printed: str) -> None:
    """One line on stderr: as JSON where that was chosen, else as `printed`."""
    if is_json():
        say(event, text=text)  # what steers a terminal is escaped there
    else:
        print(printed, file=sys.stderr, flush=True)


class JsonLog:
    """A display: `stage`, `begin`, `round`, `client`, `scores`, `note`, `info`; of `step` one a minute."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is left open."""

    def note(self, text: str) -> None:
        """What a person should know."""
        say("note", text=text)

    def info(self, text: str) -> None:
        """What is no warning."""
        say("info", text=text)

    def stage(self, text: str) -> None:
        """Something that takes a while begins."""
        say("stage", text=text)

    def begin(self, rounds: int, name: str) -> None:
        """The rounds begin."""
        say("begin", rounds=rounds, method=name)

    def round(self, round: int, clients: int) -> None:
        """A round begins, with so many clients asked."""
        say("round", round=round, clients=clients)

    def client(self, done: int) -> None:
        """So many of them have answered or are left out."""
        say("client", done=done)

    def step(self, client: int, done: int, total: int) -> None:
        """A client's steps, a line a minute."""
        if time.monotonic() - self._said >= EVERY_S:
            self._said = time.monotonic()
            say("step", client=client, done=done, total=total)

    def scores(self, round: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """A round ended; `scores` is empty if it was not evaluated."""
        say("scores", round=round, scores=scores)
