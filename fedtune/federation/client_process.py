"""The program of a process that trains a run's clients (`transport.workers`); the run starts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from fedtune.federation.client import OfRun, simulated
from fedtune.transport.messages import Message
from fedtune.transport.processes import serve


def told(of: OfRun) -> Message:
    """What such a process is told first."""
    return Message({}, json.dumps(asdict(of)).encode())


def _answer_of(start: Message) -> Callable[[Message], Message]:
    of = json.loads(bytes(start.body))
    of["plugins"] = tuple(tuple(plugin) for plugin in of["plugins"])
    return partial(simulated, of=OfRun(**of))


if __name__ == "__main__":
    serve(_answer_of)
