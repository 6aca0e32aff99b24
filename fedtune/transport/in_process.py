"""All clients in this process, one after another, on one base model; frames are real bytes.

Drop-out and delay can be simulated. Time is then virtual: a client's reply arrives `delay` seconds after
its order was sent, whatever this machine took to compute it, so that a run is the same on every machine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedtune.core.client import ClientRunner
from fedtune.core.loop import Arrival
from fedtune.core.seeds import numpy_generator
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
        self._runner, self._simulation = runner, simulation
        self._deadline_s = math.inf if deadline_s is None else deadline_s
        self._seed, self._clock = seed, clock

    def exchange(
        self, round: int, frames: Iterable[tuple[int, bytes]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        """Runs each client when its turn comes; a client that drops out or is late does not run at all."""
        if not in_plan_order and self._simulation.delay_s > 0:
            frames = sorted(frames, key=lambda sent: (self._fate(round, sent[0])[1], sent[0]))
        for client, frame in frames:
            dropped, delay = self._fate(round, client)
            if dropped:
                yield Arrival(client, fault="it dropped out")
            elif delay > self._deadline_s:
                yield Arrival(
                    client,
                    fault=f"its reply comes after {delay:.1f} s, the deadline is {self._deadline_s:g} s",
                )
            else:
                yield self._run(client, frame)

    def _run(self, client: int, frame: bytes) -> Arrival:
        try:
            with self._clock.part("training"):
                return Arrival(client, self._runner.handle(client, frame))
        except Exception as error:  # a process boundary: whatever breaks a client must not break the round
            log.debug("client %d failed", client, exc_info=True)
            return Arrival(client, fault=f"it failed: {type(error).__name__}: {error}")

    def _fate(self, round: int, client: int) -> tuple[bool, float]:
        """Whether a client drops out of a round, and the seconds until its reply."""
        rng = numpy_generator(self._seed, "fate", round, client)
        return bool(rng.random() < self._simulation.dropout), float(rng.exponential(self._simulation.delay_s))
