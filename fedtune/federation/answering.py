"""A run's result put to use: answers to prompts, in the template that it was tuned in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedtune.config.schema import RunConfig
from fedtune.data.encode import encode_prompts
from fedtune.data.examples import Example
from fedtune.data.marked import Marked
from fedtune.data.turns import is_turns, turns_of
from fedtune.errors import InputError
from fedtune.evaluation.generation import evaluating, prompt_room
from fedtune.evaluation.types import EvalEnv
from fedtune.federation.evaluator import eval_settings
from fedtune.models.load import Loaded

NEW_TOKENS = 64  # of an answer, where nothing says otherwise; as in evaluation


def answers(
    config: RunConfig,
    loaded: Loaded,
    prompts: Sequence[str | Mapping[str, Any]],
    labels: Sequence[str] = (),
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    texts: bool = False,
) -> list[str]:
    """Answers of a model, one a prompt.

    Args:
        config: Of the run that made the model.
        loaded: The model and its tokenizer.
        prompts: Instructions; or mappings with `instruction` and `input`, or with `messages`, the turns of a
            conversation.
        labels: A classifier's classes, in the order of its outputs.
        max_new_tokens: The most tokens of an answer; None: the configuration's, else NEW_TOKENS.
        temperature: 0: the likeliest token each time; else drawn.
        top_p: Of draws: the least set of likeliest tokens with this probability in sum.
        seed: Of draws.
        texts: The model was tuned on plain texts: a prompt that is a text is one that it continues.

    Raises:
        InputError: A prompt is empty, something else than text, or too long for the model; or another
            argument is out of range.
    """
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        raise InputError("prompts is a list of texts, as in ['Add 2 and 3.']")
    check_draws(max_new_tokens, temperature, top_p, seed)
    some = labels[0] if labels else ""  # the class is asked for, but a classifier's example must have one
    examples = [replace(example_asked(prompt, place), output=some) for place, prompt in enumerate(prompts)]
    env = EvalEnv(loaded.model, loaded.tokenizer, examples, eval_settings(config, labels))
    with evaluating(loaded.model), torch.no_grad():
        if labels:
            return env.answers
        most = env.max_new_tokens(NEW_TOKENS) if max_new_tokens is None else max_new_tokens
        asked = [
            Marked(example.instruction)
            if texts and isinstance(prompt, str)
            else env.conversation(example.turns)
            if example.turns
            else env.prompt(example.instruction, example.input)
            for prompt, example in zip(prompts, examples, strict=True)
        ]
        check_lengths(asked, loaded, most)
        found = env.generate(
            asked,
            max_new_tokens=most,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    return [text if texts else text.strip() for (text,) in found]


def check_draws(max_new_tokens: int | None, temperature: float, top_p: float, seed: int) -> None:
    """Raises InputError for an option of an answer that is out of range."""
    whole = (int, type(None))
    if not isinstance(max_new_tokens, whole) or (max_new_tokens is not None and max_new_tokens < 1):
        raise InputError(f"max_new_tokens must be a whole number from 1 up, got {max_new_tokens!r}")
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be a whole number from 0 up, got {seed!r}")
    if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise InputError(f"temperature must be a number from 0 up, got {temperature!r}")
    if not isinstance(top_p, int | float) or not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, got {top_p!r}")


def check_lengths(prompts: Sequence[str], loaded: Loaded, max_new_tokens: int) -> None:
    """Scoring cuts a prompt that is too long, and counts it; here someone waits for the answer to it."""
    room = prompt_room(loaded.model, max_new_tokens)
    for place, prompt in enumerate(prompts):
        if encode_prompts([prompt], loaded.tokenizer, max_length=room)[1]:
            raise InputError(
                f"prompt {place} is too long: beside an answer of up to {max_new_tokens} tokens the model "
                f"sees {room} of a prompt, template included"
            )


def example_asked(prompt: str | Mapping[str, Any], place: int) -> Example:
    """A prompt as an example without its answer. Raises InputError if it is none."""
    if isinstance(prompt, Mapping) and prompt.keys() == {"messages"} and is_turns(prompt["messages"]):
        turns = tuple(turns_of(prompt["messages"], f"prompt {place}", "messages"))
        return Example(next((turn.content for turn in reversed(turns)), ""), turns=turns)
    fields = {"instruction": prompt} if isinstance(prompt, str) else dict(prompt)
    unknown = set(fields) - {"instruction", "input"}
    texts = [value for value in fields.values() if isinstance(value, str)]
    if unknown or len(texts) < len(fields) or not fields.get("instruction", "").strip():
        raise InputError(
            f"prompt {place} must be a text, or a dictionary with the texts instruction and input, or with "
            f"the turns of a conversation as messages; got {prompt!r}"
        )
    return Example(fields["instruction"], fields.get("input", ""))
