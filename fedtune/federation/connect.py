"""How a run reaches its clients: in this process, in several of this machine, or over a network."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedtune.config.schema import RunConfig
from fedtune.core.temporary import temporary_folder
from fedtune.core.types import Arrival, Frame, Payload, Transport
from fedtune.core.wire import Content, decode, encode
from fedtune.data.objects import ObjectData
from fedtune.errors import InputError, ProgramError
from fedtune.federation.assembly import Assembly
from fedtune.federation.client import OfRun, simulated
from fedtune.federation.client_process import told
from fedtune.federation.devices import cards_of, device_of
from fedtune.federation.plugins import refuse_this_process
from fedtune.federation.workers import workers_of
from fedtune.measure.clock import Clock
from fedtune.registry import plugins
from fedtune.transport.in_process import InProcess, SimulatedFaults, Simulation
from fedtune.transport.messages import Message
from fedtune.transport.processes import processes
from fedtune.transport.remote import Channel, Exchange, Remote

log = logging.getLogger("fedtune")
PROGRAM = "fedtune.federation.client_process"


class Deployment(Protocol):
    """A federation over a network, as a run needs it."""

    reply_limit: Callable[[int], int]  # bytes that a client's reply may have; set by the run
    standing: Callable[[], Mapping[str, Any]]  # how the run stands; set by who runs it

    def join(self, assembly: Assembly, known: Mapping[str, Any] | None) -> dict[int, int]:
        """Examples of each client, once they are there; `known` is partition.json of a resumed run."""

    def partition(self) -> dict[str, Any]:
        """What partition.json says of the clients."""

    def there(self) -> Mapping[int, Mapping[str, Any]]:
        """What is known of each client now: `name`, `here`, `seen`."""

    def transport(self, assembly: Assembly, clock: Clock) -> Transport:
        """The way to the clients."""


@contextmanager
def shared_folder(config: RunConfig) -> Iterator[Path | None]:
    """A folder for the weights that several processes map, as long as the run lasts; None where one has all.

    On GPUs each process has a copy of its own.
    """
    alone = config.transport.name == "flower" or config.transport.workers == 1
    if alone or device_of(config.model.device).type != "cpu":
        yield None
    else:
        with temporary_folder() as folder:
            yield folder


@contextmanager
def connected(
    config: RunConfig,
    assembly: Assembly,
    folder: Path,
    clock: Clock,
    deployment: Deployment | None,
    objects: ObjectData | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[Transport]:
    """The transport of a run, for as long as the run lasts.

    Args:
        config: The run's configuration.
        assembly: What it is assembled from.
        folder: The run's folder.
        clock: Counts the clients' training.
        deployment: The way to real clients, for `transport.name: flower`.
        objects: The examples, with `data.train: objects`.
        note: Is told how many processes train clients, where that was not clear.

    Raises:
        FederationError: Flower's simulation does not start.
    """
    federation, real = config.federation, assembly.method.uses_wire
    simulate = federation.simulate
    what = Simulation(simulate.dropout, simulate.delay_s) if real else Simulation()
    deadline_s = federation.deadline_s if real else None
    if config.transport.name == "flower":
        assert deployment is not None  # check_transport
        yield deployment.transport(assembly, clock)
        return
    workers = workers_of(config, assembly)
    if workers.note:
        note(workers.note)
    flower, count = config.transport.name == "flower-simulation", workers.count
    if count == 1 and not flower:
        yield InProcess(
            assembly.runner, simulation=what, deadline_s=deadline_s, seed=config.seed, clock=clock
        )
        return
    cards, document = cards_of(config.model.device), config.resolved()
    if cards:
        document["model"]["device"] = "cuda"  # each process sees one, whichever that is
    of = OfRun(
        config=json.dumps(document),
        held=str(folder.resolve() / "held"),
        threads=workers.threads,
        base=os.getcwd(),
        shared=str(assembly.shared or ""),
        objects=objects.to_json() if objects else "",
        plugins=tuple((str(plugin.file), plugin.sha256) for plugin in plugins()),
    )
    faults = SimulatedFaults(what, deadline_s, config.seed)
    simulation = partial(
        Simulated, faults=faults, states=assembly.runner.states, window=2 * count, clock=clock
    )
    if flower:
        from fedtune.transport.flower import simulation as flowers

        with flowers(partial(simulated, of=of), workers=count, gpus=len(cards)) as channel:
            yield simulation(channel)
    else:
        with processes(PROGRAM, told(of), workers=count, threads=workers.threads, cards=cards) as own:
            yield simulation(own, rest=own.wait)


def check_transport(config: RunConfig, deployment: Deployment | None) -> None:
    """Raises InputError if the clients cannot be reached in the way that the configuration says."""
    name = config.transport.name
    if name != "in-process" and find_spec("flwr") is None:
        raise InputError(
            f"transport.name is {name}, and Flower is not installed; pip install 'fedtune[flower]'"
        )
    if name == "flower-simulation" or (name == "in-process" and config.transport.workers != 1):
        because = f"transport.name is {name} with workers: {config.transport.workers}, so clients run in"
        refuse_this_process(config, f"{because} processes of their own")
    if (name == "flower") != (deployment is not None):
        raise InputError(
            f"transport.name is {name}: a federation over a network (flower) is started with fedtune server, "
            "every other with fedtune run"
        )


class Simulated:
    """The transport to clients of one run in several processes of this machine.

    Arrivals come in the order that they have within one process, so that a run's logs are the same.

    Args:
        channel: Carries the messages.
        faults: What goes wrong on purpose.
        states: What each client keeps between rounds; travels with its orders.
        window: Clients that are spoken to at the same time.
        clock: Counts the clients' training.
        rest: Waits as many seconds for answers, or less if one comes.
    """

    def __init__(
        self,
        channel: Channel,
        faults: SimulatedFaults,
        states: MutableMapping[int, Payload],
        *,
        window: int,
        clock: Clock,
        rest: Callable[[float], None] = time.sleep,
    ) -> None:
        self._faults, self._states = faults, states
        self._remote = Remote(
            channel, self._exchange_with, window=window, deadline_s=None, clock=clock, rest=rest
        )

    def exchange(
        self, round: int, frames: Iterable[tuple[int, Frame]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        """As in process; a client that drops out or is late does not run at all."""
        ordered = self._faults.in_order(round, frames, in_plan_order=in_plan_order)
        return self._remote.exchange(round, ordered, in_plan_order=True)

    def _exchange_with(self, round: int, client: int, frame: Frame) -> Exchange:
        fault = self._faults.fault(round, client, frame)
        if fault:
            return Arrival(client, fault=fault)
        state = self._states.get(client)
        kept = encode(Content(state)) if state is not None else b""
        answer = yield Message({"client": client}, frame, kept)
        del frame, kept
        for line in json.loads(str(answer.fields.get("said", "[]"))):
            log.warning("%s", line)
        if "broken" in answer.fields:  # from a process of this run: over a network no client can end it
            error = ProgramError(str(answer.fields["broken"]))
            error.add_note(str(answer.fields["traceback"]))
            raise error
        if answer.fields.get("died"):
            raise ProgramError(
                f"training of client {client} in round {round}: its process of the simulation ended "
                f"({str(answer.fields['fault']).splitlines()[0][:200]}). Most often the system ends one when "
                "memory is short: lower transport.workers, method.batch_size or data.max_length."
            )
        if "fault" in answer.fields:
            return Arrival(client, fault=str(answer.fields["fault"]))
        if answer.state:
            self._states[client] = decode(answer.state).payload
        return Arrival(client, answer.body)
