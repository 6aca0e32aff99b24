"""All clients in this process, one after another, on one base model; frames are real bytes.

Drop-out and delay can be simulated. Time is then virtual: a client's reply arrives `delay` seconds after
its order was sent, whatever this machine took to compute it, so that a run is the same on every machine.
With secure aggregation it is the masked update that does not come: the client has shared its secrets by then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedtune.core.client import ClientRunner
from fedtune.core.faults import LEFT_OUT
from fedtune.core.seeds import numpy_generator
from fedtune.core.types import Arrival, Frame
from fedtune.core.wire import meta_of
from fedtune.measure.clock import Clock

log = logging.getLogger("fedtune")


@dataclass(frozen=True)
class Simulation:
    """What goes wrong on purpose.

    Attributes:
        dropout: Chance that a client does not reply in a round, in [0, 1).
        delay_s: Mean of the exponentially distributed time until a client's reply, in seconds.
    """

    dropout: float = 0.0
    delay_s: float = 0.0


class SimulatedFaults:
    """What goes wrong for whom, and when: drawn from the run's seed, the same on every machine.

    Args:
        simulation: What goes wrong.
        deadline_s: Seconds after which a reply is late; None: never.
        seed: The run's.
    """

    def __init__(self, simulation: Simulation, deadline_s: float | None, seed: int) -> None:
        self._simulation, self._seed = simulation, seed
        self._deadline_s = math.inf if deadline_s is None else deadline_s

    def in_order(
        self, round: int, frames: Iterable[tuple[int, Frame]], *, in_plan_order: bool
    ) -> Iterable[tuple[int, Frame]]:
        """A round's orders in the order of their replies; pulled one by one unless delays decide it."""
        if in_plan_order or self._simulation.delay_s == 0:
            return frames
        return sorted(frames, key=lambda sent: (self._draw(round, sent[0])[1], sent[0]))

    def fault(self, round: int, client: int, frame: Frame) -> str:
        """Why a client does not reply to this order of a round; empty if it does."""
        if self._simulation == Simulation() or meta_of(frame).get("phase", "masked") != "masked":
            return ""
        dropped, delay = self._draw(round, client)
        if dropped:
            return "it dropped out"
        if delay > self._deadline_s:
            return f"its reply comes after {delay:.1f} s, the deadline is {self._deadline_s:g} s"
        return ""

    def _draw(self, round: int, client: int) -> tuple[bool, float]:
        """Whether a client drops out of a round, and the seconds until its reply."""
        rng = numpy_generator(self._seed, "fate", round, client)
        return bool(rng.random() < self._simulation.dropout), float(rng.exponential(self._simulation.delay_s))


class InProcess:
    """The transport within one process."""

    def __init__(
        self,
        runner: ClientRunner,
        *,
        simulation: Simulation,
        deadline_s: float | None,
        seed: int,
        clock: Clock,
    ) -> None:
        self._runner, self._clock = runner, clock
        self._faults = SimulatedFaults(simulation, deadline_s, seed)

    def exchange(
        self, round: int, frames: Iterable[tuple[int, Frame]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        """Runs each client when its turn comes; a client that drops out or is late does not run at all.

        Raises:
            ProgramError: A client broke in a way in which any would.
        """
        for client, frame in self._faults.in_order(round, frames, in_plan_order=in_plan_order):
            fault = self._faults.fault(round, client, frame)
            yield Arrival(client, fault=fault) if fault else self._run(client, frame)

    def _run(self, client: int, frame: Frame) -> Arrival:
        try:
            with self._clock.part("training"):
                return Arrival(client, self._runner.handle(client, frame))
        except LEFT_OUT as error:
            log.debug("client %d failed", client, exc_info=True)
            return Arrival(client, fault=str(error))
