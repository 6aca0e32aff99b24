"""One prompt completed for who is told the answer piece by piece, with counts of tokens: what a server gives.

The same answer as of `answering.answers`: the same template, the same draws, the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fedtune.config.schema import RunConfig
from fedtune.data.encode import encode_prompts
from fedtune.data.marked import Marked
from fedtune.errors import ProgramError
from fedtune.evaluation.generation import Sampling, answer_text, evaluating, generate_ids
from fedtune.evaluation.types import EvalEnv
from fedtune.federation.answering import check_draws, check_lengths, example_asked
from fedtune.federation.evaluator import eval_settings
from fedtune.models.context import context_length
from fedtune.models.load import Loaded

Told = Callable[[str], None]
UNFINISHED = "\ufffd"  # how a character reads of which not all bytes are there yet


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        text: What was said.
        prompt_tokens: Of the prompt in its template, begin token included.
        completion_tokens: Of the answer, without the token that ends it.
        ended: By itself or at a stopping text; else at the limit of tokens.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    ended: bool


def complete(
    config: RunConfig,
    loaded: Loaded,
    prompt: str | Mapping[str, Any],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    told: Told | None = None,
) -> Completion:
    """Completes a text as it is, or answers a conversation in the template that the model was tuned in.

    Args:
        config: Of the run that made the model.
        loaded: A causal language model and its tokenizer.
        prompt: A text, none of which is a control token; or a mapping with `messages`, the turns of a
            conversation, whose answer has no blanks around it.
        max_new_tokens: The most tokens of the answer, the one that ends it included.
        temperature: 0: the likeliest token each time; else drawn.
        top_p: Of draws: the least set of likeliest tokens with this probability in sum.
        seed: Of draws.
        stop: The answer ends before the first of these texts.
        told: Called with each piece of the answer as it comes; joined they are the answer. Called with an
            empty piece where a token brings no text yet. What it raises ends the work.

    Raises:
        InputError: The prompt is empty or too long for the model, or another argument is out of range.
    """
    check_draws(max_new_tokens, temperature, top_p, seed)
    chat = not isinstance(prompt, str)
    example = example_asked(prompt, 0)
    env = EvalEnv(loaded.model, loaded.tokenizer, [example], eval_settings(config, ()))
    with evaluating(loaded.model), torch.no_grad():
        asked = env.conversation(example.turns) if chat else Marked(example.instruction)
        check_lengths([asked], loaded, max_new_tokens)
        encoded, _ = encode_prompts([asked], loaded.tokenizer, max_length=None)
        pieces = _Pieces(loaded.tokenizer, stop, strip=chat, told=told)
        (ids,) = generate_ids(
            loaded.model,
            loaded.tokenizer,
            encoded,
            max_new_tokens=max_new_tokens,
            batch_size=1,
            stop=stop,
            sampling=Sampling(temperature, top_p, [env.draw_seed(seed, 0, 0)]) if temperature else None,
            end=env.end,
            follow=pieces.follow if told else None,
        )
    text = answer_text(loaded.tokenizer, ids, stop)
    cut = len(text) < len(answer_text(loaded.tokenizer, ids))
    whole = text.strip() if chat else text
    pieces.end(whole)
    return Completion(whole, len(encoded[0]), len(ids), cut or len(ids) < max_new_tokens)


def completer(config: RunConfig, loaded: Loaded) -> Callable[..., Completion]:
    """`complete` with a run's configuration and its model filled in."""
    return partial(complete, config, loaded)


def most_tokens(loaded: Loaded, wanted: int) -> int:
    """The most tokens of an answer, where the model has to see a prompt of two beside it."""
    context = context_length(loaded.model)
    return wanted if context is None else min(wanted, context - 2)


class _Pieces:
    """Tells an answer's text as far as no later token can change it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], *, strip: bool, told: Told | None
    ) -> None:
        self._tokenizer, self._stop, self._strip, self._told = tokenizer, stop, strip, told
        self._said = ""

    def follow(self, place: int, ids: list[int]) -> None:
        """Tells what the answer's newest token brought."""
        text = answer_text(self._tokenizer, ids, self._stop).rstrip(UNFINISHED)
        text = text[: len(text) - self._begun(text)]
        self._tell(text.strip() if self._strip else text)

    def end(self, whole: str) -> None:
        """Tells the rest.

        Raises:
            ProgramError: What was told is not how the answer begins.
        """
        if not whole.startswith(self._said):
            raise ProgramError("the tokenizer reads an answer otherwise than its beginning; do not stream it")
        if whole != self._said:
            self._tell(whole)

    def _tell(self, text: str) -> None:
        """A shorter text is told later: a token can turn blanks around it, or an accent, into another."""
        if self._told is not None:
            new = text[len(self._said) :] if text.startswith(self._said) else ""
            self._said += new
            self._told(new)

    def _begun(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stopping text."""
        return max(
            (length for stop in self._stop for length in range(1, len(stop)) if text.endswith(stop[:length])),
            default=0,
        )
