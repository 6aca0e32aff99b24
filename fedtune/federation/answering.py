"""A run's result put to use: answers to prompts, in the template that it was tuned in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fedtune.config.schema import RunConfig
from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.evaluation.generation import evaluating
from fedtune.evaluation.types import EvalEnv
from fedtune.federation.scoring import eval_settings
from fedtune.models.load import Loaded

NEW_TOKENS = 64  # of an answer, where nothing says otherwise; as in evaluation


def answers(
    config: RunConfig,
    loaded: Loaded,
    prompts: Sequence[str | Mapping[str, str]],
    labels: Sequence[str] = (),
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Answers of a model, one a prompt.

    Args:
        config: Of the run that made the model.
        loaded: The model and its tokenizer.
        prompts: Instructions; or mappings with `instruction` and `input`.
        labels: A classifier's classes, in the order of its outputs.
        max_new_tokens: The most tokens of an answer; None: the configuration's, else NEW_TOKENS.
        temperature: 0: the likeliest token each time; else drawn.
        top_p: Of draws: the least set of likeliest tokens with this probability in sum.
        seed: Of draws.

    Raises:
        InputError: A prompt is empty, something else than text, or too long for the model.
    """
    if isinstance(prompts, str | Mapping):
        raise InputError("prompts is a list of texts, as in ['Add 2 and 3.']")
    some = labels[0] if labels else ""  # the class is asked for, but a classifier's example must have one
    examples = [replace(_example(prompt, place), output=some) for place, prompt in enumerate(prompts)]
    env = EvalEnv(loaded.model, loaded.tokenizer, examples, eval_settings(config, labels))
    with evaluating(loaded.model), torch.no_grad():
        if labels:
            return env.answers
        texts = env.generate(
            [env.prompt(example.instruction, example.input) for example in examples],
            max_new_tokens=max_new_tokens or env.max_new_tokens(NEW_TOKENS),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    return [text.strip() for (text,) in texts]


def _example(prompt: str | Mapping[str, str], place: int) -> Example:
    fields = {"instruction": prompt} if isinstance(prompt, str) else dict(prompt)
    unknown = set(fields) - {"instruction", "input"}
    if unknown or not fields.get("instruction") or not all(isinstance(v, str) for v in fields.values()):
        raise InputError(
            f"prompt {place} must be a text, or a dictionary with the texts instruction and input; "
            f"got {prompt!r}"
        )
    return Example(fields["instruction"], fields.get("input", ""))
