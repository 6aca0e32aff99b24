"""Local training of the FedAvg family: epochs or steps of AdamW or SGD on one client's examples.

The optimiser and its schedule are rebuilt for each client and round, as in the one-shot paper's code:
AdamW with a learning rate that falls linearly to 0, no warm-up. T rounds therefore restart the rate T
times and one shot decays it once; `lr_over: run` or `lr_schedule: constant` takes that difference away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtune.core.types import ClientEnv, ClientError, Payload
from fedtune.data.batches import endless_batches, epoch_batches
from fedtune.errors import InputError
from fedtune.measure.memory import Resident
from fedtune.methods.kto import add_judged_gradient, drawn_judged
from fedtune.methods.objective import Objective
from fedtune.methods.preference import add_pair_gradient, drawn_pairs
from fedtune.methods.settings import Training
from fedtune.methods.step_loss import TokenMean, add_gradient, drawn
from fedtune.methods.stepping import Stepper
from fedtune.models.compiled import compiled
from fedtune.models.memory_efficient import computed_again
from fedtune.models.offload import offloaded


@dataclass(frozen=True)
class Trained:
    """What a round of local training left behind.

    Attributes:
        weights: The trained parameters by name, float32; those without masters are made when asked for.
        steps: Optimiser steps taken.
        rate_sum: Σ of the learning rates of those steps.
        loss: Mean loss over all trained tokens.
        kept: What the optimiser goes on with in the client's next round, where that is asked for.
    """

    weights: Mapping[str, Tensor]
    steps: int
    rate_sum: float
    loss: TokenMean
    kept: Payload | None = None

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
    towards: Mapping[str, Tensor] | None = None,
    correction: Mapping[str, Tensor] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    keeps: bool = False,
    beside: Sequence[Resident] = (),
) -> Trained:
    """Trains `parameters` of `env.model`, which hold the round's start, on the client's examples.

    A bfloat16 parameter is trained through a float32 master copy, or as `settings.masters` says: at
    fine-tuning rates most of its updates are smaller than half a bfloat16 step and would be lost
    (stepping.py).

    Args:
        env: The client.
        parameters: What is trained, by name.
        settings: Epochs or steps, batch, optimiser, schedule.
        proximal: μ of FedProx: μ/2·‖w − w(t)‖² is added to the loss (its gradient, to be exact).
        towards: w(t), if it is not what training starts from.
        correction: Added to each gradient, by name (SCAFFOLD's c − c_i).
        penalty: A term of each step's loss that depends on the parameters alone; not in `train_loss`.
        keeps: The optimiser begins with what it ended the client's last round with (`env.state`).
        beside: What is in memory beside the model and the optimiser.

    Raises:
        ClientError: The loss became NaN or infinite.
        InputError: A penalty, whose gradient comes behind that of the loss, and `optimizer_in_backward`.
    """
    if penalty is not None and settings.optimizer_in_backward:
        raise InputError(
            "method.optimizer_in_backward takes a step from the gradient of the loss alone, and this method "
            "adds a penalty to it; set it to false"
        )
    for parameter in parameters.values():
        parameter.grad = None  # a client that failed in mid-step before this one left its gradients behind
    pull: Mapping[str, Tensor] = parameters if towards is None else towards
    stepper = Stepper(
        parameters,
        settings,
        seed=env.seed,
        proximal=proximal,
        start={n: _float32_copy(pull[n], p) for n, p in parameters.items()} if proximal else {},
        correction=correction,
    )
    if keeps and env.state is not None:
        stepper.go_on(env.state)
    objective = getattr(settings, "objective", Objective())
    judged = objective.name == "kto"
    total_steps = settings.steps(len(env.rows))
    loss, rate_sum = TokenMean(), 0.0
    env.model.train()
    with (
        computed_again(env.model, settings.gradient_checkpointing),
        offloaded(env.model, settings.offload_params),
        compiled(env.model, settings.compile),
    ):
        for step, group in enumerate(step_batches(env, settings)):
            if step == total_steps:
                break
            env.stepped(step, total_steps)
            rate = settings.rate(step, total_steps, env.round)
            rate_sum += rate
            if objective.of_pairs:
                batches = (drawn_judged if judged else drawn_pairs)(env, group)
            else:
                batches = drawn(env, group, step)
            held = [env.model, *stepper.resident(), *beside]
            like = None if objective.of_pairs else batches.form
            with env.memory.step(batches.size, held, like=like):
                with stepper.arriving(rate):
                    if objective.of_pairs:
                        add = add_judged_gradient if judged else add_pair_gradient
                        loss.join(add(env.model, batches, env.device, objective))
                    else:
                        loss.join(add_gradient(env.model, batches, env.device))
                if not math.isfinite(loss.total):
                    raise ClientError(f"the loss became {loss.total} at step {step + 1}; lower method.lr")
                if penalty is not None:
                    penalty().backward()
                stepper.step()
    env.model.eval()
    kept = stepper.kept() if keeps else None
    return Trained(stepper.weights, total_steps, rate_sum, loss, kept)


def _float32_copy(value: Tensor, like: Tensor) -> Tensor:
    return value.detach().to(like.device, torch.float32, copy=True)


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
