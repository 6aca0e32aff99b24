"""Local training of the FedAvg family: epochs or steps of AdamW or SGD on one client's examples.

The optimiser and its schedule are rebuilt for each client and round, as in the one-shot paper's code:
AdamW with a learning rate that falls linearly to 0, no warm-up. T rounds therefore restart the rate T
times and one shot decays it once; `lr_schedule: constant` takes that difference away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtune.core.types import ClientEnv, ClientError
from fedtune.data.batches import endless_batches, epoch_batches
from fedtune.methods.settings import Training
from fedtune.methods.step_loss import TokenMean, add_gradient, drawn
from fedtune.models.memory_efficient import computed_again
from fedtune.models.offload import offloaded


@dataclass(frozen=True)
class Trained:
    """What a round of local training left behind.

    Attributes:
        weights: The trained parameters by name, float32.
        steps: Optimiser steps taken.
        rate_sum: Σ of the learning rates of those steps.
        loss: Mean loss over all trained tokens.
    """

    weights: dict[str, Tensor]
    steps: int
    rate_sum: float
    loss: TokenMean

    @property
    def metrics(self) -> dict[str, float]:
        """What a client reports: `train_loss`, `steps`, and tokens: trained, computed, of these padding."""
        return self.loss.metrics | {"steps": self.steps}


def train(
    env: ClientEnv,
    parameters: Mapping[str, nn.Parameter],
    settings: Training,
    *,
    proximal: float = 0.0,
    correction: Mapping[str, Tensor] | None = None,
    penalty: Callable[[], Tensor] | None = None,
) -> Trained:
    """Trains `parameters` of `env.model`, which hold the round's start, on the client's examples.

    A bfloat16 parameter is trained through a float32 master copy: at fine-tuning rates most of its
    updates are smaller than half a bfloat16 step and would be lost.

    Args:
        env: The client.
        parameters: What is trained, by name.
        settings: Epochs or steps, batch, optimiser, schedule.
        proximal: μ of FedProx: μ/2·‖w − w(t)‖² is added to the loss (its gradient, to be exact).
        correction: Added to each gradient, by name (SCAFFOLD's c − c_i).
        penalty: A term of each step's loss that depends on the parameters alone; not in `train_loss`.

    Raises:
        ClientError: The loss became NaN or infinite.
    """
    for parameter in parameters.values():
        parameter.grad = None  # a client that failed in mid-step before this one left its gradients behind
    masters = {name: float32_master(parameter) for name, parameter in parameters.items()}
    start = {name: master.detach().clone() for name, master in masters.items()} if proximal else {}
    optimizer = build_optimizer(masters, settings)
    total_steps = settings.steps(len(env.rows))
    loss, rate_sum = TokenMean(), 0.0
    env.model.train()
    with (
        computed_again(env.model, settings.gradient_checkpointing),
        offloaded(env.model, settings.offload_params),
    ):
        for step, group in enumerate(step_batches(env, settings)):
            if step == total_steps:
                break
            rate = settings.lr * (1 - step / total_steps if settings.lr_schedule == "linear" else 1.0)
            for group_settings in optimizer.param_groups:
                group_settings["lr"] = rate
            rate_sum += rate
            batches = drawn(env, group)
            with env.memory.step(
                batches.size, resident=[env.model, optimizer, masters, start, correction or {}]
            ):
                loss.join(add_gradient(env.model, batches, env.device))
                if not math.isfinite(loss.total):
                    raise ClientError(f"the loss became {loss.total} at step {step + 1}; lower method.lr")
                if penalty is not None:
                    penalty().backward()
                take_step(parameters, masters, optimizer, settings, proximal, start, correction or {})
    env.model.eval()
    return Trained({name: master.detach() for name, master in masters.items()}, total_steps, rate_sum, loss)


def step_batches(env: ClientEnv, settings: Training) -> Iterator[list[list[int]]]:
    """Example indices of the batches of each optimiser step; without end where steps are counted."""
    generator = env.generator("batches")
    size, together = settings.batch_size, settings.gradient_accumulation
    if settings.local_steps is not None:
        endless = endless_batches(len(env.rows), size, generator, env.lengths)
        while True:
            yield [next(endless) for _ in range(together)]
    assert settings.local_epochs is not None
    for _ in range(settings.local_epochs):
        batches = list(epoch_batches(len(env.rows), size, generator, env.lengths))
        yield from (batches[at : at + together] for at in range(0, len(batches), together))


def take_step(
    parameters: Mapping[str, nn.Parameter],
    masters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    settings: Training,
    proximal: float,
    start: Mapping[str, Tensor],
    correction: Mapping[str, Tensor],
) -> None:
    """One step of the optimiser from the gradients in `parameters`, which it takes away.

    Args:
        parameters: What is trained, with gradients.
        masters: Float32 copies that the optimiser moves, or the parameters themselves.
        optimizer: Over `masters`.
        settings: Clipping and the rest.
        proximal: μ of FedProx; its term pulls towards `start`.
        start: The round's weights.
        correction: What SCAFFOLD adds to each gradient.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            master = masters[name]
            if parameter.grad is None:  # a parameter this batch did not touch still feels the other two terms
                parameter.grad = torch.zeros_like(parameter)
            if master is not parameter:
                master.grad, parameter.grad = parameter.grad.to(torch.float32), None
            assert master.grad is not None
            if proximal:
                master.grad.add_(master - start[name], alpha=proximal)
            if name in correction:
                master.grad.add_(correction[name].to(master.device))
        if settings.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(list(masters.values()), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, parameter in parameters.items():
            if masters[name] is not parameter:
                parameter.copy_(masters[name])


def float32_master(parameter: nn.Parameter) -> Tensor:
    """What the optimiser changes: the parameter itself, or a float32 copy of one that is narrower."""
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().to(torch.float32).requires_grad_()


def build_optimizer(masters: Mapping[str, Tensor], settings: Training) -> torch.optim.Optimizer:
    """The optimiser of the settings, at their first rate."""
    parameters = list(masters.values())
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        weight_decay=settings.weight_decay,
        fused=True,  # one kernel a tensor on CPUs too: a small model's step is otherwise mostly Python
    )
