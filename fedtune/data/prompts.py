"""The one way from an example to the text that a model reads, and where in it the answers are.

Training, evaluation, generation and judging all come here. `data.template` names a function from an
instruction to a text (`templates.py`), or a chat template (`chat.py`): the tokenizer's own, or a jinja
program. `auto` is the tokenizer's own where it has one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from operator import add
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from fedtune.data import templates
from fedtune.data.chat import ChatTemplate
from fedtune.data.control import marked, special_tokens
from fedtune.data.examples import ASSISTANT, SYSTEM, TOOL, USER, Example, Turn
from fedtune.data.fitting import PART, Traits, fitted
from fedtune.data.marked import Marked
from fedtune.data.templates import AUTO, CHAT, is_program
from fedtune.data.turns import THOUGHTS
from fedtune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Pieces:
    """An example as texts.

    Attributes:
        texts: What is read and what is answered, in turn, beginning with what is read.
        silent: Of the answers, those that are not to be learned (`weight: 0`).
        ended: Whether the last answer has an end token in its text.
    """

    texts: Sequence[Marked]
    silent: frozenset[int] = frozenset()
    ended: bool = False


class Prompts(Protocol):
    """A template with a tokenizer."""

    @property
    def name(self) -> str:
        """`chat`, `jinja` of a program that is not the tokenizer's, or what the function is called."""

    @property
    def text(self) -> str | None:
        """The jinja program that does the same for a server; None of a function of which there is none."""

    @property
    def apart(self) -> bool:
        """Whether pieces become tokens one by one, the tokenizer's begin token before the first.

        Of a chat template they are pieces of one text, and there is no begin token but its own.
        """

    def prompt(self, example: Example) -> Marked:
        """The text before the answer; of a conversation before the last one."""

    def response(self, example: Example) -> Marked:
        """An instruction's answer as it follows the prompt."""

    def pieces(self, example: Example) -> Pieces:
        """All of an example up to the end of its last answer."""

    @property
    def end(self) -> int | None:
        """The token with which an answer ends; None where the template writes none."""

    @property
    def traits(self) -> Traits:
        """What it has a form for."""


