"""The one record that every data source is turned into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SYSTEM, USER, ASSISTANT, TOOL = ROLES = ("system", "user", "assistant", "tool")
GOOD, BAD = "good", "bad"  # of an answer that was judged
DOCUMENT = "document"  # the role of the one turn of a plain text


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side of a conversation says.

    Attributes:
        role: One of ROLES; DOCUMENT of a plain text, which has this turn alone.
        content: What is said.
        more: A JSON object of what else the turn has, such as `tool_calls`; empty of most.
    """

    role: str
    content: str
    more: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction and its answer; or a conversation; or a plain text.

    Attributes:
        instruction: What is asked. For classification the first text. Of a conversation what the user said
            last before the last answer; of a plain text nothing.
        input: What the instruction is about; empty when there is none. For classification the second text.
        output: The answer. For classification the label's name. Of a conversation the last answer; of a plain
            text all of it.
        category: What partitions and hold-outs group by (category, language, task); empty when there is none.
        turns: Of a conversation all that is said; of a plain text that alone; else empty.
        tools: Of a conversation the tools that the assistant may call, as a JSON list; empty of none.
        choices: How many answers there are to choose from; the output is the letter of one. 0: any answer.
        picture: Of a picture with a caption where its file is; the instruction is the caption, and the output
            identifies the picture. Empty of a text.
        rejected: Of a pair of answers the one that the output is preferred to; else empty.
        judged: Of an answer that was judged alone, good or bad; else empty.
    """

    instruction: str
    input: str = ""
    output: str = ""
    category: str = ""
    turns: tuple[Turn, ...] = ()
    tools: str = ""
    choices: int = 0
    picture: str = ""
    rejected: str = ""
    judged: str = ""

    @property
    def form(self) -> str:
        """instruction, conversation, text or picture."""
        if self.picture:
            return "picture"
        if not self.turns:
            return "instruction"
        return "text" if self.turns[0].role == DOCUMENT else "conversation"

    def said(self) -> list[str]:
        """What identifies an example beside instruction, input, output and category: turns and tools."""
        pair = [more for more in (self.rejected, self.judged) if more]
        turns = (part for turn in self.turns for part in (turn.role, turn.content, turn.more))
        return [self.tools, *turns, *pair]

    def document(self) -> dict[str, Any]:
        """As JSON has it, without what is empty of an instruction."""
        document = asdict(self)
        plain = _PLAIN if self.choices == 0 else (*_PLAIN, "choices")
        for rare in ("rejected", "judged"):
            if not document[rare]:
                del document[rare]
        return document if self.turns else {key: document[key] for key in plain}

    @staticmethod
    def of(document: Mapping[str, Any]) -> Example:
        """What `document` gave."""
        turns = tuple(Turn(**turn) for turn in document.get("turns", ()))
        return Example(**{**document, "turns": turns})


_PLAIN = ("instruction", "input", "output", "category")
