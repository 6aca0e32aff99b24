"""Examples to token ids, with the labels that say where loss is taken.

Prompt and answer are tokenised apart and joined, so that a prompt has the same tokens in training, where the
answer follows, and in generation, where it does not. Joined text can merge tokens across the seam.

What users write is text, whatever it looks like; see `fedtune.data.control`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedtune.data import templates
from fedtune.data.control import Marked, marked, marked_rows, pair_tokens, tokens
from fedtune.data.encoded import Counts, EncodedRows, EncodedSet
from fedtune.data.examples import Example
from fedtune.errors import InputError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOSS_ON = ("response", "all")
TOO_LONG = ("cut", "drop", "error")
_REMEDY = (
    "Raise data.max_length as far as the model sees, shorten the example, or set data.too_long to cut or drop"
)
AT_ONCE = 1024  # examples given to the tokenizer in one call, whose tokens are Python integers meanwhile
PROMPT_SHARE = 4  # a long answer leaves its prompt one token in so many


def encode_causal(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    loss_on: str,
    max_length: int,
    too_long: str = "cut",
) -> EncodedSet:
    """Encodes examples as: begin token (if the tokenizer has one), prompt, response, end token.

    What is too long loses the start of its prompt, down to a quarter of the length (PROMPT_SHARE): an answer
    to nothing teaches nothing. Then it loses the end of its response, and with it the end token, for the text
    does not end there. A response that is whole has its end token.

    Args:
        examples: What to encode.
        tokenizer: A Hugging Face tokenizer.
        template: One of `templates.TEMPLATES`.
        loss_on: "response" (response and end token) or "all" (the prompt too). The begin token never carries
            loss.
        max_length: The most tokens of an example.
        too_long: "cut", "drop" (such an example is left out) or "error", with what is longer.

    Raises:
        InputError: An unknown template, `loss_on` or `too_long`, a `max_length` under 2, a tokenizer without
            end token, a text that it cannot read as text, or with `too_long` "error" an example that is.
    """
    _one_of(loss_on, LOSS_ON, "data.loss_on")
    _one_of(too_long, TOO_LONG, "data.too_long")
    _check_length(max_length)
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise InputError(
            "the tokenizer has no end-of-sequence token, so a model could not learn where an answer ends; "
            "set eos_token in its tokenizer_config.json."
        )
    begin = _begin(tokenizer)
    into, kept, seen = EncodedRows(), list[Example](), Counter[str]()
    room = max_length - len(begin)
    for place, (example, whole_prompt, response) in enumerate(_spelled(examples, template, tokenizer)):
        over = len(whole_prompt) + len(response) + 1 > room
        if over and too_long == "error":
            raise InputError(
                f"example {place} ({example.instruction[:40]!r}) is too long: {len(whole_prompt)} "
                f"tokens of prompt and {len(response)} of answer, and {room - 1} fit beside the begin and "
                f"end tokens. {_REMEDY}"
            )
        if over and too_long == "drop":
            seen["dropped"] += 1
            continue
        answer = [*response, end]
        prompt, answer = _fitted(whole_prompt, answer, room) if over else (whole_prompt, answer)
        seen["cut"] += over
        seen["without_prompt"] += bool(whole_prompt) and not prompt
        seen["without_eos"] += len(answer) <= len(response)
        seen["empty"] += not example.output.strip()
        kept.append(example)
        ids = begin + prompt + answer
        silent = len(begin) + (0 if loss_on == "all" else len(prompt))
        # no token comes before the only one; and its label would look like a class
        into.add(ids, 1 if len(ids) == 1 else silent)
    counts = Counts(examples=len(kept), duplicates=duplicates(kept), **seen)
    return EncodedSet(into.all(classes=False), counts)


def _spelled(
    examples: Sequence[Example], template: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Example, list[int], list[int]]]:
    """Each example with the tokens of its prompt and of its answer, some of which are spelled at once."""
    for start in range(0, len(examples), AT_ONCE):
        part = examples[start : start + AT_ONCE]
        prompts, responses = texts(part, template, tokenizer)
        yield from zip(part, tokens(prompts, tokenizer), tokens(responses, tokenizer), strict=True)


def texts(
    examples: Sequence[Example], template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Marked], list[Marked]]:
    """Of each example the `prompt_text` and the `response_text`."""
    rows = [_fields(example) for example in examples]
    return (
        marked_rows(lambda row: templates.prompt(Example(*row), template), rows, tokenizer),
        marked_rows(lambda row: templates.response(Example(*row), template), rows, tokenizer),
    )


def _fitted(prompt: list[int], answer: list[int], room: int) -> tuple[list[int], list[int]]:
    """What of a prompt and of an answer with its end token is kept in `room` tokens."""
    share = min(len(prompt), max(1, room // PROMPT_SHARE), room - 1)  # of the prompt, however long the answer
    share = min(len(prompt), max(share, room - len(answer)))
    if share and room - share == len(answer) - 1:
        share -= 1  # the end token alone would be cut, and a whole answer ends
    return _tail(prompt, share), answer[: room - share]


def prompt_text(example: Example, template: str, tokenizer: PreTrainedTokenizerBase) -> Marked:
    """An example's text before the answer, in which the template's own control tokens are marked."""
    return marked(lambda texts: templates.prompt(Example(*texts), template), _fields(example), tokenizer)


def response_text(example: Example, template: str, tokenizer: PreTrainedTokenizerBase) -> Marked:
    """The answer's text as it follows the prompt, likewise."""
    return marked(lambda texts: templates.response(Example(*texts), template), _fields(example), tokenizer)


