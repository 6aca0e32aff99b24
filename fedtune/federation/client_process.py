"""The program of a process that trains a run's clients (`transport.workers`); the run starts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

from fedtune.federation.client import simulated
from fedtune.transport.messages import Message
from fedtune.transport.processes import serve


def told(arguments: dict[str, object]) -> Message:
    """What such a process is told first: the arguments of `simulated` but for the message."""
    return Message({}, json.dumps(arguments).encode())


def _answer_of(start: Message) -> Callable[[Message], Message]:
    arguments = json.loads(bytes(start.body))
    arguments["plugins"] = tuple(tuple(plugin) for plugin in arguments["plugins"])
    return partial(simulated, **arguments)


if __name__ == "__main__":
    serve(_answer_of)
