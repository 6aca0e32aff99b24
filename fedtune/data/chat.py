"""Chat templates: conversations to text, with the places of what the assistant says.

A chat template is a jinja program that comes with a tokenizer. It is rendered in the sandbox of transformers.
It tells neither which of its characters are users' nor, in most cases, where an answer begins and ends. Both
are found by rendering the conversation a second time with each turn's characters covered by one that stands
for this turn: what is covered there is data, all else the template's own. An answer begins where the prompt
to generate it ends, and ends with the control token behind it. A template that marks its answers
(`{% generation %}`) is believed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import takewhile
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedtune.data.control import special_tokens
from fedtune.data.examples import ASSISTANT, USER, Turn
from fedtune.data.fitting import Message, Traits, fitted, message, traits_of
from fedtune.data.layout import Around, Laid, Span, around, closing, up_to_end, without
from fedtune.data.marked import Marked
from fedtune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 40_000  # turns of a conversation, each of which has a letter of its own
LONGEST = 1 << 20  # characters of a template
_FIRST = 0x20000  # from here on ideographs: printable letters without case, of which templates write none
_EMPTY, _OTHER, _ANSWER = (chr(_FIRST + MOST + more) for more in (1, 2, 3))
_RUN = re.compile(f"([{chr(_FIRST)}-{_EMPTY}])\\1*")
_COVER = re.compile(f"[{chr(_FIRST)}-{_ANSWER}]")
# Not covered is what templates look for in a text, and what JSON would escape.
_COVERED = re.compile(r"</?\w+>|\[/?THINK\]|[^\s\"'\\<>]")
_UNCOVERED_KEYS = ("role", "type", "id", "tool_call_id", "weight")
_STEPS = 1_000_000  # lines of a template that one short question may take
_CUT = re.compile(r"\n|>")  # behind which a prompt for an answer may end
_TODAY = re.compile(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)")
_DAY = datetime.date(2024, 7, 26)  # where a template writes today's: a run is the same on every day
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A chat template with the tokenizer whose control tokens it writes.

    Args:
        text: The jinja program.
        tokenizer: A Hugging Face tokenizer.
        name: What errors call it.

    Raises:
        InputError: It is too long.
    """

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        if len(text) > LONGEST:
            raise InputError(f"{name} has {len(text):,} characters; a template has at most {LONGEST:,}.")
        self.text, self.name = text, name
        self._program = _TODAY.sub(lambda hit: json.dumps(_DAY.strftime(hit[2])), text)
        self._words: dict[str, Any] = {
            **tokenizer.special_tokens_map,
            "date_string": _DAY.strftime("%d %b %Y"),
        }
        special = special_tokens(tokenizer)
        self._pattern, self._ids = special.pattern, special.ids
        begin, end = (getattr(tokenizer, name, None) for name in ("bos_token", "eos_token"))
        self._begin, self._end = begin if begin != end else None, end
        self._marks = _MARKS.search(text) is not None
        self._leads: dict[tuple[str, bool], str] = {}

    @property
    def sha256(self) -> str:
        """Of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def traits(self) -> Traits:
        """What it has a form for, found out by trying. Raises InputError if it cannot be rendered at all."""
        with _bounded():
            if len(self._render([message(USER, "question-"), message(ASSISTANT, "answer-")])) > LONGEST:
                raise InputError(f"{self.name} makes more than {LONGEST:,} characters of one short question")
        return traits_of(self._render)

    @cached_property
    def end(self) -> int | None:
        """The control token behind an answer; None where it writes none, and the tokenizer's ends one."""
        laid = self.lay_out([Turn(USER, "question-"), Turn(ASSISTANT, "answer-")])
        behind = [span for span in laid.text.own if span[0] >= laid.text.index("answer-")]
        return self._ids[laid.text[slice(*behind[0])]] if laid.ended else None

    def lay_out(self, turns: Sequence[Turn], tools: str = "") -> Laid:
        """A conversation as text, up to its last answer.

        Args:
            turns: At most MOST, and at least one of the assistant.
            tools: A JSON list of definitions; empty of none.

        Raises:
            InputError: The template fails, or it cannot be told what of the text is an answer.
        """
        return self._laid(*fitted(turns, tools, self.traits))

    def before(self, turns: Sequence[Turn], tools: str = "") -> Marked:
        """The prompt to generate an answer to a conversation. Raises InputError as `lay_out`."""
        messages, listed = fitted(turns, tools, self.traits)
        text, bare = (
            self._render(said, defined, generation=True)
            for said, defined in ((messages, listed), (self._covered(messages), self._covered_tools(listed)))
        )
        self._check_same(text, bare)
        prompt = Marked(text, self._controls(bare), whole=True)
        if not any(one["role"] == ASSISTANT for one in messages):
            return prompt
        laid = self._laid([*messages, message(ASSISTANT, "answer-")], listed)
        *seams, _ = laid.seams
        # parted where training parts it, so that it has the same tokens
        return prompt.parted(seams) if text.startswith(laid.text[: seams[-1]]) else prompt

    def _laid(self, messages: list[Message], tools: list[Any] | None) -> Laid:
        answers = [place for place, one in enumerate(messages) if one["role"] == ASSISTANT]
        if not answers:
            raise InputError(f"{self.name}: nothing is left of the conversation that the assistant says")
        messages = messages[: answers[-1] + 1]
        empty = [place for place in answers if _says_nothing(messages[place])]
        for place in empty:  # it has to be somewhere
            messages[place] = {**messages[place], "content": _EMPTY}
        text, marks = self._rendered(messages, tools, marks=self._marks)
        covered, hidden = self._covered(messages, empty), self._covered_tools(tools)
        bare = self._render(covered, hidden)
        self._check_same(text, bare)
        controls = self._controls(bare)
        runs = self._runs(bare, empty)
        places = [around(runs, place) for place in answers]
        spans = []
        for place, where in zip(answers, places, strict=True):
            if where is None:
                raise self._unclear(f"it leaves out what the assistant says in turn {place + 1}")
            if self._marks:
                start, end = self._marked(marks, where, place)
            else:
                start, end = self._start(bare, covered, hidden, place, where), where.last
            spans.append((start, self._ended(bare, controls, where, end)))
        final = next((c for c in controls if c[1] == spans[-1][1]), None)
        if final is not None:
            spans = _with_all_ends(text, spans, final, up_to_end(text, controls, final, self._end))
        elif rest := text[spans[-1][1] :].strip():
            raise self._unclear(
                f"behind an answer it writes {rest[:40]!r}, which is no control token of this tokenizer, so "
                "a model could not end its turn. Write {{ eos_token }} there, or make it a special token of "
                "the tokenizer"
            )
        silent = frozenset(n for n, place in enumerate(answers) if messages[place].get("weight") == 0)
        kept, moved = without(Marked(text, controls), [a for a, _, place in runs if place in empty], spans)
        return Laid(kept.up_to(moved[-1][1]), moved, silent, final is not None)

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        *,
        generation: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        from transformers.utils import chat_template_utils as library  # heavy

        render: Callable[..., Any] = library.render_jinja_template  # whose types are not those of its code
        try:
            texts, indices = render(
                [list(messages)],
                tools=tools,
                chat_template=self._program,
                add_generation_prompt=generation,
                return_assistant_tokens_mask=marks,
                **self._words,
            )
        except _Endless:
            raise InputError(
                f"{self.name} does not end: it takes more than {_STEPS:,} steps for one short question"
            ) from None
        except Exception as error:  # a program of others: whatever it raises says what is wrong with it
            said = " ".join(str(error).split()) or type(error).__name__
            line = getattr(error, "lineno", None)
            raise InputError(
                f"{self.name} cannot be rendered{f' (line {line})' if line else ''}: {said[:300]}"
            ) from error
        return str(texts[0]), [(int(a), int(b)) for a, b in indices[0]] if marks else []

    def _render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, *, generation: bool = False
    ) -> str:
        return self._rendered(messages, tools, generation=generation)[0]

    def _covered(self, messages: Sequence[Message], empty: Sequence[int] = ()) -> list[Message]:
        return [
            one if place in empty else self._covered_one(one, chr(_FIRST + place))
            for place, one in enumerate(messages)
        ]

    def _covered_one(self, one: Message, letter: str) -> Message:
        """A turn with what it says covered; a name that it calls only where that is all it says."""
        cover = partial(self._cover, letter=letter)
        covered: Message = _changed(one, cover, (*_UNCOVERED_KEYS, "name"))
        if self._holds(covered) or letter not in json.dumps(covered, ensure_ascii=False):
            covered = _changed(one, cover, _UNCOVERED_KEYS)
        self._refuse_control(covered)
        return covered

    def _covered_tools(self, tools: list[Any] | None) -> list[Any] | None:
        """Of tools only what could be taken for control tokens: templates read the rest."""
        pattern = self._pattern
        if not tools or pattern is None:
            return tools

        def hide(text: str) -> str:
            return pattern.sub(lambda hit: _OTHER * len(hit[0]), text)

        covered: list[Any] = _changed(tools, hide, ())
        self._refuse_control(covered)
        return covered

    def _holds(self, value: Any) -> bool:
        """Whether a control token is anywhere in a value of JSON."""
        if isinstance(value, dict):
            return any(self._holds(key) or self._holds(item) for key, item in value.items())
        if isinstance(value, list):
            return any(map(self._holds, value))
        return isinstance(value, str) and self._pattern is not None and bool(self._pattern.search(value))

    def _refuse_control(self, covered: Any) -> None:
        if self._holds(covered):
            raise InputError(
                "a tool, or a call of one, has a control token of the tokenizer in a key, a type or an id, "
                "where templates read it; take it out of the data"
            )

    def _cover(self, text: str, letter: str) -> str:
        special = self._pattern

        def hide(hit: re.Match[str]) -> str:
            plain = len(hit[0]) > 1 and not (special and special.search(hit[0]))
            return hit[0] if plain else letter * len(hit[0])

        found = _COVERED.sub(hide, text)
        return re.sub(r"\S", letter, text) if special and special.search(found) else found

    def _controls(self, bare: str) -> list[Span]:
        return [hit.span() for hit in self._pattern.finditer(bare)] if self._pattern else []

    def _runs(self, bare: str, empty: Sequence[int]) -> list[tuple[int, int, int]]:
        """(start, end, turn) of what is covered; `empty`: the turns that _EMPTY stands for, in order."""
        waiting, runs = iter(empty), list[tuple[int, int, int]]()
        for hit in _RUN.finditer(bare):
            if hit[1] != _EMPTY:
                runs.append((*hit.span(), ord(hit[1]) - _FIRST))
                continue
            for place in range(*hit.span()):
                runs.append((place, place + 1, next(waiting, -1)))
        return runs

    def _check_same(self, text: str, bare: str) -> None:
        """The two differ in nothing but what is covered."""
        if len(text) == len(bare):
            at = 0
            for hit in _COVER.finditer(bare):
                if text[at : hit.start()] != bare[at : hit.start()]:
                    break
                at = hit.end()
            else:
                if text[at:] == bare[at:]:
                    return
        raise self._unclear(
            "it changes what it is given so much that its own part of the text cannot be told from the data"
        )

    def _start(
        self, bare: str, covered: list[Message], hidden: list[Any] | None, place: int, where: Around
    ) -> int:
        """Where an answer begins: behind what the prompt to generate it ends with."""
        between = bare[where.before : where.first]
        kind = (covered[place - 1]["role"] if place else "", bool(hidden))
        lead = self._leads.get(kind)
        if lead is None or lead not in between:
            lead = self._lead(covered, hidden, place) if place else bare[: where.first].lstrip()
            self._leads[kind] = lead
        # the last prompt may end with more than those before it, such as a tag to begin thinking with
        last = max((end for _, end in self._controls(lead)), default=len(lead))
        cuts = {hit.end() for hit in _CUT.finditer(lead) if hit.end() >= last} | {last, len(lead)}
        for length in sorted(cuts, reverse=True):
            at = between.rfind(lead[:length])
            if at >= 0:
                return where.before + at + length if length else where.first
        raise self._unclear(
            f"before turn {place + 1} it does not write what its prompt to generate ends with, {lead!r}"
        )

    def _lead(self, covered: list[Message], hidden: list[Any] | None, place: int) -> str:
        """What stands between a turn and the answer to it, as far as the prompt to generate has it too."""
        prompt = self._render(covered[:place], hidden, generation=True)
        answered = self._render([*covered[:place], message(ASSISTANT, _ANSWER)], hidden)
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, answered, strict=False))
        shared = "".join(letter for letter, _ in pairs)
        ends = [hit.end() for hit in _COVER.finditer(shared)]
        return shared[ends[-1] if ends else 0 :].lstrip()

    def _ended(self, bare: str, controls: Sequence[Span], where: Around, end: int) -> int:
        """Where an answer ends: with the first control token behind it, if the template writes one."""
        found = closing(controls, where.last, where.after)
        if found is None or bare[found[0] : found[1]] == self._begin:
            return end
        # what a template marks may end before that token, or with the blanks behind it
        between = bare[end : found[0]] if end < found[1] else bare[found[1] : end]
        return end if self._marks and between.strip() else found[1]

    def _marked(self, marks: Sequence[Span], where: Around, place: int) -> Span:
        """An answer as the template marks it."""
        own = [(a, b) for a, b in marks if a < where.last and b > where.first]
        if not own:
            raise self._unclear(f"it marks answers as generated, and not what is said in turn {place + 1}")
        return own[0][0], own[-1][1]

    def _unclear(self, why: str) -> InputError:
        return InputError(f"{self.name} cannot be trained with: {why}")


class _Endless(Exception):
    """A template takes too many steps."""


@contextmanager
def _bounded() -> Iterator[None]:
    """Inside, a template that takes too many steps is ended."""
    left, before = _STEPS, sys.gettrace()

    def each(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        nonlocal left
        if frame.f_code.co_filename != "<template>":
            return None
        left -= 1
        if left < 0:
            raise _Endless
        return each

    sys.settrace(each)
    try:
        yield
    finally:
        sys.settrace(before)


def _with_all_ends(text: str, spans: Sequence[Span], final: Span, both: Span) -> list[Span]:
    """Answers that end with all of the control tokens with which the last one does: some have two."""
    ending, more = text[both[0] : both[1]], both[1] - final[1]
    return [(a, b + more if text.startswith(ending, b - (final[1] - final[0])) else b) for a, b in spans]


def _says_nothing(one: Message) -> bool:
    return not one["content"].strip() and "tool_calls" not in one


def _changed(value: Any, change: Callable[[str], str], kept: Sequence[str]) -> Any:
    """A value of JSON with its texts changed, but for those under some keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(item, change, kept) for item in value]
    if isinstance(value, dict):
        return {key: item if key in kept else _changed(item, change, kept) for key, item in value.items()}
    return value
