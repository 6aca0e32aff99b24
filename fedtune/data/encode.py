"""Examples to token ids, with the labels that say where loss is taken.

Prompt and answer are tokenised apart and joined, so that a prompt has the same tokens in training, where the
answer follows, and in generation, where it does not. Joined text can merge tokens across the seam.

What users write is text, whatever it looks like; see `fedtune.data.control`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.data.control import pair_tokens, tokens
from fedtune.data.encoded import IGNORED, Counts, Encoded, EncodedRows, EncodedSet
from fedtune.data.examples import ASSISTANT, BAD, Example, Turn
from fedtune.data.marked import Marked
from fedtune.data.prompts import Prompts, last_answer, prompts
from fedtune.data.spelled import (
    Spelled,
    begin_of,
    begun,
    behind_last,
    pieces_of,
    prompt_within,
    spell,
    tail,
    without_first,
)
from fedtune.errors import InputError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOSS_ON = ("response", "last", "all")
TOO_LONG = ("cut", "drop", "error")
_REMEDY = (
    "Raise data.max_length as far as the model sees, shorten the example, or set data.too_long to cut or drop"
)
AT_ONCE = 1024  # examples given to the tokenizer in one call, whose tokens are Python integers meanwhile


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

    What is too long loses the start of its prompt, down to a quarter of the length (PROMPT_SHARE in
    `spelled.py`): an answer to nothing teaches nothing. Then it loses the end of its response, and with it
    the end token, for the text does not end there. A response that is whole has its end token.

    A conversation loses its first exchanges instead, the system's turn apart, until it fits; only where a
    single one is too long, it is cut as above. What comes behind its last answer is left out. With a chat
    template begin and end tokens are those that the template writes.

    A plain text stands between begin and end token, and is trained on whole: one that is longer becomes
    several examples, each of which begins with the last token of the one before.

    Args:
        examples: What to encode.
        tokenizer: A Hugging Face tokenizer.
        template: As `data.template`; see `prompts.template_setting`.
        loss_on: "response" (each answer with its end token), "last" (of a conversation the last one alone)
            or "all" (prompts too). The first token never carries loss.
        max_length: The most tokens of an example.
        too_long: "cut", "drop" (such an example is left out) or "error", with what is longer.

    Raises:
        InputError: An unknown template, `loss_on` or `too_long`, a `max_length` under 2, a tokenizer without
            end token, a text that it cannot read as text, a conversation that the template has no form for,
            or with `too_long` "error" an example that is.
    """
    return _encode(examples, tokenizer, template, loss_on, max_length, too_long, lambda became: None)


def _encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    loss_on: str,
    max_length: int,
    too_long: str,
    tell: Callable[[Counter[str]], None],
) -> EncodedSet:
    """As `encode_causal`; tells of each example that is kept what became of it."""
    _one_of(loss_on, LOSS_ON, "data.loss_on")
    _one_of(too_long, TOO_LONG, "data.too_long")
    _check_length(max_length)
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise InputError(
            "the tokenizer has no end-of-sequence token, so a model could not learn where an answer ends; "
            "set eos_token in its tokenizer_config.json."
        )
    how = prompts(template, tokenizer)
    into, kept, seen, parts = EncodedRows(), list[Example](), Counter[str](), list[int]()
    for place, (example, spelled) in enumerate(_spelled(examples, how, tokenizer, max_length)):
        form, over = example.form, spelled.dropped > 0 or spelled.length > max_length
        if form == "text":
            cuts = spelled.parts(max_length)
            for ids in cuts:
                into.add(ids, 1)
            parts.append(len(cuts))
            seen["parted"] += len(cuts) > 1
            kept.append(example)
            continue
        if over and too_long == "error":
            raise InputError(
                f"example {place} ({example.instruction[:40]!r}) is too long: {spelled.said(max_length)}. "
                f"{_REMEDY}"
            )
        if over and too_long == "drop":
            seen["dropped"] += 1
            continue
        turns = 0
        if over and form == "conversation":
            spelled = without_first(example, spelled, how, tokenizer, max_length)
            turns = spelled.dropped
        cut = spelled.labelled(loss_on, max_length)
        here = Counter(
            cut=over,
            without_prompt=cut.without_prompt,
            without_eos=cut.without_end,
            empty=not example.output.strip(),
            turns=turns,
            unanswered=behind_last(example.turns),
        )
        seen.update(here)
        tell(here)
        kept.append(example)
        into.add(cut.ids, cut.head)
    made = into.all(classes=False)
    counts = Counts(examples=len(made), duplicates=duplicates(kept), **seen)
    return EncodedSet(made, counts, tuple(parts))


