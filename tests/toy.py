"""A one-parameter model whose training can be worked out by hand, and a federation of such clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.core.client import ClientRunner
from fedtune.core.cohort import PerRound, RoundOutcome, quorum_of, sample_cohort
from fedtune.core.ledger import Ledger
from fedtune.core.loop import RoundLoop
from fedtune.core.types import ServerEnv
from fedtune.data.batching import RANDOM, Batching
from fedtune.data.encoded import Encoded
from fedtune.measure.clock import Clock
from fedtune.transport.in_process import InProcess, Simulation


class Toy(nn.Module):
    """loss = mean over examples of (w - y)^2 / 2, y the example's first token."""

    def __init__(self, w: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=dtype))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.w - input_ids[:, 0]).square().mean() / 2)


def items(*values: int) -> list[Encoded]:
    return [Encoded((value,), (value,)) for value in values]


class Bench:
    """A method with its model, its clients and a ledger that keeps its entries."""

    def __init__(
        self,
        method: Any,
        model: nn.Module,
        data: Mapping[int, Sequence[Encoded]],
        simulation: Simulation = Simulation(),  # noqa: B008
        deadline_s: float | None = None,
        robust: Any = None,
        batching: Batching = RANDOM,
    ) -> None:
        self.method, self.data = method, data
        method.prepare(ServerEnv((), 0, torch.device("cpu"), batching))
        self.model = method.client_model(lambda: model)
        self.wire: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        clock = Clock()
        self.ledger = Ledger(self.wire.append, self.memory.append)
        self.runner = ClientRunner(
            method, self.model, data, pad_id=0, seed=0, device=torch.device("cpu"), batching=batching
        )
        transport = InProcess(self.runner, simulation=simulation, deadline_s=deadline_s, seed=0, clock=clock)
        device = torch.device("cpu")
        self.loop = RoundLoop(method, transport, self.ledger, clock, device, robust=robust)
        self.state = method.init(self.model)
        self.states_on_the_way: list[Any] = []

    def round(self, round: int, quorum: float | int = 1.0, per_round: PerRound = None) -> RoundOutcome:
        sizes = {client: len(examples) for client, examples in self.data.items()}
        cohort = sample_cohort(sizes, per_round, seed=0, round=round)
        self.state, outcome = self.loop.run(
            self.state,
            cohort,
            round,
            quorum=quorum_of(len(cohort.clients), quorum),
            on_arrival=lambda state, outcome: self.states_on_the_way.append(state),
        )
        return outcome
