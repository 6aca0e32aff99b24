"""BAdam: Adam on one block at a time, on all data in one place; the central row beside FedCyBGD.

Luo, Yu and Li, "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models"
(2024), Algorithm 1: K Adam steps on a block, then the next; the state begins anew with each block.

Decisions: every block gets exactly `switch_interval` steps, the last one those that are left; all parameters
of a block have the same weight decay; batches and the learning rate's schedule go on across blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from fedtune.core.cohort import Cohort
from fedtune.core.types import (
    ArrivalOrder,
    ClientEnv,
    ClientResult,
    Order,
    Payload,
    Reply,
    ServerEnv,
    TensorSpec,
)
from fedtune.methods.fedcybgd.order import turns
from fedtune.methods.fedcybgd.settings import BAdamConfig
from fedtune.methods.fedcybgd.training import train_blocks
from fedtune.methods.loading import load
from fedtune.methods.references import State
from fedtune.models.parts import CLASSIFIER, check_around, find_parts


class BAdam:
    """BAdam; see the module's text."""

    rounds = 1
    arrival: ArrivalOrder = "plan-order"
    pools_data = True
    uses_wire = False
    saves_merged = False
    sends_model = False

    def __init__(self, config: BAdamConfig, seed: int) -> None:
        self.config, self._seed = config, seed

    def prepare(self, server: ServerEnv) -> None:
        """Nothing is needed besides the state."""
        server.refuse_public(self.config.name)

    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The whole model; `trainable` is what some block trains."""
        model = build()
        check_around(
            find_parts(cast(PreTrainedModel, model)), self.config.extra_blocks, "method.extra_blocks"
        )
        model.requires_grad_(False)
        for parameter in self._trained(model).values():
            parameter.requires_grad_(True)
        return model

    def init(self, model: nn.Module) -> State:
        """The model as it is."""
        return State({name: p.detach().cpu().clone() for name, p in self._trained(model).items()})

    def plan(self, state: State, round: int, cohort: Cohort) -> Iterator[Order]:
        """The one place that holds all data starts from the model as it is."""
        expects = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in state.start.items()}
        return (Order(client, Payload(state.start), expects) for client in cohort.clients)

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        """Training to its end, block after block."""
        model = cast(PreTrainedModel, env.model)
        parameters = self._trained(model)
        load(parameters, job.tensors)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        try:
            trained = train_blocks(
                env,
                self._blocks(model),
                self.config,
                checkpointing=self.config.gradient_checkpointing,
                interval=self.config.switch_interval,
            )
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        weights = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
        return ClientResult(Payload(weights), trained.metrics)

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        """Keeps the result."""
        return State(state.start, {name: t for r in replies for name, t in r.payload.tensors.items()})

    def export(self, state: State, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The trained model."""
        with torch.no_grad():
            load(self._trained(model), state.trained or state.start)
        yield "global", model

    def _in_turn(self, blocks: int) -> list[str]:
        return [*map(str, range(blocks)), *self.config.extra_blocks]

    def _trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters of all blocks, and of a classification head, which trains with each."""
        parts = find_parts(cast(PreTrainedModel, model))
        always = [CLASSIFIER] if CLASSIFIER in parts.parameters else []
        return parts.named([*self._in_turn(parts.blocks), *always])

    def _blocks(self, model: PreTrainedModel) -> Iterator[dict[str, nn.Parameter]]:
        """The parameters of one block after another, without end."""
        parts = find_parts(model)
        always = [CLASSIFIER] if CLASSIFIER in parts.parameters else []
        order = turns(self._in_turn(parts.blocks), self.config.block_order, 1, self._seed)
        return (parts.named(chain(own, always)) for own in order)
