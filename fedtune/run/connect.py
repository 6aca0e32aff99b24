"""How a run reaches its clients: in this process, in Flower's simulation, or over a network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from fedtune.core.loop import Arrival, Transport
from fedtune.core.types import Payload
from fedtune.core.wire import Message, decode, encode
from fedtune.errors import InputError
from fedtune.measure.clock import Clock
from fedtune.run.assemble import Parts
from fedtune.run.config import RunConfig
from fedtune.run.member import simulated
from fedtune.transport.in_process import Fates, InProcess, Simulation
from fedtune.transport.letters import Letter
from fedtune.transport.remote import Mail, Remote, Talk


class Deployment(Protocol):
    """A federation over a network, as a run needs it."""

    reply_limit: Callable[[int], int]  # bytes that a client's reply may have; set by the run

    def join(self, parts: Parts, known: Mapping[str, Any] | None) -> dict[int, int]:
        """Examples of each client, once they are there; `known` is partition.json of a resumed run."""

    def partition(self) -> dict[str, Any]:
        """What partition.json says of the clients."""

    def transport(self, parts: Parts, clock: Clock) -> Transport:
        """The way to the clients."""


@contextmanager
def connected(
    config: RunConfig, parts: Parts, folder: Path, clock: Clock, deployment: Deployment | None
) -> Iterator[Transport]:
    """The transport of a run, for as long as the run lasts.

    Args:
        config: The run's configuration.
        parts: What it is assembled from.
        folder: The run's folder.
        clock: Counts the clients' training.
        deployment: The way to real clients, for `transport.name: flower`.

    Raises:
        FederationError: Flower's simulation does not start.
    """
    federation, real = config.federation, parts.method.uses_wire
    simulate = federation.simulate
    what = Simulation(simulate.dropout, simulate.delay_s) if real else Simulation()
    deadline_s = federation.deadline_s if real else None
    if config.transport.name == "in-process":
        yield InProcess(parts.runner, simulation=what, deadline_s=deadline_s, seed=config.seed, clock=clock)
    elif config.transport.name == "flower-simulation":
        answer = partial(
            simulated,
            config=json.dumps(config.resolved()),
            held=str(folder.resolve() / "held"),
            threads=torch.get_num_threads(),
            base=os.getcwd(),
        )
        from fedtune.transport.flower import simulation

        workers = config.transport.workers
        gpus = torch.cuda.device_count() if parts.device.type == "cuda" else 0
        with simulation(answer, workers=workers, gpus=gpus) as mail:
            fates = Fates(what, deadline_s, config.seed)
            yield Simulated(mail, fates, parts.runner.states, window=2 * workers, clock=clock)
    else:
        assert deployment is not None  # check_transport
        yield deployment.transport(parts, clock)


def check_transport(config: RunConfig, deployment: Deployment | None) -> None:
    """Raises InputError if the clients cannot be reached in the way that the configuration says."""
    name = config.transport.name
    if name != "in-process" and find_spec("flwr") is None:
        raise InputError(
            f"transport.name is {name}, and Flower is not installed; pip install 'fedtune[flower]'"
        )
    if (name == "flower") != (deployment is not None):
        raise InputError(
            f"transport.name is {name}: a federation over a network (flower) is started with fedtune server, "
            "every other with fedtune run"
        )


class Simulated:
    """The transport to clients of one run in several processes of this machine.

    Arrivals come in the order that they have within one process, so that a run's logs are the same.

    Args:
        mail: Carries the letters.
        fates: What goes wrong on purpose.
        states: What each client keeps between rounds; travels with its orders.
        window: Clients that are spoken to at the same time.
        clock: Counts the clients' training.
    """

    def __init__(
        self, mail: Mail, fates: Fates, states: MutableMapping[int, Payload], *, window: int, clock: Clock
    ) -> None:
        self._fates, self._states = fates, states
        self._remote = Remote(mail, self._talk, window=window, deadline_s=None, clock=clock)

    def exchange(
        self, round: int, frames: Iterable[tuple[int, bytes]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        """As in process; a client that drops out or is late does not run at all."""
        ordered = self._fates.in_order(round, frames, in_plan_order=in_plan_order)
        return self._remote.exchange(round, ordered, in_plan_order=True)

    def _talk(self, round: int, client: int, frame: bytes) -> Talk:
        fault = self._fates.fault(round, client, frame)
        if fault:
            return Arrival(client, fault=fault)
        state = self._states.get(client)
        kept = encode(Message(state)) if state is not None else b""
        answer = yield Letter({"client": client}, frame, kept)
        if "fault" in answer.fields:
            return Arrival(client, fault=str(answer.fields["fault"]))
        if answer.state:
            self._states[client] = decode(answer.state).payload
        return Arrival(client, bytes(answer.body))
