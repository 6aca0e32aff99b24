"""FedBiOT on small models: two clients, and every byte between them and the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from model_families import build
from torch import Tensor, nn

from fedtune.core.client import ClientRunner
from fedtune.core.cohort import Cohort, RoundOutcome
from fedtune.core.ledger import Ledger
from fedtune.core.loop import RoundLoop
from fedtune.core.types import Arrival, ServerEnv
from fedtune.data.encoded import Encoded
from fedtune.measure.clock import Clock
from fedtune.methods import registry
from fedtune.protection.robust import Robust
from fedtune.protection.robust_mean import robust_mean
from fedtune.transport.in_process import InProcess, Simulation

CPU = torch.device("cpu")

SMALL: dict[str, Any] = {
    "rounds": 3,
    "local_steps": 2,
    "batch_size": 2,
    "lr": 1e-2,
    "adapter_layers": 1,
    "layer_dropout": 0.4,
    "lora": {"rank": 2, "alpha": 4.0},
}

ALIGNED = {"alignment": {"steps_before": 3, "steps": 2, "batch_size": 2, "lr": 1e-2}}

SIZES = {0: 2, 1: 6}


def items(count: int, seed: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 64, (count, 7), generator=generator).tolist()
    return [Encoded(tuple(row[: 4 + i % 4]), tuple(row[: 4 + i % 4])) for i, row in enumerate(rows)]


class Run:
    """A federation whose clients share nothing: each has a runner, and what it holds, of its own."""

    def __init__(
        self,
        name: str = "fedbiot",
        *,
        family: str = "llama",
        blocks: int = 6,
        public: bool = True,
        robust: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        defaults = {} if name == "fedavg" else SMALL
        self.config = registry.config_class(name).model_validate({**defaults, **settings})
        self.method: Any = registry.build(self.config, 4)
        self.method.prepare(ServerEnv(items(4, 9) if public else [], 0, CPU))
        self.model = self.method.client_model(lambda: build(family, blocks=blocks))
        self.runners = {c: self.runner(c) for c in SIZES}
        self.wire: list[dict[str, Any]] = []
        self.down: dict[tuple[int, int], bytes] = {}
        self.up: dict[tuple[int, int], bytes] = {}
        self.absent: set[int] = set()
        self.alter: Callable[[int, bytes], bytes] = lambda client, frame: frame
        mean = robust_mean(Robust(**robust), self.method, None) if robust else None
        ledger = Ledger(self.wire.append, lambda entry: None)
        self.loop = RoundLoop(self.method, self, ledger, Clock(), CPU, robust=mean)
        self.state = self.method.init(self.model)

    def runner(self, client: int) -> ClientRunner:
        data = {client: items(SIZES[client], client)}
        return ClientRunner(self.method, self.model, data, pad_id=0, seed=4, device=CPU)

    def exchange(
        self, round: int, frames: Iterable[tuple[int, bytes]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        for client, frame in frames:
            self.down[round, client] = frame
            if client in self.absent:
                yield Arrival(client, fault="it dropped out")
                continue
            one = InProcess(
                self.runners[client], simulation=Simulation(), deadline_s=None, seed=4, clock=Clock()
            )
            for arrival in one.exchange(round, [(client, frame)], in_plan_order=True):
                self.up[round, client] = arrival.frame
                frame = self.alter(client, arrival.frame) if arrival.frame else b""
                yield Arrival(client, frame, arrival.fault)

    def round(self, round: int, clients: tuple[int, ...] = (0, 1), quorum: int = 1) -> RoundOutcome:
        cohort = Cohort(clients, {c: SIZES[c] for c in clients}, len(SIZES))
        self.state, outcome = self.loop.run(
            self.state, cohort, round, quorum=quorum, on_arrival=lambda state, outcome: None
        )
        return outcome

    def client_module(self, client: int) -> nn.Module:
        runner = self.runners[client]
        key = str(runner.states[client].scalars["model"])
        return runner.store.built(key, lambda: pytest.fail("it was never built"))

    def sent(self, kind: str) -> list[tuple[int, int, int]]:
        """Round, client and bytes of downloads."""
        return [
            (e["round"], e["client"], e["payload_bytes"])
            for e in self.wire
            if e["kind"] == kind and e["direction"] == "down"
        ]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
