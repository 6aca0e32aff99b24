"""Every message of a run, before it: the method's own orders, for cohorts and seeds as in the run.

Rounds go on as in `core/loop.py`, but that clients are not asked: a reply holds what its order expects. For
the methods that draw seeds, whose next order depends on them, they are drawn as the client would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.core.asking import asked
from fedtune.core.cohort import Cohort, sample_cohort
from fedtune.core.compression import Compression
from fedtune.core.robust import RobustMean
from fedtune.core.seeds import derive_seed, torch_generator
from fedtune.core.types import MODEL, Order, Payload, Reply, TensorSpec
from fedtune.evaluation.federated import FederatedEvaluation
from fedtune.planning.block_turns import Turn, ordered
from fedtune.planning.fake import Fakes, values

CPU = torch.device("cpu")
DRAWING = ("fedkseed", "fedkseed-pro")  # the next order depends on the seeds that clients drew


@dataclass(frozen=True)
class Exchange:
    """Payload bytes of one client in one round; `model` of `down` is what it is sent to hold."""

    round: int
    client: int
    down: int
    up: int
    model: int


@dataclass
class Traffic:
    """All messages of a run."""

    exchanges: list[Exchange] = field(default_factory=list)
    scores: list[Exchange] = field(default_factory=list)  # in which clients are asked for scores
    turns: list[Turn] = field(default_factory=list)  # of methods that train blocks in turn
    exact: bool = True  # False: what is sent depends on losses, and is what is to be expected

    @property
    def down(self) -> int:
        """Bytes to clients."""
        return sum(exchange.down for exchange in (*self.exchanges, *self.scores))

    @property
    def up(self) -> int:
        """Bytes from clients."""
        return sum(exchange.up for exchange in (*self.exchanges, *self.scores))


def simulate(
    method: Any,
    model: nn.Module,
    fakes: Fakes,
    *,
    clients: Mapping[int, int],
    per_round: float | int | None,
    seed: int,
    robust: RobustMean | None = None,
    compression: Compression | None = None,
    evaluation: FederatedEvaluation | None = None,
    every: int = 1,
) -> Traffic:
    """The payloads of all rounds, if every client that is asked replies.

    Args:
        method: Prepared, with the model that its `client_model` gave.
        model: That model, of fake tensors.
        fakes: Where it comes from.
        clients: Examples of each client; what is sent does not depend on how many.
        per_round: As `federation.clients_per_round`.
        seed: The run's.
        robust: What becomes of replies before the server's step.
        compression: How updates travel; None: as they are.
        evaluation: Where clients score the result.
        every: As `evaluation.every`.
    """
    traffic = Traffic()
    if not method.uses_wire:
        return traffic
    pruned = getattr(method.config, "prune", None) is not None and method.rounds > 1
    traffic.exact = not pruned and (
        method.config.name != "fedkseed-pro" or method.rounds <= 2
    )  # later, p depends on the losses
    advance = _advance(method, robust)
    with values():
        state = first_state(method, model)
        everyone = sample_cohort(clients, None, seed=seed, round=0)
        if evaluation is not None:
            traffic.scores += _asked_for_scores(evaluation, state, 0, everyone)
        for round in range(1, method.rounds + 1):
            whom = asked(method, round, clients, per_round)
            cohort = sample_cohort(clients, whom, seed=seed, round=round)
            for _ in cohort.clients if method.arrival == "in-turn" else [0]:
                replies = []
                for order in method.plan(state, round, cohort):
                    traffic.exchanges.append(_exchange(round, order, compression))
                    traffic.turns += ordered(order.payload.scalars)
                    replies.append(
                        reply_to(
                            method, as_restored(order, compression), cohort, fakes, round=round, seed=seed
                        )
                    )
                state = advance(state, replies)
            if evaluation is not None and (round == method.rounds or (every and round % every == 0)):
                traffic.scores += _asked_for_scores(evaluation, state, round, everyone)
    return traffic


def _asked_for_scores(
    evaluation: FederatedEvaluation, state: Any, round: int, everyone: Cohort
) -> Iterable[Exchange]:
    return [_exchange(round, order, None) for order in evaluation.plan(evaluation.of(state), round, everyone)]


def first_state(method: Any, model: nn.Module) -> Any:
    """The server's first state; what is trained before the first round keeps its shape, untrained."""
    config = method.config
    if hasattr(config, "alignment"):
        method = copy(method)
        untrained = config.alignment.model_copy(update={"steps_before": 0})
        method.config = config.model_copy(update={"alignment": untrained})
    if getattr(config, "epsilon", None) == "auto":  # measured on weights, which planning has none of
        method = copy(method)
        method.config = config.model_copy(update={"epsilon": 1.0})
    # FedKSeed's K numbers stand for any model, but it is told by the hash of what it holds
    return method.init(nn.Linear(1, 1) if config.name in DRAWING else model)


