"""Examples to token ids, with the labels that say where loss is taken.

Prompt and answer are tokenised apart and joined, so that a prompt has the same tokens in training, where the
answer follows, and in generation, where it does not. Joined text can merge tokens across the seam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedtune.data import templates
from fedtune.data.examples import Example
from fedtune.errors import InputError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross-entropy leaves out
LOSS_ON = ("response", "all")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One encoded example.

    Attributes:
        input_ids: Token ids, without padding.
        labels: For a causal model one label a token, -100 where no loss is taken, not shifted (the model
            shifts them). For classification one class index.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def trained(self) -> int:
        """Labels that carry loss: a class, or a causal model's that are not -100, without the first."""
        labels = self.labels if len(self.labels) == 1 else self.labels[1:]
        return len(labels) - labels.count(IGNORED)


@dataclass(frozen=True, slots=True)
class EncodedSet:
    """Encoded examples in the order given, and how many of them were cut to the maximum length."""

    items: list[Encoded]
    truncated: int


def encode_causal(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    loss_on: str,
    max_length: int,
) -> EncodedSet:
    """Encodes examples as: begin token (if the tokenizer has one), prompt, response, end token.

    What is too long loses the start of its prompt; only where the response alone is too long does it lose its
    own end (and then the end token, for the text does not end there).

    Args:
        examples: What to encode.
        tokenizer: A Hugging Face tokenizer.
        template: One of `templates.TEMPLATES`.
        loss_on: "response" (response and end token) or "all" (the prompt too). The begin token never carries
            loss.
        max_length: The most tokens of an example.

    Raises:
        InputError: An unknown template or `loss_on`, a `max_length` under 2, or a tokenizer without end
            token.
    """
    if loss_on not in LOSS_ON:
        raise InputError(
            f'data.loss_on must be one of {", ".join(LOSS_ON)}, got "{loss_on}".{nearest(loss_on, LOSS_ON)}'
        )
    _check_length(max_length)
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise InputError(
            "the tokenizer has no end-of-sequence token, so a model could not learn where an answer ends; "
            "set eos_token in its tokenizer_config.json."
        )
    begin = _begin(tokenizer)
    prompts = _tokens([templates.prompt(example, template) for example in examples], tokenizer)
    responses = _tokens([templates.response(example, template) for example in examples], tokenizer)
    items, truncated = [], 0
    for whole_prompt, response in zip(prompts, responses, strict=True):
        answer = [*response, end][: max_length - len(begin)]
        prompt = _tail(whole_prompt, max_length - len(begin) - len(answer))
        truncated += len(prompt) + len(answer) < len(whole_prompt) + len(response) + 1
        prompt_labels = prompt if loss_on == "all" else [IGNORED] * len(prompt)
        labels = [IGNORED] * len(begin) + prompt_labels + answer
        if len(labels) == 1:  # no token comes before the only one; and its label would look like a class
            labels = [IGNORED]
        items.append(Encoded(tuple(begin + prompt + answer), tuple(labels)))
    return EncodedSet(items, truncated)


def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> tuple[list[list[int]], int]:
    """Encodes prompts for generation: begin token (if any) and prompt, cut from the left to `max_length`.

    Args:
        prompts: Texts, as `templates.prompt` makes them.
        tokenizer: A Hugging Face tokenizer.
        max_length: The most tokens of a prompt; None: no limit.

    Returns:
        Token ids, and how many prompts were cut.

    Raises:
        InputError: A `max_length` under 2.
    """
    if max_length is not None:
        _check_length(max_length)
    begin, whole = _begin(tokenizer), _tokens(list(prompts), tokenizer)
    kept = [ids if max_length is None else _tail(ids, max_length - len(begin)) for ids in whole]
    cut = sum(len(short) < len(long) for short, long in zip(kept, whole, strict=True))
    return [begin + ids for ids in kept], cut


def encode_classification(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, labels: Sequence[str], max_length: int
) -> EncodedSet:
    """Encodes instruction, and input where there is one, as a text or a pair; the output is the class.

    The tokenizer adds its own special tokens, and cuts the longer text of a pair first.

    Args:
        examples: What to encode.
        tokenizer: A Hugging Face tokenizer.
        labels: The classes' names, in the order of the head's outputs.
        max_length: The most tokens of an example.

    Raises:
        InputError: An output that is not among `labels`, labels that repeat, or a `max_length` too short for
            one token of text beside the special ones.
    """
    classes = {label: index for index, label in enumerate(labels)}
    if len(classes) != len(labels) or len(labels) < 2:
        raise InputError(f"labels of a classification must be two or more and differ, got {list(labels)}.")
    special = tokenizer.num_special_tokens_to_add(pair=any(example.input for example in examples))
    _check_length(max_length, least=special + 2)
    items, truncated = [], 0
    for number, (example, ids) in enumerate(zip(examples, _pair_tokens(examples, tokenizer), strict=True)):
        if example.output not in classes:
            raise InputError(
                f'example {number} has the label "{example.output}", which is not among the labels '
                f"{', '.join(labels)}.{nearest(example.output, labels)}"
            )
        if len(ids) > max_length:
            truncated += 1
            texts = [example.instruction, example.input] if example.input else [example.instruction]
            ids = tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]
        items.append(Encoded(tuple(ids), (classes[example.output],)))
    return EncodedSet(items, truncated)


def _pair_tokens(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Whole sequences with special tokens."""
    # one call for texts and one for pairs, since a tokenizer's batch is all of a kind
    ids: list[list[int]] = [[] for _ in examples]
    for paired in (False, True):
        places = [place for place, example in enumerate(examples) if bool(example.input) == paired]
        if not places:
            continue
        columns = [[examples[place].instruction for place in places]]
        if paired:
            columns.append([examples[place].input for place in places])
        for place, tokens in zip(places, tokenizer(*columns, verbose=False)["input_ids"], strict=True):
            ids[place] = tokens
    return ids


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: what is longer than the model's context is cut here, so a warning about it would mislead
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _tail(ids: list[int], count: int) -> list[int]:
    return ids[max(0, len(ids) - count) :]


def _check_length(max_length: int, least: int = 2) -> None:
    if max_length < least:
        raise InputError(f"max_length must be at least {least}, got {max_length}.")
