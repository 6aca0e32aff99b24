"""A client's loss on what it was sent, which is asked for before a round (`federation.selection`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from fedtune.core.types import ClientEnv, ClientError
from fedtune.data.batches import on_device
from fedtune.methods.fedavg import lora_aggregation as lora
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.loading import load
from fedtune.methods.step_loss import TokenMean, drawn
from fedtune.models.lean_loss import batch_loss
from fedtune.models.offload import offloaded
from fedtune.models.tuning import trainable


def refusal(config: Config) -> str | None:
    """Why clients have no such loss with these settings."""
    if config.own:
        return "with method.own what clients are sent is no whole model"
    if config.objective.of_pairs:
        return f"objective: {config.objective.name} is measured while it is trained"
    return None


def loss_of(
    env: ClientEnv,
    config: Config,
    weights: Mapping[str, Tensor],
    product: Mapping[str, Tensor],
    examples: int | None,
) -> float:
    """Mean loss over the trained tokens of a client's rows; dropout is off, and nothing is changed or kept.

    Args:
        env: The client.
        config: The method's settings.
        weights: As they were sent; LoRA factors that were not (aggregation: stack) count as 0.
        product: What is added to the base weights.
        examples: On how many rows, drawn anew in each round; None: all.

    Raises:
        ClientError: The loss is NaN or infinite.
    """
    parameters, rows = trainable(env.model), list(range(len(env.rows)))
    if examples is not None:
        rows = torch.randperm(len(rows), generator=env.generator("loss"))[:examples].tolist()
    lacking = {n: torch.zeros_like(p) for n, p in parameters.items() if n not in weights}
    load(parameters, {**lacking, **lora.pad(weights, parameters)})
    found, size = TokenMean(), config.batch_size
    env.model.eval()
    with (
        torch.no_grad(),
        lora.folded(env.model, product) if product else nullcontext(),
        offloaded(env.model, config.offload_params),
    ):
        for place, begin in enumerate(range(0, len(rows), size)):
            step = drawn(env, [rows[begin : begin + size]], place)
            for batch, tokens in zip(step.batches, step.tokens, strict=True):
                mean = batch_loss(env.model, on_device(batch, env.device), labels=batch["labels"])
                found.add(float(mean), tokens, batch)
    if found.value is None or not math.isfinite(found.value):
        raise ClientError(f"the loss of what it was sent is {found.value}")
    return found.value
