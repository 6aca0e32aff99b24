"""Turns as the messages that a template takes, in the forms that it has."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.data.examples import ASSISTANT, SYSTEM, TOOL, USER, Turn
from fedtune.data.turns import THOUGHTS, calls_text
from fedtune.errors import InputError

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
        thoughts: The key of an answer's thoughts, of `turns.THOUGHTS`; empty of none.
        keeps: The thoughts that stand in the text of a last answer.
    """

    system: bool = False
    calls: bool = False
    tools: bool = False
    repeats: bool = False
    opens: bool = False
    thoughts: str = ""
    keeps: bool = True


def traits_of(render: Callable[[list[Message], list[Any] | None], str]) -> Traits:
    """What a template has a form for, found out by trying.

    Args:
        render: From messages and definitions of tools to the text. Raises InputError where that fails.
    """
    ask, answer = message(USER, "question-"), message(ASSISTANT, "answer-")
    again, more = message(USER, "again-"), message(ASSISTANT, "more-")
    name = "probing"
    about = {"name": name, "description": "defined-", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "id": "a1b2c3d4e", "function": {"name": name, "arguments": {"a": "b"}}}
    called = message(ASSISTANT, "", tool_calls=[call])
    told = message(TOOL, "result-", tool_call_id="a1b2c3d4e", name=name)

    def shows(messages: list[Message], *words: str, tools: list[Any] | None = None) -> bool:
        try:
            text = render(messages, tools)
        except InputError:
            return False
        return all(word in text for word in words)

    keys = [key for key in THOUGHTS if shows([ask, {**answer, key: "thought-"}], "thought-", "answer-")]
    return Traits(
        system=shows([message(SYSTEM, "system-"), ask, answer], "system-", "question-"),
        calls=shows([ask, called, told, answer], name, "result-"),
        tools=shows([ask, answer], "defined-", tools=[{"type": "function", "function": about}]),
        repeats=shows([ask, again, answer, more], "question-", "again-", "answer-", "more-"),
        opens=shows([answer, ask, more], "answer-", "more-"),
        thoughts=keys[0] if keys else "",
        keeps=shows([ask, message(ASSISTANT, thinking("thought-", "answer-"))], "thought-", "answer-"),
    )


def thinking(thoughts: str, answer: str) -> str:
    """An answer with its thoughts, as models write them."""
    return f"<think>\n{thoughts}\n</think>\n\n{answer}"


def message(role: str, content: str, **more: Any) -> Message:
    """One turn as templates take it."""
    return {"role": role, "content": content, **more}


def fitted(turns: Sequence[Turn], tools: str, traits: Traits) -> tuple[list[Message], list[Any] | None]:
    """Messages and definitions of tools in forms that a template has.

    Thoughts that have a key of their own go in front of their answer where there is none for them. A system's
    text goes in front of the user's first where there is no system's turn. Calls of tools are
    written as JSON and what they give as the user's where there is no form for them, and definitions of tools
    into the system's text. Turns of one role are joined where roles have to take turns, and an answer before
    any question is left out where the user has to begin.

    Args:
        turns: Of a conversation.
        tools: A JSON list of definitions; empty of none.
        traits: What the template has a form for.
    """
    messages = [
        _thought(message(turn.role, turn.content, **json.loads(turn.more or "{}")), traits) for turn in turns
    ]
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


def _thought(one: Message, traits: Traits) -> Message:
    """An answer whose thoughts stand under the template's key for them, or in front of its text."""
    given = [key for key in THOUGHTS if key in one]
    if not given or one["role"] != ASSISTANT:
        return one
    rest = {key: value for key, value in one.items() if key not in THOUGHTS}
    thoughts = str(one[given[0]])
    if traits.thoughts:
        return {**rest, traits.thoughts: thoughts}
    return {**rest, "content": thinking(thoughts, rest["content"])}


def _without_calls(one: Message, turn: Turn) -> Message:
    if one["role"] == TOOL:
        return message(USER, one["content"])
    if "tool_calls" not in one:
        return one
    rest = {key: value for key, value in one.items() if key != "tool_calls"}
    said = [text for text in (one["content"], calls_text(turn)) if text]
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