def encode_pairs(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_length: int,
    too_long: str = "cut",
) -> EncodedSet:
    """Encodes each example with its chosen answer, and behind that with its rejected one; see `split_pair`.

    Loss is on the last answer alone, and each of the two is cut as `encode_causal` does it. An answer that
    was judged alone is there alone, and behind a bad one a token without loss; see `split_judged`.

    Args:
        examples: Conversations that have a rejected answer beside the last one, or a judgement of that.
        tokenizer: A Hugging Face tokenizer.
        template: As `data.template`.
        max_length: The most tokens of each answer with its prompt.
        too_long: "cut" or "error".

    Raises:
        InputError: As `encode_causal`.
    """
    assert too_long != "drop", "one answer of a pair could be left alone"
    became: tuple[list[Counter[str]], list[Counter[str]]] = ([], [])
    chosen, rejected = (
        _encode(each, tokenizer, template, "last", max_length, too_long, told.append)
        for each, told in zip((examples, [_rejected(e) for e in examples if e.rejected]), became, strict=True)
    )
    into, seen, others = EncodedRows(), Counter[str](), iter(zip(rejected.items, became[1], strict=True))
    for example, one, here in zip(examples, chosen.items, became[0], strict=True):
        first, behind = _answered(one), list[int]()
        if example.rejected:
            other, its = next(others)
            behind, here = _masked(_answered(other)), here | its  # of a pair what became of either answer
        elif example.judged == BAD:
            behind = [-1 - first.input_ids[-1]]
        into.add([*first.input_ids, *behind], first.labels.count(IGNORED))
        seen.update(here)
    counts = Counts(examples=len(examples), duplicates=duplicates(examples), **seen)
    return EncodedSet(into.all(classes=False), counts)


def _rejected(example: Example) -> Example:
    """The same conversation with the rejected answer in the place of the last one."""
    before = example.turns[: last_answer(example.turns)]
    return replace(example, output=example.rejected, turns=(*before, Turn(ASSISTANT, example.rejected)))


def _answered(item: Encoded) -> Encoded:
    """An example to the last token that carries loss."""
    end = max(at for at, label in enumerate(item.labels) if label != IGNORED) + 1
    return Encoded(item.input_ids[:end], item.labels[:end])


def _masked(item: Encoded) -> list[int]:
    """Tokens as an `EncodedList` has them behind others."""
    pairs = zip(item.input_ids, item.labels, strict=True)
    return [-1 - token if label == IGNORED else token for token, label in pairs]


def _spelled(
    examples: Sequence[Example], how: Prompts, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[Example, Spelled]]:
    """Each example with its tokens, some of which are spelled at once."""
    for start in range(0, len(examples), AT_ONCE):
        part = examples[start : start + AT_ONCE]
        yield from zip(part, spell(part, how, tokenizer, max_length), strict=True)


def texts(
    examples: Sequence[Example], template: str, tokenizer: PreTrainedTokenizerBase
) -> list[Sequence[Marked]]:
    """Of each example all that becomes tokens, in pieces."""
    how = prompts(template, tokenizer)
    return [pieces_of(example, how).texts for example in examples]


def prompt_text(example: Example, template: str, tokenizer: PreTrainedTokenizerBase) -> Marked:
    """An example's text before the answer, in which the template's own control tokens are marked."""
    return prompts(template, tokenizer).prompt(example)


def response_text(example: Example, template: str, tokenizer: PreTrainedTokenizerBase) -> Marked:
    """The answer's text as it follows the prompt, likewise."""
    return prompts(template, tokenizer).response(example)


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
    found = _cut_prompts(prompts, tokenizer, max_length)
    return [ids for ids, _ in found], sum(cut for _, cut in found)


def _cut_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[tuple[list[int], bool]]:
    """Token ids of each prompt, and whether it was cut."""
    begin, found = begin_of(tokenizer), list[tuple[list[int], bool]]()
    for prompt, ids in zip(prompts, tokens(prompts, tokenizer), strict=True):
        own, rest = begun(ids, begin, whole=getattr(prompt, "whole", False))
        short = rest if max_length is None else tail(rest, max_length - len(own))
        found.append((own + short, len(short) < len(rest)))
    return found


def encode_asked(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, template: str, max_length: int
) -> tuple[list[list[int]], int]:
    """Encodes what stands before examples' answers, as `encode_causal` puts it.

    A conversation loses its first exchanges until it fits; what is still too long is cut from the left.

    Args:
        examples: What is to be answered; of a conversation its last answer.
        tokenizer: A Hugging Face tokenizer.
        template: As `data.template`.
        max_length: The most tokens of a prompt.

    Returns:
        Token ids, and of how many something was cut or left out.

    Raises:
        InputError: As `encode_prompts`.
    """
    _check_length(max_length)
    how = prompts(template, tokenizer)
    room = max_length - len(begin_of(tokenizer)) if how.apart else max_length
    asked = [prompt_within(example, how, tokenizer, room) for example in examples]
    found = _cut_prompts([text for text, _ in asked], tokenizer, max_length)
    cut = sum(left_out > 0 or short for (_, left_out), (_, short) in zip(asked, found, strict=True))
    return [ids for ids, _ in found], cut


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
    """How many are equal to an earlier one in instruction, input and answers, or in all turns and tools."""
    return len(examples) - len(
        {(e.instruction, e.input, e.output, e.rejected, e.judged, e.turns, e.tools) for e in examples}
    )


def _one_of(value: str, allowed: Sequence[str], setting: str) -> None:
    if value not in allowed:
        raise InputError(
            f'{setting} must be one of {", ".join(allowed)}, got "{value}".{nearest(value, allowed)}'
        )


def _check_length(max_length: int, least: int = 2) -> None:
    if max_length < least:
        raise InputError(f"max_length must be at least {least}, got {max_length}.")
