"""The program of a process that makes whole runs beside others; several.py starts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedtune.config.file import parse_config
from fedtune.core.faults import faults
from fedtune.data.objects import ObjectData
from fedtune.errors import FedtuneError
from fedtune.federation.claim import claimed
from fedtune.federation.files import dumps
from fedtune.federation.plugins import load_again
from fedtune.federation.process import listened
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.transport.messages import Message
from fedtune.transport.processes import serve


class Notes(Silent):
    """Keeps what is noted."""

    def __init__(self, said: list[str]) -> None:
        self._said = said

    def note(self, text: str) -> None:
        """Kept."""
        self._said.append(text)

    def info(self, text: str) -> None:
        """Kept too."""
        self._said.append(text)


def made(message: Message, *, objects: ObjectData | None) -> Message:
    """One run: its summary, or what ended it, and what was noted on the way."""
    said, path = list[str](), Path(message.text("path"))
    try:
        with listened(said), faults("a run"), claimed(path, path):
            config = parse_config(json.loads(bytes(message.body)), message.text("name"))
            summary = run(config, path, Notes(said), resume=path.exists(), objects=objects)
    except FedtuneError as error:
        return Message({"said": json.dumps(said), "error": type(error).__name__, "text": str(error)})
    return Message({"said": json.dumps(said)}, dumps(summary).encode())


def _answer_of(start: Message) -> Callable[[Message], Message]:
    told = json.loads(bytes(start.body))
    load_again([(file, sha256) for file, sha256 in told["plugins"]])
    objects = ObjectData.from_json(told["objects"]) if told["objects"] else None
    return partial(made, objects=objects)


if __name__ == "__main__":
    serve(_answer_of)
