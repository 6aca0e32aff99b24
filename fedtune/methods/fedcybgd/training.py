"""Local training of one block at a time, as FedCyBGD and BAdam do it.

Only the active block has gradients, a master and optimiser state, and all three end with it. Blocks
before it run without a graph, since nothing in them asks for gradients; what the step needs besides is kept
low by `models/memory_efficient.py`. The learning rate's schedule spans all steps,
whichever blocks they fall on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from fedtune.core.types import ClientEnv, ClientError
from fedtune.measure.memory import Resident
from fedtune.methods.fedcybgd.powersgd import GradientFilter
from fedtune.methods.fedcybgd.settings import PowerSGD
from fedtune.methods.local_training import Trained, step_batches
from fedtune.methods.settings import Training
from fedtune.methods.step_loss import TokenMean, add_gradient, drawn
from fedtune.methods.stepping import Stepper
from fedtune.models.compiled import compiled
from fedtune.models.memory_efficient import memory_efficient
from fedtune.models.offload import offloaded


def train_blocks(
    env: ClientEnv,
    blocks: Iterator[Mapping[str, nn.Parameter]],
    settings: Training,
    *,
    checkpointing: int | str,
    interval: int | None = None,
    powersgd: PowerSGD | None = None,
    resident: Sequence[Resident] = (),
) -> Trained:
    """Trains blocks of `env.model` in turn on the client's examples.

    Args:
        env: The client; no parameter of its model asks for gradients.
        blocks: The parameters of each block, by name.
        settings: Epochs or steps, batch, optimiser, schedule.
        checkpointing: As `gradient_checkpointing`: which activations are computed again.
        interval: Steps until the next block; None: the first takes them all.
        powersgd: Filters gradients before the optimiser sees them.
        resident: What the client holds in memory besides, for the account of it.

    Returns:
        `weights` holds the last block's alone; those of earlier ones are in the model.

    Raises:
        ClientError: The loss became NaN or infinite.
    """
    total = settings.steps(len(env.rows))
    loss, rate_sum = TokenMean(), 0.0
    active: ActiveBlock | None = None
    env.model.train()
    try:
        with (
            memory_efficient(env.model, checkpointing=checkpointing),
            compiled(env.model, settings.compile),
            ExitStack() as others,
        ):
            for step, group in enumerate(step_batches(env, settings)):
                if step == total:
                    break
                env.stepped(step, total)
                if active is None or (interval is not None and step % interval == 0):
                    if active is not None:
                        others.close()
                        active.end()
                    active = ActiveBlock.begin(
                        next(blocks),
                        settings,
                        powersgd,
                        env.generator("powersgd", step),
                        env.derive_seed("block", step),
                    )
                    others.enter_context(offloaded(env.model, settings.offload_params))
                rate = settings.rate(step, total, env.round)
                rate_sum += rate
                batches = drawn(env, group, step)
                held = [env.model, *active.resident(), *resident]
                with env.memory.step(batches.size, held, like=batches.form):
                    with active.stepper.arriving(rate):
                        loss.join(add_gradient(env.model, batches, env.device))
                    if not math.isfinite(loss.total):
                        raise ClientError(f"the loss became {loss.total} at step {step + 1}; lower method.lr")
                    active.step()
    finally:
        env.model.eval()
        if active is not None:
            active.end()
    assert active is not None  # a client has at least one example, hence one step
    return Trained(active.stepper.weights, total, rate_sum, loss)


@dataclass(frozen=True)
class ActiveBlock:
    """The block that is trained just now."""

    parameters: Mapping[str, nn.Parameter]
    stepper: Stepper
    filter: GradientFilter | None

    @staticmethod
    def begin(
        parameters: Mapping[str, nn.Parameter],
        settings: Training,
        powersgd: PowerSGD | None,
        generator: torch.Generator,
        seed: int = 0,
    ) -> ActiveBlock:
        """A block whose gradients are on, with its masters and a new optimiser.

        Args:
            parameters: The block's, by name.
            settings: As in `train_blocks`.
            powersgd: As in `train_blocks`.
            generator: Draws what PowerSGD begins with.
            seed: Where random rounding begins.
        """
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        filter = GradientFilter(powersgd, generator) if powersgd else None
        stepper = Stepper(parameters, settings, seed=seed, filter=filter.step if filter else None)
        return ActiveBlock(parameters, stepper, filter)

    def resident(self) -> list[Resident]:
        """What is in memory beside the model."""
        return [*self.stepper.resident(), dict(self.filter.memory) if self.filter else {}]

    def step(self) -> None:
        """One step of the optimiser with the gradients that are there, which it clears."""
        self.stepper.step()

    def end(self) -> None:
        """Turns the block's gradients off."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
