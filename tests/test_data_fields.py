"""Which key of a row becomes which field: no text twice unless asked for, and no conversation by position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

import fedtune
from fedtune.api.federate import with_objects
from fedtune.cli.client import client
from fedtune.config.file import dump_config, load_config
from fedtune.data.examples import Example
from fedtune.data.objects import ObjectData
from fedtune.data.reading import Reading
from fedtune.data.sources import load_examples
from fedtune.errors import InputError
from fedtune.federation.client import local_examples, local_records
from fedtune.federation.data import prepare_data

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
]
SHARES = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]


def read(row: dict[str, Any], fields: dict[str, str | None], tmp_path: Path) -> Example:
    """What a row becomes: in a file and as a Python object the same."""
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    (loaded,) = load_examples("d.jsonl", fields=fields, base=tmp_path)
    assert ObjectData.read([row], fields).examples == (loaded,)
    return loaded


def refused(row: dict[str, Any], fields: dict[str, str | None], tmp_path: Path) -> str:
    """What is said of a row, of a file and of Python objects the same but for the place."""
    with pytest.raises(InputError) as of_file:
        read(row, fields, tmp_path)
    with pytest.raises(InputError) as of_object:
        ObjectData.read({"north": [row]}, fields)
    place, _, words = str(of_file.value).partition("d.jsonl:1: ")
    assert place == f"{tmp_path}/" and str(of_object.value) == f'data["north"][0]: {words}'
    return words


# --- no text twice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "fields", "wanted"),
    [
        # another field's key is not taken again
        (
            {"input": "q", "label": "a"},
            {"instruction": "input", "output": "label"},
            Example("q", "", "a", ""),
        ),
        ({"instruction": "q", "category": "a"}, {"output": "category"}, Example("q", "", "a", "")),
        (
            {"instruction": "q", "input": "site", "output": "a"},
            {"category": "input"},
            Example("q", "", "a", "site"),
        ),
        (
            {"instruction": "q", "category": "about", "output": "a"},
            {"input": "category"},
            Example("q", "about", "a", ""),
        ),
        # nor the object that it is in
        ({"input": {"text": "q"}, "output": "a"}, {"instruction": "input.text"}, Example("q", "", "a", "")),
        ({"instruction": "q", "category": ["a"]}, {"output": "category.0"}, Example("q", "", "a", "")),
        # a key that has a dot in its name is not inside another
        (
            {"input.text": "q", "input": "about", "output": "a"},
            {"instruction": "input.text"},
            Example("q", "about", "a", ""),
        ),
        # it stands twice where that is asked for
        (
            {"instruction": "q", "output": "a"},
            {"category": "output", "input": "instruction", "instruction": "instruction"},
            Example("q", "q", "a", "a"),
        ),
        (
            {"input": "q", "label": "a"},
            {"instruction": "input", "input": "input", "output": "label", "category": "label"},
            Example("q", "q", "a", "a"),
        ),
        # null: none, whatever keys there are
        (
            {"instruction": "q", "input": "about", "output": "a", "category": "c"},
            {"input": None, "category": None},
            Example("q", "", "a", ""),
        ),
        (
            {"instruction": "q", "input": TURNS, "output": "a", "category": "c"},
            {"input": None},
            Example("q", "", "a", "c"),
        ),
        # all four keys, and those that nobody names, are read as ever
        (
            {"instruction": "q", "input": "about", "output": "a", "category": "c"},
            {"instruction": "instruction"},
            Example("q", "about", "a", "c"),
        ),
        ({"q": "q", "input": "about", "output": "a"}, {"instruction": "q"}, Example("q", "about", "a", "")),
    ],
)
def test_which_key_becomes_which_field(
    row: dict[str, Any], fields: dict[str, str | None], wanted: Example, tmp_path: Path
) -> None:
    assert read(row, fields, tmp_path) == wanted


@pytest.mark.parametrize("field", ["instruction", "output"])
def test_what_every_example_needs_cannot_be_none(field: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("{}\n")
    wanted = (
        f"{field} is null, but every example needs one; name the key that holds it, or leave it out if that "
        f'is "{field}". Only input, category and choices can be null, for none'
    )
    with pytest.raises(InputError) as caught:
        load_examples("d.jsonl", fields={field: None}, base=tmp_path)
    assert str(caught.value) == f"data.fields: {wanted}."
    for block, setting in (
        ({"fields": {field: None}}, "data.fields"),
        ({"public": {"source": "d.jsonl", "fields": {field: None}}}, "data.public.fields"),
    ):
        with pytest.raises(InputError) as caught:
            fedtune.load({"data": block})
        assert str(caught.value).endswith(f": {setting}: {wanted}")


def test_an_empty_key_is_no_null(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("{}\n")
    with pytest.raises(
        InputError, match=r"data\.fields\.input is empty; .* or leave it out, or null for none"
    ):
        load_examples("d.jsonl", fields={"input": ""}, base=tmp_path)
    with pytest.raises(InputError, match=r"data\.fields\.output is empty; .* or leave it out\.$"):
        load_examples("d.jsonl", fields={"output": ""}, base=tmp_path)


def test_a_configuration_keeps_its_null(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {fields: {input: null, category: kind}}\n")
    written = load_config(tmp_path / "c.yaml")
    assert written.data.fields == {"input": None, "category": "kind"}
    (tmp_path / "again.yaml").write_text(dump_config(written))
    again = load_config(tmp_path / "again.yaml")
    assert again == written and again.sha256() == written.sha256()
    (tmp_path / "plain.yaml").write_text("data: {fields: {category: kind}}\n")
    for none in ("data.fields.input=null", "data.fields.input="):
        assert load_config(tmp_path / "plain.yaml", [none]).sha256() == written.sha256()


def test_null_holds_for_training_and_held_out_files_alike(tmp_path: Path) -> None:
    for name in ("train", "held"):
        row = {"instruction": name, "input": "about", "output": "a"}
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 2)
    data = {
        "train": str(tmp_path / "train.jsonl"),
        "holdout": {"source": str(tmp_path / "held.jsonl")},
        "fields": {"input": None},
        "clients": 1,
    }
    split = prepare_data(fedtune.load({"data": data}), pooled=False)
    assert split.clients == {0: [Example("train", "", "a")] * 2}
    assert split.evaluation == [Example("held", "", "a")] * 2


def test_a_run_of_python_objects_has_no_text_twice(tmp_path: Path) -> None:
    rows = [{"input": f"w{number}", "label": "v", "category": "c"} for number in range(8)]
    document = {
        "data": {"fields": {"instruction": "input", "output": "label", "category": None}, "clients": 2},
        "method": {"name": "fedavg", "rounds": 1, "local_steps": 1, "lora": {"rank": 2}},
        "evaluation": {"bootstrap": 0},
    }
    config, objects = with_objects(fedtune.load(document), rows)
    assert objects.examples == tuple(Example(f"w{number}", "", "v", "") for number in range(8))
    run = fedtune.run(document, out=tmp_path / "run", data=rows, progress=False)
    assert run.status == "done" and run.config.data.fields == config.data.fields


# --- conversations ------------------------------------------------------------------------------------------

WHOLE = (
    "A conversation is read whole, since who speaks at a position differs from row to row: leave instruction "
    "and output out of data.fields, or set data.format to conversation."
)


@pytest.mark.parametrize(
    ("row", "key", "where"),
    [
        ({"messages": TURNS}, "messages.0.content", "messages"),
        ({"messages": TURNS}, "messages.1", "messages"),
        ({"messages": TURNS}, "messages", "messages"),
        ({"messages": TURNS}, "messages.7.content", "messages"),
        ({"conversations": SHARES}, "conversations.0.value", "conversations"),
        ({"chat": {"turns": SHARES}}, "chat.turns.0.value", "chat.turns"),
        ({"chats": [TURNS]}, "chats.0.1.content", "chats.0"),
        # a turn that calls a tool has no text
        ({"messages": [*TURNS, {"role": "assistant", "tool_calls": []}]}, "messages.1.content", "messages"),
        # one object of lists, as the datasets library gives some
        ({"messages": {"role": ["user"], "content": ["Who?"]}}, "messages.content.0", "messages"),
    ],
)
def test_a_path_into_a_conversation_is_refused(
    row: dict[str, Any], key: str, where: str, tmp_path: Path
) -> None:
    words = refused({**row, "output": "a"}, {"instruction": key}, tmp_path)
    what = "holds" if key == where else f'leads into "{where}", which holds'
    assert words == f'"{key}" for instruction {what} a conversation. {WHOLE}'
    words = refused({**row, "instruction": "q"}, {"output": key}, tmp_path)
    assert words == f'"{key}" for output {what} a conversation. {WHOLE}'


@pytest.mark.parametrize(
    ("row", "field", "keys"),
    [
        ({"messages": TURNS}, "instruction", '"messages"'),
        ({"conversations": SHARES, "id": 3}, "instruction", '"conversations", "id"'),
        ({"instruction": "q", "messages": TURNS}, "output", '"instruction", "messages"'),
    ],
)
def test_a_row_that_has_nothing_but_a_conversation(
    row: dict[str, Any], field: str, keys: str, tmp_path: Path
) -> None:
    talk = "conversations" if "conversations" in row else "messages"
    assert refused(row, {}, tmp_path) == (
        f'no key "{field}" for {field}; the keys here are: {keys}. "{talk}" holds a conversation. {WHOLE}'
    )


def test_a_conversation_beside_the_fields_is_no_matter(tmp_path: Path) -> None:
    row = {"instruction": "q", "output": "a", "messages": TURNS}
    assert read(row, {}, tmp_path) == Example("q", "", "a")


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"answers": {"text": ["q"], "answer_start": [3]}}, "answers.text.0"),
        ({"answers": [{"text": "q", "answer_start": 3}]}, "answers.0.text"),
        ({"route": [{"from": "q", "to": "r"}]}, "route.0.from"),
        ({"data": ["q", "r"]}, "data.0"),
        ({"turn": {"role": "user", "content": "q"}}, "turn.content"),
        ({"messages.0.content": "q", "messages": TURNS}, "messages.0.content"),
    ],
)
def test_paths_into_other_lists_are_read(row: dict[str, Any], key: str, tmp_path: Path) -> None:
    assert read({**row, "output": "a"}, {"instruction": key}, tmp_path) == Example("q", "", "a")


def test_a_data_set_and_a_run_of_conversations_are_refused(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"messages": TURNS}, {"messages": TURNS[1:]}])
    fields = {"instruction": "messages.0.content", "output": "messages.1.content"}
    words = rf'^data\[0\]: "messages\.0\.content" for instruction .*{WHOLE}$'
    with pytest.raises(InputError, match=words):
        fedtune.run({"data": {"fields": fields}}, data=rows, out=tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


# --- a client's own file ------------------------------------------------------------------------------------


def test_a_network_client_says_that_there_is_no_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(fedtune, "take_part", lambda server, **options: given.update(options))
    client("localhost:1", tmp_path, tmp_path / "d.jsonl", ["instruction=q", "input="])
    assert given["fields"] == {"instruction": "q", "input": None}
    (tmp_path / "d.jsonl").write_text('{"q": "who", "input": "about", "output": "a"}\n')
    assert local_examples(tmp_path / "d.jsonl", given["fields"], Reading()) == [Example("who", "", "a")]


def test_a_network_client_counts_its_examples_before_a_run_names_their_keys(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"q": "who", "a": "me"}\n\n{"q": "when", "a": "now"}\n')
    assert local_records(file) == 2  # the run's data.fields say later which key is the question
    file.write_text("\n")
    with pytest.raises(InputError, match=r"d\.jsonl: holds no examples"):
        local_records(file)
    with pytest.raises(InputError, match=r"e\.jsonl: there is no such file"):
        local_records(tmp_path / "e.jsonl")


@pytest.mark.parametrize(
    ("fields", "taker", "left"),
    [
        ({"instruction": "output"}, "instruction", "output"),
        ({"input": "instruction"}, "input", "instruction"),
        ({"output": "instruction"}, "output", "instruction"),
    ],
)
def test_a_needed_field_does_not_double_another_ones_key(
    fields: dict[str, str], taker: str, left: str, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text('{"instruction": "who", "output": "me"}\n')
    with pytest.raises(InputError, match=rf'data\.fields\.{taker} takes the key "{left}"'):
        load_examples("d.jsonl", fields=fields, base=tmp_path)
    with pytest.raises(InputError, match=rf'data\.fields\.{taker} takes the key "{left}"'):
        ObjectData.read([{"instruction": "who", "output": "me"}], fields)
    both = load_examples("d.jsonl", fields={**fields, left: left}, base=tmp_path)  # asked for by name
    assert getattr(both[0], taker) == getattr(both[0], left)


def test_public_data_name_their_own_fields(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"q": "who", "output": "me"}\n')
    with pytest.raises(InputError, match=r"Set data\.public\.fields\.instruction"):
        load_examples("p.jsonl", fields={}, base=tmp_path, setting="data.public.fields")
