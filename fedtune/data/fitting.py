"""Turns as the messages that a template takes, in the forms that it has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.data.examples import ASSISTANT, SYSTEM, TOOL, USER, Turn
from fedtune.data.turns import calls_text

Message = dict[str, Any]
PART = "\n\n"  # between texts that become one


@dataclass(frozen=True)
class Traits:
    """What a template has a form for.

    Attributes:
        system: A system's turn.
        calls: An assistant's calls of tools, and what they give.
        tools: Definitions of tools.
        repeats: Two turns of one role, one after the other.
        opens: An assistant's turn before any of the user's.
    """

    system: bool = False
    calls: bool = False
    tools: bool = False
    repeats: bool = False
    opens: bool = False


def message(role: str, content: str, **more: Any) -> Message:
    """One turn as templates take it."""
    return {"role": role, "content": content, **more}


def fitted(turns: Sequence[Turn], tools: str, traits: Traits) -> tuple[list[Message], list[Any] | None]:
    """Messages and definitions of tools in forms that a template has.

    A system's text goes in front of the user's first where there is no system's turn. Calls of tools are
    written as JSON and what they give as the user's where there is no form for them, and definitions of tools
    into the system's text. Turns of one role are joined where roles have to take turns, and an answer before
    any question is left out where the user has to begin.

    Args:
        turns: Of a conversation.
        tools: A JSON list of definitions; empty of none.
        traits: What the template has a form for.
    """
    messages = [message(turn.role, turn.content, **json.loads(turn.more or "{}")) for turn in turns]
    listed = json.loads(tools) if tools else None
    if not traits.calls:
        messages = [_without_calls(one, turn) for one, turn in zip(messages, turns, strict=True)]
    if listed and not traits.tools:
        about = "Tools: " + json.dumps([tool.get("function", tool) for tool in listed], ensure_ascii=False)
        if messages[0]["role"] == SYSTEM:
            messages[0] = {**messages[0], "content": messages[0]["content"] + PART + about}
        else:
            messages.insert(0, message(SYSTEM, about))
        listed = None
    if not traits.system:
        messages = _without_system(messages)
    if not traits.opens:
        asked = next((at for at, one in enumerate(messages) if one["role"] == USER), len(messages))
        messages = [one for at, one in enumerate(messages) if at > asked or one["role"] != ASSISTANT]
    if not traits.repeats:
        messages = _joined(messages)
    return messages, listed


def _without_calls(one: Message, turn: Turn) -> Message:
    if one["role"] == TOOL:
        return message(USER, one["content"])
    if "tool_calls" not in one:
        return one
    rest = {key: value for key, value in one.items() if key != "tool_calls"}
    said = [text for text in (turn.content, calls_text(turn)) if text]
    return {**rest, "content": PART.join(said)}


def _without_system(messages: list[Message]) -> list[Message]:
    """A system's text in front of the user's next; before an answer it is a user's turn by itself."""
    made, waiting = list[Message](), list[str]()
    for one in messages:
        if one["role"] == SYSTEM:
            waiting.append(one["content"])
            continue
        if waiting and one["role"] == USER:
            one = {**one, "content": PART.join([*waiting, one["content"]])}
        elif waiting:
            made.append(message(USER, PART.join(waiting)))
        made.append(one)
        waiting = []
    return made if not waiting else [*made, message(USER, PART.join(waiting))]


def _joined(messages: list[Message]) -> list[Message]:
    made = list[Message]()
    for one in messages:
        before = made[-1] if made else None
        alike = before is not None and before["role"] == one["role"] and one["role"] in (USER, ASSISTANT)
        if before is not None and alike and "tool_calls" not in before and "tool_calls" not in one:
            made[-1] = {**before, "content": PART.join([before["content"], one["content"]])}
        else:
            made.append(one)
    return made
