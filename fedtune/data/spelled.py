"""One example's tokens, and what of them is kept where they are too many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedtune.data.chat import MOST
from fedtune.data.control import piece_tokens, tokens
from fedtune.data.examples import SYSTEM, USER, Example, Turn
from fedtune.data.marked import Marked
from fedtune.data.prompts import Pieces, Prompts, last_answer
from fedtune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_SHARE = 4  # a long answer leaves its prompt one token in so many


@dataclass(frozen=True)
class Labelled:
    """Tokens as `EncodedList` has them.

    Attributes:
        ids: Those behind `head` that carry no loss stand as -1 - their id.
        head: How many at the start carry no loss.
        without_prompt: Whether the whole prompt was cut off.
        without_end: Whether the end of the answer was, with the end token.
    """

    ids: list[int]
    head: int
    without_prompt: bool
    without_end: bool


@dataclass(frozen=True)
class Spelled:
    """An example's tokens.

    Attributes:
        begin: The begin token, if there is one.
        pieces: Of what is read and what is answered, in turn, as `Pieces` has them; an answer with its end.
        silent: Of the answers, those that are not learned.
        dropped: How many turns at the start are not among them.
    """

    begin: list[int]
    pieces: list[list[int]]
    silent: frozenset[int] = frozenset()
    dropped: int = 0

    @property
    def length(self) -> int:
        """Of all of it."""
        return len(self.begin) + sum(map(len, self.pieces))

    def said(self, max_length: int) -> str:
        """How long it is, and what fits, for people."""
        room = max_length - len(self.begin) - 1
        if len(self.pieces) == 2:
            prompt, answer = map(len, self.pieces)
            return (
                f"{prompt} tokens of prompt and {answer - 1} of answer, and {room} fit beside the begin and "
                "end tokens"
            )
        more = "more than " if self.dropped else ""
        return f"{more}{self.length} tokens, and {max_length} fit"

    def parts(self, most: int) -> list[list[int]]:
        """A plain text in parts, each of which begins with the last token of the one before."""
        ids = self.begin + [token for piece in self.pieces for token in piece]
        return [ids[start : start + most] for start in range(0, max(1, len(ids) - 1), most - 1)]

    def labelled(self, loss_on: str, most: int) -> Labelled:
        """What of it is kept in `most` tokens, and what of that carries loss.

        Args:
            loss_on: As of `encode_causal`.
            most: Tokens.
        """
        prompt, *rest = self.pieces
        learned = loss_on == "all"
        answer = list[int]()
        for number, piece in enumerate(rest):
            turn, asked = divmod(number, 2)
            loss = learned or not (
                asked or turn in self.silent or (loss_on == "last" and number + 1 < len(rest))
            )
            answer += piece if loss else [-1 - token for token in piece]
        whole = prompt, answer
        if self.length > most:
            prompt, answer = _fitted(prompt, answer, most - len(self.begin))
        ids = self.begin + prompt + answer
        head = len(self.begin) + (0 if learned else len(prompt))
        while head < len(ids) and ids[head] < 0:
            ids[head] = -1 - ids[head]
            head += 1
        return Labelled(
            ids,
            1
            if len(ids) == 1
            else head,  # no token comes before the only one; its label would look like a class
            bool(whole[0]) and not prompt,
            len(answer) < len(whole[1]),
        )


def _fitted(prompt: list[int], answer: list[int], room: int) -> tuple[list[int], list[int]]:
    """What of a prompt and of an answer with its end token is kept in `room` tokens."""
    share = min(len(prompt), max(1, room // PROMPT_SHARE), room - 1)  # of the prompt, however long the answer
    share = min(len(prompt), max(share, room - len(answer)))
    if share and room - share == len(answer) - 1:
        share -= 1  # the end token alone would be cut, and a whole answer ends
    return tail(prompt, share), answer[: room - share]


def tail(ids: list[int], count: int) -> list[int]:
    """The last of some tokens."""
    return ids[max(0, len(ids) - count) :]


def begin_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin token, if a tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def pieces_of(example: Example, how: Prompts) -> Pieces:
    """An example's texts; of a plain text that alone."""
    if example.form == "text":
        return Pieces([Marked(example.output)])
    return how.pieces(example)