@dataclass(frozen=True)
class TextPrompts:
    """A template that is a function from an instruction to its prompt.

    Turns of a conversation are instructions and answers one after the other, with an empty line between.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    apart = True
    traits = Traits(opens=True)

    @property
    def end(self) -> int | None:
        """The tokenizer's."""
        return self.tokenizer.eos_token_id

    @property
    def text(self) -> str | None:
        """The jinja program that does the same."""
        return templates.programs().get(self.name)

    def prompt(self, example: Example) -> Marked:
        """As `Prompts`."""
        if not example.turns:
            return self._prompt(example)
        texts = self._said(example.turns[: last_answer(example.turns)], example.tools).texts
        ends = list(accumulate(len(text) for text in texts))
        return reduce(add, texts, Marked("")).parted(ends[:-1])

    def response(self, example: Example) -> Marked:
        """As `Prompts`."""
        fields = _fields(example)
        return marked(lambda texts: templates.response(_of_fields(texts), self.name), fields, self.tokenizer)

    def pieces(self, example: Example) -> Pieces:
        """As `Prompts`."""
        if example.turns:
            return self._said(example.turns[: last_answer(example.turns) + 1], example.tools)
        return Pieces([self._prompt(example), self.response(example)])

    def _prompt(self, example: Example) -> Marked:
        fields = _fields(example)
        return marked(lambda texts: templates.prompt(_of_fields(texts), self.name), fields, self.tokenizer)

    def _said(self, turns: Sequence[Turn], tools: str) -> Pieces:
        """Turns as prompts and answers in turn; a prompt is the last where no answer follows it."""
        messages, _ = fitted(turns, tools, self.traits)
        token = getattr(self.tokenizer, "eos_token", None) or ""
        end = Marked(token, [(0, len(token))] if token in special_tokens(self.tokenizer).ids else [])
        texts, silent, asked = list[Marked](), set[int](), ""
        for one in messages:
            if len(texts) % 2:  # a prompt is there
                texts.append(self.response(Example(asked, output=one["content"])) + end)
                if one.get("weight") == 0:
                    silent.add(len(texts) // 2 - 1)
                continue
            asked = one["content"] if one["role"] == USER else ""
            texts.append((Marked(PART) if texts else Marked("")) + self._prompt(Example(asked)))
            if one["role"] == ASSISTANT:  # before any question
                texts.append(self.response(Example("", output=one["content"])) + end)
        return Pieces(texts, frozenset(silent), ended=True)


class ChatPrompts:
    """A chat template: the tokenizer's own, or another."""

    apart = False

    def __init__(self, template: ChatTemplate, name: str) -> None:
        self.template, self.name = template, name

    @property
    def text(self) -> str | None:
        """The jinja program."""
        return self.template.text

    @property
    def traits(self) -> Traits:
        """What it has a form for."""
        return self.template.traits

    @property
    def end(self) -> int | None:
        """The control token that the template writes behind an answer."""
        return self.template.end

    def prompt(self, example: Example) -> Marked:
        """As `Prompts`."""
        turns = turns_of_example(example)
        return self.template.before(turns[: last_answer(turns)], example.tools)

    def response(self, example: Example) -> Marked:
        """As `Prompts`."""
        return self.pieces(example).texts[-1]

    def pieces(self, example: Example) -> Pieces:
        """As `Prompts`."""
        laid = self.template.lay_out(turns_of_example(example), example.tools)
        *seams, _ = laid.seams
        return Pieces(laid.text.pieces(seams), laid.silent, laid.ended)


def last_answer(turns: Sequence[Turn]) -> int:
    """Where the last answer stands; behind all turns where there is none."""
    return next((n for n in reversed(range(len(turns))) if turns[n].role == ASSISTANT), len(turns))


def turns_of_example(example: Example) -> tuple[Turn, ...]:
    """An example as a conversation: of an instruction one question, with its input below, and its answer."""
    if example.turns:
        return example.turns
    asked = f"{example.instruction}{PART}{example.input}" if example.input else example.instruction
    return Turn(USER, asked), Turn(ASSISTANT, example.output)


def _of_fields(texts: Sequence[str]) -> Example:
    instruction, about, output, category = texts
    return Example(instruction, about, output, category)


def _fields(example: Example) -> tuple[str, ...]:
    return example.instruction, example.input, example.output, example.category


_KNOWN: WeakKeyDictionary[Any, tuple[Any, Prompts]] = WeakKeyDictionary()


def prompts(template: str, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """A template with a tokenizer.

    Args:
        template: As `templates.template_setting` gives it.
        tokenizer: A Hugging Face tokenizer.

    Raises:
        InputError: Nothing has that name, or it is `chat` and the tokenizer has no chat template.
    """
    own = own_template(tokenizer)
    if template == AUTO:
        named = {text: name for name, text in templates.programs().items()}
        template = "alpaca" if own is None else named.get(own, CHAT)
    if template != CHAT and not is_program(template):
        templates.TEMPLATES.part(template)
        return TextPrompts(template, tokenizer)
    text = own if template == CHAT else template
    if text is None:
        raise InputError(
            "data.template is chat, and the tokenizer has no chat template; give a file with one "
            "(data.template: FILE.jinja), or alpaca or plain"
        )
    state = text, special_tokens(tokenizer)
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != state:
        name = "the tokenizer's chat template" if template == CHAT else "the template data.template"
        chat = ChatPrompts(ChatTemplate(text, tokenizer, name), CHAT if text == own else "jinja")
        known = _KNOWN[tokenizer] = state, chat
    return known[1]


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that a tokenizer comes with; None of one without.

    Raises:
        InputError: It has several, and none of them is called default.
    """
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        if "default" not in found:
            raise InputError(
                f"the tokenizer has the chat templates {', '.join(found)} and none called default; write the "
                "one that is meant into a file (data.template: FILE.jinja)"
            )
        found = found["default"]
    return found or None


def sha256_of(text: str | None) -> str | None:
    """Identifies a template."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def record_of(template: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a run's folder says of the template that it used."""
    how = prompts(template, tokenizer)
    return {"name": how.name, "sha256": sha256_of(how.text), "text": how.text}


def taken_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """What `auto` is for a tokenizer, and why."""
    name = prompts(AUTO, tokenizer).name
    if own_template(tokenizer) is None:
        return f"{name}, because the tokenizer has no chat template"
    return f"{name}, because the tokenizer has {'a' if name == CHAT else 'that as its'} chat template"


def other_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What to say where a template is another than the tokenizer's own; None where it is not.

    Args:
        template: As `data.template`.
        tokenizer: Of the model; one that a run wrote has the template in which it was tuned.
    """
    own, how = own_template(tokenizer), prompts(template, tokenizer)
    if own is None or how.text == own:
        return None
    its = {text: name for name, text in templates.programs().items()}.get(own)
    return (
        f"data.template is {how.name}, and the model's own chat template is {its or 'another'} (sha256 "
        f"{hashlib.sha256(own.encode()).hexdigest()[:12]}): set data.template to auto for that"
    )


def template_notes(
    template: str, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[str]:
    """What a person should know of a template for these examples, a line each.

    Args:
        template: As `data.template`.
        tokenizer: Of the model.
        examples: All of them.
    """
    how, notes = prompts(template, tokenizer), list[str]()
    if other := other_template(template, tokenizer):
        notes.append(other)
    traits = how.traits
    said = {turn.role for example in examples for turn in example.turns}
    calls = any("tool_calls" in turn.more for example in examples for turn in example.turns)
    lacks = []
    if SYSTEM in said and not traits.system:
        lacks.append("a system's turn, whose text goes in front of the user's next")
    if (TOOL in said or calls) and not traits.calls:
        lacks.append("calls of tools, which are written as JSON, and what they give as the user's")
    apart = any(f'"{key}"' in turn.more for example in examples for turn in example.turns for key in THOUGHTS)
    if apart and not traits.thoughts:
        lacks.append("thoughts, which go in front of their answer between <think> and </think>")
    if any(example.tools for example in examples) and not traits.tools:
        lacks.append("definitions of tools, which go into the system's text as JSON")
    if lacks:
        notes.append(f"the template {how.name} has no form for {'; for '.join(lacks)}")
    inside = any("</think>" in turn.content for example in examples for turn in example.turns)
    if not traits.keeps and (inside or (apart and not traits.thoughts)):
        notes.append(
            f"the template {how.name} leaves out the thoughts of every answer, the last one's too, so they "
            "are not learned; to learn them give a template that writes them (data.template: FILE.jinja)"
        )
    return notes


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """A tokenizer whose chat template is the one that was used, for servers; itself where it is already.

    A function of which there is no jinja program leaves none: the tokenizer's own would be the wrong one.
    """
    text = prompts(template, tokenizer).text
    if text == own_template(tokenizer):
        return tokenizer
    other = copy(tokenizer)
    other.chat_template = text
    return other
