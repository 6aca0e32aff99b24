"""A federation of models that are no language models: fedtune's method, rounds, wire and ledger, by hand.

Such a model looks its examples up by number: an example's only token is its row in what the model holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fedtune.core.client import ClientRunner
from fedtune.core.cohort import sample_cohort
from fedtune.core.compression import Compression
from fedtune.core.ledger import Ledger
from fedtune.core.loop import RoundLoop
from fedtune.core.types import Payload
from fedtune.data.encoded import Encoded
from fedtune.measure.clock import Clock
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.state import State
from fedtune.transport.in_process import InProcess, Simulation


def federated(
    method: FedAvg,
    model: nn.Module,
    clients: Mapping[int, Sequence[Encoded]],
    rounds: int,
    seed: int,
    compression: Compression | None = None,
) -> tuple[State, Ledger, dict[int, Payload]]:
    """All clients in every round, weighed by their examples: state, what was sent, what each client keeps."""
    device, clock = torch.device("cpu"), Clock()
    runner = ClientRunner(method, model, clients, pad_id=0, seed=seed, device=device, compression=compression)
    transport = InProcess(runner, simulation=Simulation(), deadline_s=None, seed=seed, clock=clock)
    ledger = Ledger(lambda entry: None, lambda entry: None)
    loop = RoundLoop(method, transport, ledger, clock, device, compression=compression)
    weights = {client: len(items) for client, items in clients.items()}
    state: State = method.init(model)
    for round in range(1, rounds + 1):
        cohort = sample_cohort(weights, None, seed=seed, round=round)
        state, _ = loop.run(state, cohort, round, quorum=len(clients), on_arrival=lambda state, outcome: None)
    return state, ledger, runner.states
