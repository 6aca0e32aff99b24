"""Turns of a conversation, as tools write them: who speaks, what is said, and what tools are called."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from fedtune.data.examples import ASSISTANT, SYSTEM, TOOL, USER, Example, Turn
from fedtune.errors import InputError, nearest

TURN_KEYS = (("role", "content"), ("from", "value"))
_CALL = "call"  # who speaks in a turn that is a tool's call and nothing else
_ROLES = {
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai"), ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), TOOL),
    **dict.fromkeys(("function_call", "tool_call"), _CALL),
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of what an answer was preceded by
_PASSED = ("tool_calls", "name", "tool_call_id", *THOUGHTS, "weight")


def is_turns(value: Any) -> bool:
    """Whether a value is a conversation: a list of objects that say who speaks and what.

    The `datasets` library gives some such lists as one object of lists, a list of all speakers and one of all
    texts; these are conversations too.
    """
    if isinstance(value, dict):
        return any(all(isinstance(value.get(key), list) for key in keys) for keys in TURN_KEYS)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return False
    # one is enough: a turn that calls a tool may have no text
    return any(key in turn and text in turn for turn in value for key, text in TURN_KEYS)


def example_of(turns: list[Turn], tools: Any, place: str, category: str) -> Example:
    """A conversation as an example. Raises InputError if nobody answers in it."""
    answers = [number for number, turn in enumerate(turns) if turn.role == ASSISTANT]
    if not answers:
        who = ", ".join(dict.fromkeys(turn.role for turn in turns)) or "nobody"
        raise InputError(
            f"{place}: the conversation has no assistant's turn, so there is nothing to learn from it; "
            f"who speaks: {who}."
        )
    last = turns[answers[-1]]
    asked = [turn.content for turn in turns[: answers[-1]] if turn.role == USER]
    return Example(
        asked[-1] if asked else "",
        "",
        last.content or calls_text(last),
        category,
        tuple(turns),
        _tools(tools, place),
    )


def calls_text(turn: Turn) -> str:
    """A tool's calls as text, one a line: each a JSON object with name and arguments."""
    calls = json.loads(turn.more).get("tool_calls", ()) if turn.more else ()
    return "\n".join(json.dumps(call["function"], ensure_ascii=False) for call in calls)


def _tools(tools: Any, place: str) -> str:
    """What a conversation's tools are, as a JSON list; empty of none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise InputError(f'{place}: "tools" is no JSON: {error}.') from None
    if tools is None or tools == []:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f'{place}: "tools" must be a list of objects, or such a list as JSON text.')
    # as templates expect them: what is a function and nothing else is put inside one
    whole = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return json.dumps(whole, ensure_ascii=False)


def turns_of(value: Any, place: str, key: str) -> Iterator[Turn]:
    """Each turn of a conversation."""
    if isinstance(value, dict):
        columns = {name: column for name, column in value.items() if isinstance(column, list)}
        if len({len(column) for column in columns.values()}) > 1:
            raise InputError(f'{place}: the lists in "{key}" are not equally long.')
        value = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    for number, turn in enumerate(value, start=1):
        yield turn_of(turn, f'{place}: "{key}", turn {number}')


def turn_of(turn: dict[str, Any], place: str) -> Turn:
    """One turn. Raises InputError for a role that is none, or for what is not text."""
    who_key, text_key = next((keys for keys in TURN_KEYS if keys[0] in turn), TURN_KEYS[0])
    who = turn.get(who_key)
    role = _ROLES.get(who.lower()) if isinstance(who, str) else None
    if role is None:
        raise InputError(
            f'{place}: "{who_key}" must say who speaks, one of {", ".join(_ROLES)}; got {who!r:.60}.'
            f"{nearest(who, _ROLES) if isinstance(who, str) else ''}"
        )
    more = {name: turn[name] for name in _PASSED if turn.get(name) not in (None, "", [])}
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], place)
    content = _content(turn.get(text_key), place, text_key, none="tool_calls" in more)
    if role == _CALL:
        role, calls = ASSISTANT, _call_in(content)
        if calls:  # else it is no JSON, and stays what the assistant says
            content, more = "", {**more, "tool_calls": calls}
    return Turn(role, content, json.dumps(more, ensure_ascii=False) if more else "")


def _content(value: Any, place: str, key: str, *, none: bool) -> str:
    """A turn's text: a text, or a list of parts that are texts; null of a turn that calls a tool."""
    if value is None and none:
        return ""
    if isinstance(value, list):
        parts = list[str]()
        for part in value:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind != "text":
                raise InputError(f'{place}: "{key}" has a part of type "{kind}"; only text is trained on.')
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                raise InputError(f'{place}: "{key}" has a part without text, got {kind_of(text)}.')
            parts.append(text)
        value = "".join(parts)
    if not isinstance(value, str):
        raise InputError(f'{place}: "{key}" must be text, got {kind_of(value)}.')
    return unicode_text(value, place, key)


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls as templates expect them: arguments are an object, not its JSON."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise InputError(f'{place}: "tool_calls" must be a list of objects, got {kind_of(value)}.')
    calls = []
    for call in value:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f'{place}: "tool_calls" has a call without a name.')
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with suppress(ValueError):  # what is no JSON is passed on as it is
                arguments = json.loads(arguments) if arguments.strip() else {}
        about = {key: call[key] for key in ("id",) if isinstance(call.get(key), str)}
        calls.append(
            {"type": "function", **about, "function": {"name": function["name"], "arguments": arguments}}
        )
    return calls


def _call_in(text: str) -> list[dict[str, Any]]:
    """The calls that a turn's text is, as JSON; none if it is something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return []
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        return []
    return _calls(calls, "")


def category_of(row: Mapping[str, Any], key: str | None, place: str) -> str:
    """What stands under the key of the category; "" where there is none."""
    value = row.get(key) if key is not None else None
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f'{place}: "{key}" for category must be text or a number, got {kind_of(value)}.')
    return unicode_text(value, place, str(key)) if isinstance(value, str) else json.dumps(value)


def unicode_text(text: str, place: str, key: str) -> str:
    """The text. Raises InputError if half of a surrogate pair is in it: UTF-8 has no form for one."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f'{place}: "{key}" holds half of a surrogate pair, which is not Unicode text.'
        ) from None
    return text


def kind_of(value: Any) -> str:
    """What a value is, for people."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "bytes" if isinstance(value, bytes) else f"{value}")
