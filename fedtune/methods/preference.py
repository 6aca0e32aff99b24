"""Preference tuning: a chosen answer is to become likelier than a rejected one (`method.objective`).

With log π(y) the sum of an answer's log-probabilities behind its prompt, end token included:

    dpo     −log σ(β ((log π(y_c) − log ρ(y_c)) − (log π(y_r) − log ρ(y_r))))        `dpo`
    orpo    −mean log π(y_c) − λ log σ(log odds(y_c) − log odds(y_r))                 `orpo`
            log odds(y) = log P − log(1 − P),  log P = log π(y) / tokens of y

Rafailov et al., "Direct Preference Optimization" (2023), equation 7, where the reference ρ is the model with
its adapter switched off, so that there is no second model; Hong, Lee and Thorne, "ORPO: Monolithic Preference
Optimization without Reference Model" (2024), equations 4 to 7. A step's loss is the mean over its pairs;
the first term of ORPO is a mean over all tokens of the chosen answers of a batch, as TRL has it.

Deviation: the reference computes without dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtune.core.types import ClientEnv
from fedtune.data.batches import collate, on_device
from fedtune.data.encoded import IGNORED, split_pair
from fedtune.methods.objective import Objective
from fedtune.methods.step_loss import StepBatches, TokenMean
from fedtune.models.adapter_off import adapter_off
from fedtune.models.lean_loss import outputs, without_cache

Batch = Mapping[str, Tensor]


def drawn_pairs(env: ClientEnv, group: Iterable[Sequence[int]]) -> StepBatches:
    """The batches of one of a client's steps: all chosen answers, then all rejected ones."""
    batches = []
    for part in group:
        pairs = [split_pair(env.rows[i]) for i in part]
        batches.append(collate([pair[side] for side in (0, 1) for pair in pairs], env.pad_id))
    return StepBatches(batches, [len(batch["labels"]) // 2 for batch in batches])


def add_pair_gradient(
    model: nn.Module, step: StepBatches, device: torch.device, objective: Objective
) -> TokenMean:
    """Adds the gradient of the step's loss to the parameters' `.grad`, one batch on the device at a time.

    Args:
        model: With an adapter that can be switched off, for `dpo`.
        step: As `drawn_pairs` gives it.
        device: The model's.
        objective: Which loss.

    Returns:
        The mean loss over the pairs, which stands for all their tokens.
    """
    found, all_pairs = TokenMean(), sum(step.tokens)
    for batch, pairs in zip(step.batches, step.tokens, strict=True):
        here = on_device(batch, device)
        reference = None
        if objective.name == "dpo":
            with torch.no_grad(), adapter_off(model):
                reference = answer_likelihoods(model, here)
        policy = answer_likelihoods(model, here)
        loss = dpo(policy, reference, objective.beta) if reference else orpo(policy, objective.beta)
        (loss * (pairs / all_pairs)).backward()
        found.add(float(loss.detach()), int((batch["labels"][:, 1:] != IGNORED).sum()), batch)
    return found


@dataclass(frozen=True)
class Likelihoods:
    """Of chosen answers and, behind them, as many rejected ones.

    Attributes:
        logs: Sums of log-probabilities, float32 (answers).
        tokens: How many, (answers).
    """

    logs: Tensor
    tokens: Tensor


def answer_likelihoods(model: nn.Module, batch: Batch) -> Likelihoods:
    """Log-probabilities of the labelled tokens of a batch, (answers), as `drawn_pairs` makes it."""
    targets = batch["labels"][:, 1:]
    told = targets != IGNORED
    with without_cache(model):
        logits = outputs(model, {name: t for name, t in batch.items() if name != "labels"}).logits
    behind = logits[:, -targets.shape[1] - 1 : -1][told].to(torch.float32)  # (labelled tokens, vocabulary)
    each = -F.cross_entropy(behind, targets[told], reduction="none")
    rows = told.nonzero(as_tuple=True)[0]
    logs = torch.zeros(len(targets), device=each.device).index_add(0, rows, each)
    return Likelihoods(logs, told.sum(1))


def dpo(policy: Likelihoods, reference: Likelihoods, beta: float) -> Tensor:
    """The mean DPO loss of the pairs."""
    chosen, rejected = (policy.logs - reference.logs).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def orpo(policy: Likelihoods, weight: float) -> Tensor:
    """The mean ORPO loss of the pairs, with λ = `weight`."""
    sums, tokens = policy.logs.chunk(2)[0], policy.tokens.chunk(2)[0]
    means = policy.logs / policy.tokens
    odds = means - torch.log1p(-torch.exp(means))
    chosen, rejected = odds.chunk(2)
    return -sums.sum() / tokens.sum() - weight * F.logsigmoid(chosen - rejected).mean()
