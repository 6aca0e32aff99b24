"""A client's round where something is its own: a part of the model, a second one, or the final one tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from fedtune.core.cohort import COMPUTED_TOKENS, PADDING_TOKENS
from fedtune.core.types import ClientEnv, ClientResult, Payload
from fedtune.measure.memory import Resident
from fedtune.methods.fedavg.ditto import own_model
from fedtune.methods.fedavg.fine_tuning import fine_tuned
from fedtune.methods.fedavg.own_parts import beside, chosen, copied, joined, kept, lent, moved
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.loading import load
from fedtune.methods.local_training import Trained
from fedtune.models.tuning import trainable


class Shared(Protocol):
    """The round that every client takes: the reply, and what was trained for it."""

    def __call__(self, env: ClientEnv, beside: Sequence[Resident]) -> tuple[ClientResult, Trained]:
        """Trains all that `env.model` trains, from the order; `beside` is in memory meanwhile."""


def step(
    env: ClientEnv, config: Config, received: Mapping[str, Tensor], shared: Shared, *, tunes: bool
) -> ClientResult:
    """What a client does for an order.

    Args:
        env: The client.
        config: The method's settings.
        received: The global weights by name, as they were sent, in full shape.
        shared: The round without anything of one's own.
        tunes: The rounds are over, and this one is for fine-tuning.
    """
    parameters = trainable(env.model)
    own, rest = kept(env.state), beside(env.state)
    with lent(parameters, chosen(parameters, config.own)) as begun:
        parts = (own or copied(begun)) if config.own else {}
        load(parameters, parts)
        if tunes:
            tuned, trained = fine_tuned(env, parameters, config, {**received, **parts})
            return ClientResult(Payload(), trained.metrics, joined(tuned, rest))
        model = own or (copied(received) if config.ditto is not None else {})
        result, trained = shared(replace(env, state=rest), [begun, model or parts])
        state = result.state or rest
        if config.ditto is None:
            return replace(result, state=joined(moved(parts, trained.weights, parameters), state))
        model, second = own_model(
            env, parameters, config, received=received, before=model, beside=[dict(result.payload.tensors)]
        )
    metrics = dict(result.metrics)
    for what in ("steps", COMPUTED_TOKENS, PADDING_TOKENS):  # of both; the loss is the global model's
        metrics[what] += second.metrics[what]
    return ClientResult(result.payload, metrics, joined(model, state))
