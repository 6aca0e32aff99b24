"""Every registered method through Flower's simulation on Ray: the same bits as in process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

import torch
from command import fedtune, lines, outcome, write_config
from contract import FORMS, Federation, bits, whole

from fedtune.core.ledger import Ledger
from fedtune.core.loop import RoundLoop
from fedtune.core.store import Store
from fedtune.core.types import Payload
from fedtune.core.wire import Content, decode, encode
from fedtune.federation.connect import Simulated
from fedtune.measure.clock import Clock
from fedtune.methods import registry
from fedtune.transport.flower import SimulatedChannel, simulation
from fedtune.transport.in_process import SimulatedFaults, Simulation
from fedtune.transport.messages import Message, fault

TRIED = [(name, next(iter(FORMS.get(name, {"": None})))) for name in registry.METHODS]
TRIED += [("fedavg", "scaffold"), ("fedavg", "asynchronous"), ("fedcybgd", "hybrid"), ("fedavg", "stack")]


def answer(message: Message, *, held: str) -> Message:
    """What a client of `Federation` answers, in a process of the simulation."""
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

    def __init__(self, channel: SimulatedChannel, what: str) -> None:
        self.pull, self._channel, self._what = channel.pull, channel, what

    def push(self, client: int, message: Message, *, lifetime_s: float) -> str:
        body = self._what.encode() + b"\n" + message.body
        return self._channel.push(client, Message(message.fields, body, message.state), lifetime_s=lifetime_s)


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedChannel]:
    held = str(tmp_path_factory.mktemp("held"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with simulation(partial(answer, held=held), workers=1) as found:
        yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "label"), TRIED)
def test_every_method_ends_with_the_bits_of_a_run_in_process(
    name: str, label: str, channel: SimulatedChannel
) -> None:
    federation = Federation(name, label)
    clock = Clock()
    transport = Simulated(
        Labelled(channel, f"{name} {label}"),
        SimulatedFaults(Simulation(), None, 0),
        federation.runner.states,
        window=2,
        clock=clock,
    )
    ledger = Ledger(federation.wire.append, federation.memory.append)
    federation.loop = RoundLoop(federation.method, transport, ledger, clock, torch.device("cpu"))
    federation.run()
    wanted = whole(name, label)
    assert federation.state_bits() == wanted.state_bits()
    assert federation.exported() == wanted.exported()
    assert _kept(federation.runner.states) == _kept(wanted.runner.states)
    assert _sent(federation) == _sent(wanted)


def _sent(federation: Federation) -> list[tuple[object, ...]]:
    """Every message, in any order; a frame's length also tells the peak of memory, which may differ."""
    return _payloads(federation.wire)


def _kept(states: dict[int, Payload]) -> dict[int, bytes]:
    return {client: bits(state) for client, state in states.items()}


def test_secure_aggregation_has_the_same_sums(tmp_path: Path) -> None:
    pytest.importorskip("Crypto", reason="secure aggregation is not installed (the extra `privacy`)")
    document = {
        "data": {"clients": 3, "max_examples": 12, "max_length": 64},
        "method": {"name": "fedavg", "rounds": 1, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}},
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "every": 0},
        "federation": {"secure_aggregation": {"threshold": 0.6}},
    }
    write_config(tmp_path / "c.yaml", document)
    here = fedtune("run", "c.yaml", "--out", "here", "--quiet", cwd=tmp_path)
    assert here.status == 0, here.err
    there = fedtune(
        *("run", "c.yaml", "transport.name=flower-simulation", "--quiet", "--out", "there"), cwd=tmp_path
    )
    assert there.status == 0, there.err
    wanted, found = outcome(tmp_path / "here"), outcome(tmp_path / "there")
    assert found["final"] == wanted["final"]
    assert _payloads(found["wire"]) == _payloads(wanted["wire"])
    assert {entry["kind"] for entry in found["wire"]} == {"train", "secure-aggregation"}


def _payloads(wire: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return sorted((e["round"], e["client"], e["direction"], e["kind"], e["payload_bytes"]) for e in wire)


def test_a_config_runs_unchanged_with_drop_outs_delays_and_a_resume(tmp_path: Path) -> None:
    document = {
        "seed": 6,  # one client drops out in each of the first two rounds
        "data": {"clients": 3, "max_examples": 24, "max_length": 64},
        "method": {"name": "fedavg", "rounds": 2, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}},
        "evaluation": {"tasks": ["loss"], "max_examples": 8},
        "federation": {"quorum": 1, "simulate": {"dropout": 0.2, "delay_s": 1.0}, "deadline_s": 1.9},
    }
    write_config(tmp_path / "c.yaml", document)
    here = fedtune("run", "c.yaml", "--out", "here", "--quiet", cwd=tmp_path)
    assert here.status == 0, here.err
    flower = ("transport.name=flower-simulation", "--quiet")
    killed = fedtune(
        "run", "c.yaml", *flower, "--out", "there", cwd=tmp_path, die_at=2, watched="round-0002.replies"
    )
    assert killed.status == -9, killed.err
    there = fedtune("run", "c.yaml", *flower, "--resume", "there", cwd=tmp_path)
    assert there.status == 0, there.err
    wanted, found = outcome(tmp_path / "here"), outcome(tmp_path / "there")
    assert found["final"] == wanted["final"]
    assert found["rounds"] == wanted["rounds"]
    assert any(entry["left_out"] for entry in wanted["rounds"][1:])
    assert sorted(map(str, found["wire"])) == sorted(map(str, wanted["wire"]))
    assert lines(tmp_path / "there/memory.jsonl") == lines(tmp_path / "here/memory.jsonl")
