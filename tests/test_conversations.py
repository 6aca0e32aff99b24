"""Conversations, trees and plain texts as tools write them, and what is refused with its place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedtune.data.examples import Example, Turn
from fedtune.data.objects import ObjectData
from fedtune.data.reading import Reading
from fedtune.data.records import examples_from
from fedtune.data.sources import load_examples
from fedtune.errors import InputError

U, A, S = (Turn("user", "q"), Turn("assistant", "a"), Turn("system", "s"))
TALK = Example("q", "", "a", "", (U, A))
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS = json.dumps({"tool_calls": [CALL]})


def read(*rows: Any, fields: dict[str, str | None] | None = None, **how: Any) -> list[Example]:
    placed = iter([(f"d:{number}", row) for number, row in enumerate(rows, start=1)])
    return examples_from(placed, fields or {}, "d", reading=Reading(**how))


def said(row: Any, **how: Any) -> list[str]:
    reading = Reading(**how)
    examples_from(iter([("d:1", row)]), {}, "d", reading=reading)
    return reading.said


def messages(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": (messages(("user", "q"), ("assistant", "a")), 'turns under "messages"'),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        'turns under "conversations"',
    ),
    "another key": (
        {"dialog": messages(("user", "q"), ("assistant", "a"))["messages"]},
        'turns under "dialog"',
    ),
    "columns": (
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
        'turns under "messages"',
    ),
    "prompt and completion": (
        {
            "prompt": [{"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        'turns under "prompt" and "completion"',
    ),
    "text and turns": (
        {"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]},
        'turns under "prompt" and "completion"',
    ),
    "parts": (
        messages(
            ("user", [{"type": "text", "text": "q"}]),
            ("assistant", [{"type": "text", "text": ""}, {"type": "text", "text": "a"}]),
        ),
        'turns under "messages"',
    ),
    "a tree": (
        {"prompt": {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": "a"}]}},
        'trees of answers ("replies")',
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_conversation_in_any_form_is_the_same(name: str) -> None:
    row, why = FORMS[name]
    assert read(row) == [TALK] == read(row, format="conversation")
    (line,) = said(row)
    assert line.startswith("data.format: conversation, because the records") and why in line
    assert said(row, format="conversation") == []


def test_text_prompts_and_completions_are_instructions() -> None:
    assert read({"prompt": "q", "completion": "a"}) == [Example("q", "", "a")]
    assert said({"prompt": "q", "completion": "a"}) == [
        'data.format: instruction, because the records have "prompt" and "completion"'
    ]
    assert read({"prompt": "q", "completion": "a"}, format="conversation") == [TALK]


def test_an_instruction_is_what_it_always_was() -> None:
    row = {"instruction": "q", "output": "a", **messages(("user", "other"))}
    assert read(row) == [Example("q", "", "a")] and said(row) == []
    fields: dict[str, str | None] = {"instruction": "text", "output": "more"}
    assert read({"text": "q", "more": "a"}, fields=fields) == [Example("q", "", "a")]


def test_system_turns_and_keys() -> None:
    both = (S, U, A)
    assert read(messages(("system", "s"), ("user", "q"), ("assistant", "a")))[0].turns == both
    assert read(messages(("developer", "s"), ("user", "q"), ("assistant", "a")))[0].turns == both
    row = messages(("user", "q"), ("assistant", "a"))
    assert read({**row, "system": "s"})[0].turns == both
    assert read({**row, "system": ""})[0].turns == (U, A) == read({**row, "system": None})[0].turns
    row = messages(("system", "s"), ("user", "q"), ("assistant", "a"))
    assert read({**row, "system": "s"})[0].turns == both
    with pytest.raises(InputError, match=r'd:1: there is a key "system" and a system turn'):
        read({**row, "system": "t"})


def test_calls_of_tools() -> None:
    call, result = Turn("assistant", "", CALLS), Turn("tool", "r")
    share = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "a"},
    ]
    tool = {"name": "f", "parameters": {}}
    wanted = Example(
        "q", "", "a", "", (U, call, result, A), json.dumps([{"type": "function", "function": tool}])
    )
    assert read({"conversations": share, "tools": json.dumps([tool])}) == [wanted]
    # as OpenAI has it: arguments are JSON text, and a turn that calls has no text
    open_ai = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
        ]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a"},
    ]  # fmt: skip
    assert read({"messages": open_ai, "tools": [{"type": "function", "function": tool}]}) == [wanted]
    assert read({"messages": open_ai[:2]})[0].output == '{"name": "f", "arguments": {"x": 1}}'
    share[1] = {"from": "function_call", "value": "f(x)"}  # no JSON: it is what the assistant says
    assert read({"conversations": share})[0].turns[1] == Turn("assistant", "f(x)")
    assert read({"conversations": share, "tools": "[]"})[0].tools == ""


TREE = {
    "message_tree_id": "t",
    "prompt": {
        "role": "prompter",
        "text": "q",
        "replies": [
            {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
            {
                "role": "assistant",
                "text": "a",
                "rank": 0,
                "replies": [
                    {"role": "prompter", "text": "q2", "replies": [{"role": "assistant", "text": "a2"}]},
                    {"role": "prompter", "text": "unanswered", "replies": []},
                    {"role": "prompter", "text": "gone", "deleted": True, "replies": []},
                ],
            },
        ],
    },
}


def test_trees_become_conversations() -> None:
    best = (U, A, Turn("user", "q2"), Turn("assistant", "a2"))
    assert [example.turns for example in read(TREE)] == [best]
    ways = [best, (U, A), (U, Turn("assistant", "worse"))]
    assert [example.turns for example in read(TREE, trees="all")] == ways


def test_trees_whose_messages_are_records() -> None:
    rows: list[dict[str, Any]] = []

    def flat(node: dict[str, Any], parent: str | None) -> None:
        about = {key: node.get(key) for key in ("role", "text", "rank", "deleted")}
        rows.append({**about, "message_id": str(len(rows)), "parent_id": parent, "lang": "en"})
        for reply, own in [(reply, rows[-1]["message_id"]) for reply in node.get("replies", [])]:
            flat(reply, own)

    flat(TREE["prompt"], None)  # type: ignore[arg-type]
    for trees in ("best", "all"):
        assert [e.turns for e in read(*rows, trees=trees)] == [e.turns for e in read(TREE, trees=trees)]
    assert read(*rows, fields={"category": "lang"})[0].category == "en"


def test_plain_texts() -> None:
    assert read({"text": "once"}) == [Example("", "", "once", "", (Turn("document", "once"),))]
    assert read({"text": "once"})[0].form == "text"
    assert said({"text": "once"}) == [
        'data.format: text, because the records have "text" and neither instruction nor output'
    ]
    with pytest.raises(
        InputError, match=r'd:2: data.format is text, so "text" must be a text that is not empty'
    ):
        read({"text": "once"}, {"text": " "})
    with pytest.raises(InputError, match=r'd:2: .*got null; the keys here are: "instruction"'):
        read({"text": "once"}, {"instruction": "q"})


def test_preferences_are_asked_about() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(
        InputError, match=r"d:1: .*method.objective is sft. Set that to dpo .*, or data.format to"
    ):
        read(row)
    assert read(row, format="preference") == [TALK]
    assert "chosen answers are trained on" in said(row, format="preference")[0]
    turns = messages(("user", "q"), ("assistant", "a"))["messages"]
    assert read({"chosen": turns, "rejected": turns}, format="preference") == [TALK]
    assert read({"prompt": turns[:1], "chosen": turns, "rejected": turns}, format="preference") == [TALK]
    share = {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}}
    assert read({**share, "rejected": {"from": "gpt", "value": "b"}}, format="preference") == [TALK]
    with pytest.raises(InputError, match='there is no key "rejected"'):
        read(share, format="preference")
    with pytest.raises(InputError, match=r'd:1: "chosen" is an answer, and there is no question to it'):
        read({"chosen": "Human: q Assistant: a", "rejected": "b"}, format="preference")
    assert read(row, fields={"instruction": "prompt", "output": "chosen"}) == [Example("q", "", "a")]


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown role": (
        messages(("user", "q"), ("asistant", "a")),
        r'turn 2: "role" must say.*Did you mean "ass',
    ),
    "no role": ({"messages": [{"content": "q", "role": None}]}, 'turn 1: "role" must say who speaks'),
    "only a system turn": (messages(("system", "s")), "no assistant's turn.*who speaks: system"),
    "nobody answers": (messages(("user", "q"), ("user", "r")), "no assistant's turn.*who speaks: user"),
    "null content": (messages(("user", None), ("assistant", "a")), '"content" must be text, got null'),
    "a number": (messages(("user", 3), ("assistant", "a")), '"content" must be text, got 3'),
    "an image": (
        messages(("user", [{"type": "image", "url": "x"}]), ("assistant", "a")),
        'turn 1: "content" has a part of type "image"',
    ),
    "half a pair": (messages(("user", "\ud800"), ("assistant", "a")), "half of a surrogate pair"),
    "a call without name": (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}]},
        "a call without a name",
    ),
    "tools that are none": ({**messages(("assistant", "a")), "tools": "[1"}, '"tools" is no JSON'),
    "uneven columns": ({"messages": {"role": ["user"], "content": ["q", "a"]}}, "not equally long"),
    "a list": ([1], "a record must be a JSON object"),
    "another form": ({"instruction": "q", "output": "a"}, "no conversation here, and data.format is"),
    "no turns": ({"messages": []}, "no conversation here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_conversation_is_named_with_its_place(name: str) -> None:
    row, words = REFUSED[name]
    with pytest.raises(InputError, match=r"^d:2: ") as caught:
        read(messages(("user", "q"), ("assistant", "a")), row)
    assert re.search(words, str(caught.value)), str(caught.value)


def test_rows_of_public_data_sets() -> None:
    """The keys that some have beside the turns."""
    turns = messages(("user", "q"), ("assistant", "a"))["messages"]
    share = [{"from": "human", "value": "q", "weight": None}, {"from": "gpt", "value": "a", "weight": 1.0}]
    for row in (
        {"prompt": "q", "prompt_id": "1", "messages": turns},  # UltraChat
        {"conversations": share, "system_prompt": None, "category": None, "id": 1},  # OpenHermes, SlimOrca
        {"conversation": turns, "openai_moderation": [{"flagged": False}], "model": "m"},  # LMSYS-Chat
        {"instruction": "", "messages": turns},
    ):
        (found,) = read(row)
        assert (found.instruction, found.output) == ("q", "a")
        assert [(turn.role, turn.content) for turn in found.turns] == [("user", "q"), ("assistant", "a")]


def test_a_conversation_among_instructions_is_refused() -> None:
    with pytest.raises(InputError, match=r'd:2: no key "instruction".*"messages" holds a conversation'):
        read({"instruction": "q", "output": "a"}, messages(("user", "q"), ("assistant", "a")))


def test_files_data_sets_and_objects(tmp_path: Path) -> None:
    row = messages(("user", "q ü"), ("assistant", "a 🙂"))
    (tmp_path / "d.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    loaded = load_examples("d.jsonl", fields={}, base=tmp_path, reading=Reading())
    assert loaded[0].turns == (Turn("user", "q ü"), Turn("assistant", "a 🙂"))
    call = {"messages": [*row["messages"], {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    rows = datasets.Dataset.from_list([row, call])  # which writes null for what only other rows have
    data = ObjectData.read({"north": rows}, {}, Reading())
    assert [len(example.turns) for example in data.examples] == [2, 3]
    assert ObjectData.from_json(data.to_json()).examples == data.examples
    assert data.said == ('data.format: conversation, because the records have turns under "messages"',)