def _fields(example: Example) -> tuple[str, ...]:
    return example.instruction, example.input, example.output, example.category


def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> tuple[list[list[int]], int]:
    """Encodes prompts for generation: begin token (if any) and prompt, cut from the left to `max_length`.

    Args:
        prompts: Texts, as `prompt_text` makes them: of others all is data, and none of it a control token.
        tokenizer: A Hugging Face tokenizer.
        max_length: The most tokens of a prompt; None: no limit.

    Returns:
        Token ids, and how many prompts were cut.

    Raises:
        InputError: A `max_length` under 2, or a text that the tokenizer cannot read as text.
    """
    if max_length is not None:
        _check_length(max_length)
    begin, whole = _begin(tokenizer), tokens(prompts, tokenizer)
    kept = [ids if max_length is None else _tail(ids, max_length - len(begin)) for ids in whole]
    cut = sum(len(short) < len(long) for short, long in zip(kept, whole, strict=True))
    return [begin + ids for ids in kept], cut


def encode_classification(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    labels: Sequence[str],
    max_length: int,
    too_long: str = "cut",
) -> EncodedSet:
    """Encodes instruction, and input where there is one, as a text or a pair; the output is the class.

    The tokenizer adds its own special tokens, and cuts the longer text of a pair first.

    Args:
        examples: What to encode.
        tokenizer: A Hugging Face tokenizer.
        labels: The classes' names, in the order of the head's outputs.
        max_length: The most tokens of an example.
        too_long: As of `encode_causal`.

    Raises:
        InputError: An output that is not among `labels`, labels that repeat, a `max_length` too short for
            one token of text beside the special ones, or as `encode_causal`.
    """
    classes = {label: index for index, label in enumerate(labels)}
    if len(classes) != len(labels) or len(labels) < 2:
        raise InputError(f"labels of a classification must be two or more and differ, got {list(labels)}.")
    _one_of(too_long, TOO_LONG, "data.too_long")
    special = tokenizer.num_special_tokens_to_add(pair=any(example.input for example in examples))
    _check_length(max_length, least=special + 2)
    into, kept, seen = EncodedRows(), list[Example](), Counter[str]()
    for number, (example, ids) in enumerate(_paired(examples, tokenizer)):
        if example.output not in classes:
            raise InputError(
                f'example {number} has the label "{example.output}", which is not among the labels '
                f"{', '.join(labels)}.{nearest(example.output, labels)}"
            )
        over = len(ids) > max_length
        if over and too_long == "error":
            raise InputError(
                f"example {number} ({example.instruction[:40]!r}) is too long: {len(ids)} tokens, and "
                f"{max_length} fit. {_REMEDY}"
            )
        if over and too_long == "drop":
            seen["dropped"] += 1
            continue
        if over:
            (ids,) = pair_tokens([_row(example)], tokenizer, max_length=max_length)
        seen["cut"] += over
        kept.append(example)
        into.add(ids, classes[example.output])
    counts = Counts(examples=len(kept), duplicates=duplicates(kept), **seen)
    return EncodedSet(into.all(classes=True), counts)


def _paired(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Example, list[int]]]:
    for start in range(0, len(examples), AT_ONCE):
        part = examples[start : start + AT_ONCE]
        yield from zip(part, pair_tokens([_row(example) for example in part], tokenizer), strict=True)


def _row(example: Example) -> list[str]:
    return [example.instruction, example.input] if example.input else [example.instruction]


def duplicates(examples: Sequence[Example]) -> int:
    """How many are equal to an earlier one in instruction, input and output."""
    return len(examples) - len({(e.instruction, e.input, e.output) for e in examples})


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _tail(ids: list[int], count: int) -> list[int]:
    return ids[max(0, len(ids) - count) :]


def _one_of(value: str, allowed: Sequence[str], setting: str) -> None:
    if value not in allowed:
        raise InputError(
            f'{setting} must be one of {", ".join(allowed)}, got "{value}".{nearest(value, allowed)}'
        )


def _check_length(max_length: int, least: int = 2) -> None:
    if max_length < least:
        raise InputError(f"max_length must be at least {least}, got {max_length}.")