def spell(
    examples: Sequence[Example], how: Prompts, tokenizer: PreTrainedTokenizerBase, most: int
) -> list[Spelled]:
    """Tokens of examples.

    Args:
        examples: Of a conversation with more turns than `most` only the last of them are looked at.
        how: The template.
        tokenizer: Has an end token.
        most: Tokens of an example.
    """
    shorter = [_recent(example, min(most, MOST)) for example in examples]
    rows = [_pieces(example, how) for example, _ in shorter]
    begin, end = begin_of(tokenizer), tokenizer.eos_token_id
    apart = [how.apart or example.form == "text" for example in examples]
    alone = iter(tokens([t for row, a in zip(rows, apart, strict=True) if a for t in row.texts], tokenizer))
    joined = iter(piece_tokens([row.texts for row, a in zip(rows, apart, strict=True) if not a], tokenizer))
    made = []
    for row, is_apart, (_, dropped) in zip(rows, apart, shorter, strict=True):
        ids = [next(alone) for _ in row.texts] if is_apart else next(joined)
        if not row.ended:
            ids[-1] = [*ids[-1], end]
        own, ids[0] = begun(ids[0], begin, whole=not is_apart)
        made.append(Spelled(own, ids, row.silent, dropped))
    return made


def _pieces(example: Example, how: Prompts) -> Pieces:
    """As `pieces_of`; an error says which conversation it is about."""
    try:
        return pieces_of(example, how)
    except InputError as error:
        if not example.turns:
            raise
        begin = next((turn.content for turn in example.turns if turn.role == USER), "")
        raise InputError(f"the conversation that begins {begin[:40]!r}: {error}") from None


def begun(ids: list[int], begin: list[int], *, whole: bool) -> tuple[list[int], list[int]]:
    """The begin token before a text, and the text's tokens: one that a template wrote is not doubled.

    Args:
        ids: Of the text.
        begin: The tokenizer's begin token, if it has one.
        whole: Whether it has none but its own.
    """
    if begin and ids[:1] == begin:
        return begin, ids[1:]
    return ([], ids) if whole else (begin, ids)


def without_first(
    example: Example, spelled: Spelled, how: Prompts, tokenizer: PreTrainedTokenizerBase, most: int
) -> Spelled:
    """A conversation without as many exchanges at its start as it takes to fit; one is always left.

    Args:
        example: The conversation.
        spelled: Its tokens.
        how: The template.
        tokenizer: The tokenizer.
        most: Tokens.
    """
    kept, before = _recent(example, min(most, MOST))
    starts, found = _starts(kept.turns), {0: spelled}

    def fits(count: int) -> bool:
        if count not in found:
            (found[count],) = spell([_from(kept, starts, count)], how, tokenizer, most)
        return found[count].length <= most

    least = _least(len(starts) - 1, fits)
    fits(least)
    return replace(found[least], dropped=before + starts[least] - starts[0])


def prompt_within(
    example: Example, how: Prompts, tokenizer: PreTrainedTokenizerBase, most: int
) -> tuple[Marked, int]:
    """The text before an answer, of a conversation without as many exchanges at its start as it takes to fit.

    Args:
        example: What is answered.
        how: The template.
        tokenizer: The tokenizer.
        most: Tokens of the text.

    Returns:
        It, and how many turns are left out.
    """
    if example.form != "conversation":
        return how.prompt(example), 0
    kept, before = _recent(example, min(most, MOST))
    starts, found = _starts(kept.turns), dict[int, Marked]()

    def fits(count: int) -> bool:
        found[count] = how.prompt(_from(kept, starts, count))
        return len(tokens([found[count]], tokenizer)[0]) <= most

    least = 0 if fits(0) else _least(len(starts) - 1, fits)
    fits(least)
    return found[least], before + starts[least] - starts[0]


def _least(most: int, fits: Callable[[int], bool]) -> int:
    """The least number up to `most` that fits, where all above one that does fit too; else `most`."""
    low = 0
    while low < most:
        middle = (low + most) // 2
        low, most = (low, middle) if fits(middle) else (middle + 1, most)
    return low


def _starts(turns: Sequence[Turn]) -> list[int]:
    """Where the exchanges of a conversation begin: at what a user says after somebody else."""
    first = next((n for n, turn in enumerate(turns) if turn.role != SYSTEM), 0)
    later = [n for n in range(first + 1, len(turns)) if turns[n].role == USER and turns[n - 1].role != USER]
    return [first, *(n for n in later if n < last_answer(turns))]


def _from(example: Example, starts: Sequence[int], count: int) -> Example:
    """A conversation without its first exchanges, but with what the system says before them."""
    return replace(example, turns=(*example.turns[: starts[0]], *example.turns[starts[count] :]))


def _recent(example: Example, most: int) -> tuple[Example, int]:
    """A conversation without exchanges that cannot fit, since each turn has a token.

    Returns:
        It, and how many turns these exchanges have.
    """
    if len(example.turns) <= most:
        return example, 0
    starts = _starts(example.turns)
    count = next((n for n, at in enumerate(starts) if len(example.turns) - at <= most), len(starts) - 1)
    return _from(example, starts, count), starts[count] - starts[0]


def behind_last(turns: Sequence[Turn]) -> int:
    """How many turns come behind the last answer of a conversation; 0 of what is none."""
    return max(0, len(turns) - 1 - last_answer(turns))
