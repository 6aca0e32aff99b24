"""Multiple choice: a list of answers joined into a question with letters, and the letter of the right one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from fedtune.data.keys import text_of


class NoChoice(ValueError):
    """Why a row is no question of multiple choice."""


@dataclass(frozen=True)
class Choices:
    """The answers to choose from.

    Attributes:
        texts: Of each.
        labels: Their own labels; may be empty.
        numbers: Whether they were numbers, so that one may be the answer itself.
    """

    texts: list[str]
    labels: list[str]
    numbers: bool


def choices_of(value: Any) -> Choices | None:
    """The answers that a value lets choose from; None of a value that holds none.

    Args:
        value: A list of texts or numbers; or, as in ARC, `{"text": [...], "label": ["A", ...]}`.
    """
    labels: Any = []
    if isinstance(value, dict):
        value, labels = value.get("text"), value.get("label")
    if not isinstance(value, list) or len(value) < 2:
        return None
    texts = [text_of(one) for one in value]
    named = [text_of(one) for one in labels] if isinstance(labels, list) else []
    if None in texts or None in named or (named and len(named) != len(texts)):
        return None
    plain = [str(text) for text in texts]
    return Choices(plain, [str(label) for label in named], not any(isinstance(one, str) for one in value))


def joined(texts: Sequence[str]) -> str:
    """The answers below each other, each behind its letter. Raises NoChoice if there are too few letters."""
    if len(texts) > len(ascii_uppercase):
        raise NoChoice(f"has {len(texts)} choices, and there are {len(ascii_uppercase)} letters")
    letters = letters_of(len(texts))
    return "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))


def letters_of(count: int) -> str:
    """The letters of so many answers."""
    return ascii_uppercase[:count]


def letter_of(answer: Any, choices: Choices) -> str:
    """The letter of the right answer.

    Args:
        answer: Its place, counted from 0; its letter or own label; or its text.
        choices: What it is among.

    Raises:
        NoChoice: It is none of these, or may be two of them.
    """
    texts, labels, said = choices.texts, choices.labels, text_of(answer)
    if said is None or isinstance(answer, bool):
        raise NoChoice(f"has the answer {answer!r:.60}, which is no place, letter or text of a choice")
    said = said.strip()
    letters = letters_of(len(texts))
    if labels:
        named = labels.index(said) if said in labels else None
    else:
        bare = said.strip("().").upper()
        named = letters.index(bare) if len(bare) == 1 and bare in letters else None
    same = next((at for at, text in enumerate(texts) if text.strip() == said), None)
    number = said.isdecimal()
    place = int(said) if number and named is None and int(said) < len(texts) else None
    if isinstance(answer, int) and not choices.numbers:
        same = None  # a number is a place, also where a text reads like it
    found = {at for at in (named, same, place) if at is not None}
    if len(found) == 1:
        return letters[found.pop()]
    if found:
        which = " and ".join(letters[at] for at in sorted(found))
        raise NoChoice(f'has the answer "{said[:60]}", which may mean {which}; write its letter')
    hint = f"; places count from 0 to {len(texts) - 1}" if number else ""
    raise NoChoice(f'has the answer "{said[:60]}", which is none of its {len(texts)} choices{hint}')
