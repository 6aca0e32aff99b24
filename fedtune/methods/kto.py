"""KTO: answers that were judged good or bad, one at a time (`method.objective: {name: kto}`).

Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization" (2024), equations 7 and 8. With
r = log π(y) − log ρ(y), the reference ρ as of preference.py, and b answers in a batch

    z_0  = max(0, mean of r over prompts with another answer of the batch)    `mismatched`, no gradient
    loss = λ_D (1 − σ(β (r − z_0)))  of a good answer                             `kto`
           λ_U (1 − σ(β (z_0 − r)))  of a bad one

and a step's loss the mean over its answers. Prompt k gets the answer of prompt k − 1 of its batch, the first
that of the last, as TRL has it; together they are no longer than the batch's longest. A batch of one answer
has no other, and z_0 is 0. A pair of a chosen and a rejected answer is two answers, a good and a bad one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fedtune.core.types import ClientEnv
from fedtune.data.batches import collate, on_device
from fedtune.data.encoded import IGNORED, Encoded, split_judged
from fedtune.methods.objective import Objective
from fedtune.methods.preference import answer_likelihoods
from fedtune.methods.step_loss import StepBatches, TokenMean
from fedtune.models.adapter_off import adapter_off

GOOD = "good"  # of a batch, beside what the model gets: (answers), whether each was judged so


def drawn_judged(env: ClientEnv, group: Iterable[Sequence[int]]) -> StepBatches:
    """The batches of one of a client's steps: its answers, then as many mismatched ones."""
    batches, counts = [], []
    for part in group:
        judged = [each for i in part for each in split_judged(env.rows[i])]
        answers = [answer for answer, _ in judged]
        batch = collate([*answers, *mismatched(answers)], env.pad_id)
        batches.append(batch | {GOOD: torch.tensor([good for _, good in judged])})
        counts.append(len(judged))
    return StepBatches(batches, counts)


def mismatched(answers: Sequence[Encoded]) -> list[Encoded]:
    """Each prompt with the answer before its own, the first with the last; none of one answer alone."""
    if len(answers) < 2:
        return []
    most, found = max(len(answer.input_ids) for answer in answers), []
    for place, own in enumerate(answers):
        other = answers[place - 1]
        prompt, behind = own.labels.count(IGNORED), other.labels.count(IGNORED)
        said = other.input_ids[behind : behind + most - prompt]
        found.append(Encoded((*own.input_ids[:prompt], *said), (*own.labels[:prompt], *said)))
    return found


def add_judged_gradient(
    model: nn.Module, step: StepBatches, device: torch.device, objective: Objective
) -> TokenMean:
    """Adds the gradient of the step's loss to the parameters' `.grad`, one batch on the device at a time.

    Args:
        model: With an adapter that can be switched off.
        step: As `drawn_judged` gives it.
        device: The model's.
        objective: β, λ_D and λ_U.

    Returns:
        The mean loss over the answers, which stands for all their tokens.
    """
    found, everyone = TokenMean(), sum(step.tokens)
    for batch, count in zip(step.batches, step.tokens, strict=True):
        here = on_device(batch, device)
        good = here.pop(GOOD)
        own, others = (
            {name: t[rows] for name, t in here.items()} for rows in (slice(count), slice(count, None))
        )
        with torch.no_grad():
            kl = torch.zeros((), device=device)
            if len(others["labels"]):
                kl = answer_likelihoods(model, others).logs
            with adapter_off(model):
                reference = answer_likelihoods(model, own).logs
                if len(others["labels"]):
                    kl = (kl - answer_likelihoods(model, others).logs).mean().clamp(min=0)
        ratios = answer_likelihoods(model, own).logs - reference
        loss = kto(ratios, good, kl, objective)
        (loss * (count / everyone)).backward()
        found.add(float(loss.detach()), int((batch["labels"][:count, 1:] != IGNORED).sum()), batch)
    return found


def kto(ratios: Tensor, good: Tensor, kl: Tensor, objective: Objective) -> Tensor:
    """The mean KTO loss of answers.

    Args:
        ratios: log π − log ρ of each, (answers).
        good: Whether each was judged good, (answers).
        kl: z_0, at least 0, ().
        objective: β, λ_D and λ_U.
    """
    sign = torch.where(good, 1.0, -1.0)
    weight = torch.where(good, objective.desirable, objective.undesirable)
    return (weight * (1 - torch.sigmoid(objective.beta * sign * (ratios - kl)))).mean()
