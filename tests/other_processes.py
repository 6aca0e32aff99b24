"""The contract's federations with their clients in other processes, over any channel of one machine.

As a program it is what such a process runs (`fedtune.transport.processes`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from contract import FORMS, Federation, bits, whole

from fedtune.core.ledger import Ledger
from fedtune.core.loop import RoundLoop
from fedtune.core.store import Store
from fedtune.core.types import Payload
from fedtune.core.wire import Content, decode, encode
from fedtune.federation.connect import Simulated
from fedtune.measure.clock import Clock
from fedtune.methods import registry
from fedtune.transport.in_process import SimulatedFaults, Simulation
from fedtune.transport.messages import Message, fault
from fedtune.transport.processes import serve
from fedtune.transport.remote import Channel

TRIED = [(name, next(iter(FORMS.get(name, {"": None})))) for name in registry.METHODS]
TRIED += [
    ("fedavg", "scaffold"),
    ("fedavg", "asynchronous"),
    ("fedcybgd", "hybrid"),
    ("fedavg", "stack"),
    ("fedavg", "int4-top-k-errors"),
    ("fedavg", "residual"),
    ("fedavg", "alternate"),
    ("fedavg", "diloco-int8"),
    ("fedavg", "own-b-fine-tune-classifier"),
    ("fedavg", "ditto"),
    ("fedavg", "prune"),
    ("fedkseed", "ring"),
    ("fedkseed", "subzero"),
    ("fedkseed", "lozo-classifier"),
    ("infinite-pool", "means"),
]


def answer(message: Message, *, held: str) -> Message:
    """What a client of `Federation` answers, in a process of its own."""
    what, _, frame = bytes(message.body).partition(b"\n")
    name, label = what.decode().split()
    runner = _runner(name, label, held)
    client = message.number("client")
    runner.states = {client: decode(message.state).payload} if message.state else {}
    try:
        reply = runner.handle(client, frame)
    except Exception as error:
        return fault(f"{type(error).__name__}: {error}")
    state = runner.states.get(client)
    return Message({}, reply, encode(Content(state)) if state is not None else b"")


@cache
def _runner(name: str, label: str, held: str):  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    runner = Federation(name, label).runner
    runner.store = Store(Path(held) / name / label)
    return runner


class Labelled:
    """A channel that puts the method's name and form in front of each order."""

    def __init__(self, channel: Channel, what: str) -> None:
        self.pull, self._channel, self._what = channel.pull, channel, what

    def push(self, client: int, message: Message, *, lifetime_s: float) -> str:
        body = self._what.encode() + b"\n" + message.body
        return self._channel.push(client, Message(message.fields, body, message.state), lifetime_s=lifetime_s)


def same_bits(name: str, label: str, channel: Channel, **rest: Callable[[float], None]) -> None:
    """Runs a method of the contract over a channel, and compares all it did with the run in process."""
    federation = Federation(name, label)
    clock = Clock()
    transport = Simulated(
        Labelled(channel, f"{name} {label}"),
        SimulatedFaults(Simulation(), None, 0),
        federation.runner.states,
        window=4,
        clock=clock,
        **rest,
    )
    ledger = Ledger(federation.wire.append, federation.memory.append)
    federation.loop = RoundLoop(
        federation.method, transport, ledger, clock, torch.device("cpu"), compression=federation.compression
    )
    federation.run()
    wanted = whole(name, label)
    assert federation.state_bits() == wanted.state_bits()
    assert federation.exported() == wanted.exported()
    assert _kept(federation.runner.states) == _kept(wanted.runner.states)
    assert payloads(federation.wire) == payloads(wanted.wire)


def payloads(wire: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Every message, in the order of the ledger; a frame's length also tells the peak of memory, which may
    differ: here the server's state and the clients' model share tensors in process."""
    return [(e["round"], e["client"], e["direction"], e["kind"], e["payload_bytes"]) for e in wire]


def _kept(states: dict[int, Payload]) -> dict[int, bytes]:
    return {client: bits(state) for client, state in states.items()}


if __name__ == "__main__":
    serve(lambda start: partial(answer, held=start.text("held")))
