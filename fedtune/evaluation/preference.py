"""Preferences on held-out pairs: which of two answers a model has come to find likelier.

    reward(y) = log π(y) − log ρ(y)        ρ: the model with its adapter switched off

The reward accuracy is the share of pairs whose chosen answer has the higher reward, and the margin the mean
of reward(y_c) − reward(y_r), in nats: β times that is what TRL logs as `rewards/margins`. An untrained model
has rewards of 0, and so an accuracy of 0. `preferred` needs no reference: the share of pairs whose chosen
answer is likelier than the rejected one.
"""

from __future__ import annotations

from fedtune.data.encode import encode_pairs
from fedtune.data.encoded import split_pair
from fedtune.errors import InputError
from fedtune.evaluation.types import EvalEnv, Outcome, Scored, Task
from fedtune.models.adapter_off import adapter_off


def _preference(env: EvalEnv) -> Outcome:
    if any(not example.rejected for example in env.examples):
        raise InputError(
            "task preference needs held-out pairs of a chosen and a rejected answer, which are read with "
            "method.objective dpo, orpo or kto"
        )
    found = encode_pairs(
        env.examples, env.tokenizer, template=env.settings.template, max_length=env.max_length
    )
    pairs = [split_pair(item) for item in found.items]
    answers = [pair[side] for side in (0, 1) for pair in pairs]
    likelihoods = [-loss for loss in env.losses(answers)[0]]
    with adapter_off(env.model):
        before = [-loss for loss in env.losses(answers)[0]]
    rewards = [now - then for now, then in zip(likelihoods, before, strict=True)]
    count = len(pairs)
    margins = [rewards[at] - rewards[at + count] for at in range(count)]
    return Outcome(
        {
            "reward_accuracy": Scored([margin > 0 for margin in margins]),
            "reward_margin": Scored(margins),
            "preferred": Scored([likelihoods[at] > likelihoods[at + count] for at in range(count)]),
        }
    )


TASKS = {"preference": Task(_preference, "reward_accuracy", examples=True)}