def reply_to(method: Any, order: Order, cohort: Cohort, fakes: Fakes, *, round: int, seed: int) -> Reply:
    """A reply with what the order expects, without content; seeds are drawn as the client would.

    Args:
        method: The method.
        order: What it answers.
        cohort: The round's.
        fakes: Where its tensors come from.
        round: The round, counted from 1.
        seed: The run's.
    """
    if method.config.name in DRAWING:
        return Reply(order.client, Payload(_drawn(method, order, round, seed)), {}, cohort)
    up = {}
    for name, spec in order.expects.items():
        shape = _whole(spec)
        small = method.config.name == "infinite-pool"  # whose state is of real numbers
        up[name] = torch.zeros(shape, dtype=spec.dtype) if small else fakes.empty(shape, spec.dtype)
    return Reply(order.client, Payload(up), {}, cohort)


def as_restored(order: Order, compression: Compression | None) -> Order:
    """An order with what the method gets of its reply, however that travelled."""
    return replace(order, expects=compression.restored(order.expects)) if compression else order


def _exchange(round: int, order: Order, compression: Compression | None) -> Exchange:
    held = sum(t.nbytes for name, t in order.payload.tensors.items() if name.startswith(MODEL))
    specs = compression.expects(order.expects) if compression else order.expects
    up = sum(map(_nbytes, specs.values()))
    return Exchange(round, order.client, order.payload.nbytes, up, held)


def _nbytes(spec: TensorSpec) -> int:
    count = spec.dtype.itemsize
    for length in spec.shape:
        assert length is not None, "no method leaves a dimension open"
        count *= length
    return count


def _drawn(method: Any, order: Order, round: int, seed: int) -> Mapping[str, Tensor]:
    """The seeds that a client of FedKSeed draws, with scalars that are not 0."""
    own = derive_seed(seed, "client", order.client, round)
    seeds = method.draw(order.payload, torch_generator(own, "seeds"))
    scalars = torch.randn(len(seeds), generator=torch_generator(own, "planned scalars")).tolist()
    tensors: Mapping[str, Tensor] = method.reply(seeds, scalars).tensors
    lacking = {n: spec for n, spec in order.expects.items() if n not in tensors}  # without a server
    return {**tensors, **{n: torch.zeros(_whole(spec), dtype=spec.dtype) for n, spec in lacking.items()}}


def _whole(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(n for n in spec.shape if n is not None)


def _advance(method: Any, robust: RobustMean | None) -> Callable[[Any, list[Reply]], Any]:
    """How the server's state goes on, as far as the next orders' sizes depend on it."""
    config, server = method.config, method
    if config.name == "fedavg" and config.aggregation not in ("stack", "residual"):
        return lambda state, replies: state  # the same tensors every round
    if config.name == "infinite-pool" and config.download == "model":
        return lambda state, replies: state
    if hasattr(config, "alignment"):  # what aligning changes keeps its shape
        server = copy(method)
        server.config = config.model_copy(
            update={"alignment": config.alignment.model_copy(update={"steps": 0})}
        )

    def step(state: Any, replies: Iterable[Reply]) -> Any:
        return server.server_step(state, robust(replies) if robust else iter(replies))

    return step
