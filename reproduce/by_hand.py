"""A federation of models that are no language models: fedtune's method, rounds, wire and ledger, by hand.

Such a model looks its examples up by number: an example's only token is its row in what the model holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedtune.core.asking import LossMethod, asked
from fedtune.core.client import ClientRunner
from fedtune.core.cohort import PerRound, RoundOutcome, sample_cohort
from fedtune.core.compression import Compression
from fedtune.core.ledger import Ledger
from fedtune.core.loop import RoundLoop
from fedtune.core.types import Method, Payload
from fedtune.data.encoded import Encoded
from fedtune.measure.clock import Clock
from fedtune.transport.in_process import InProcess, Simulation


def federated(
    method: Method[Any],
    model: nn.Module,
    clients: Mapping[int, Sequence[Encoded]],
    rounds: int,
    seed: int,
    compression: Compression | None = None,
    *,
    whom: PerRound = None,
    choose: Callable[[RoundLoop, Any, int], tuple[int, ...] | None] | None = None,
    after: Callable[[int, Any, RoundOutcome], None] = lambda round, state, outcome: None,
) -> tuple[Any, Ledger, dict[int, Payload]]:
    """All clients in every round, weighed by their examples: state, what was sent, what each client keeps.

    `whom`: who is asked in their place, where the method does not say; or `choose`, which gets the state and
    the round, and ends the run with None. `after` is called after each round.
    """
    device, clock = torch.device("cpu"), Clock()
    runner = ClientRunner(
        method,
        model,
        clients,
        pad_id=0,
        seed=seed,
        device=device,
        compression=compression,
        tells=(lambda job, env: method.client_loss(job, env, None))
        if isinstance(method, LossMethod)
        else None,
    )
    transport = InProcess(runner, simulation=Simulation(), deadline_s=None, seed=seed, clock=clock)
    ledger = Ledger(lambda entry: None, lambda entry: None)
    loop = RoundLoop(method, transport, ledger, clock, device, compression=compression)
    weights = {client: len(items) for client, items in clients.items()}
    state = method.init(model)
    for round in range(1, rounds + 1):
        there = choose(loop, state, round) if choose else asked(method, round, weights, whom)
        if choose and there is None:
            break
        cohort = sample_cohort(weights, there, seed=seed, round=round)
        quorum = len(cohort.clients)
        state, outcome = loop.run(state, cohort, round, quorum=quorum, on_arrival=lambda state, outcome: None)
        after(round, state, outcome)
    return state, ledger, runner.states
