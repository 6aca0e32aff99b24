"""Keys with dots, templates of several keys, labels that are no text, and multiple choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.file import load_config, parse_config
from fedtune.data.examples import Example
from fedtune.data.keys import likely
from fedtune.data.objects import ObjectData
from fedtune.data.sources import load_examples
from fedtune.errors import InputError
from fedtune.federation.asked import Asked
from fedtune.methods import registry


def read(row: dict[str, Any], fields: dict[str, str | None]) -> Example:
    (example,) = ObjectData.read([row], fields).examples
    return example


def refused(row: dict[str, Any], fields: dict[str, str | None]) -> str:
    with pytest.raises(InputError) as caught:
        read(row, fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "key", "text"),
    [
        ({"meta": {"site.id": "n"}}, 'meta."site.id"', "n"),
        ({"a.b": {"c": ["x", "y"]}}, '"a.b".c.1', "y"),
        ({"a": {'say "x".': "z"}}, 'a."say ""x""."', "z"),
        ({'meta."site.id"': "whole", "meta": {"site.id": "n"}}, 'meta."site.id"', "whole"),
        ({"q": "who", "c": "here"}, "{q}\n{c}", "who\nhere"),
        ({"q": "{c}", "c": 1.5}, "{{{q}}} %s {0} {c}".replace("{0}", ""), "{{c}} %s  1.5"),
        ({"q": "x", "c": None}, "{q}: {c}.", "x: ."),
        ({"meta": {"site.id": True}, "l": [{"t": 3}]}, '{meta."site.id"} {l.0.t}', "true 3"),
        ({"{q}": "literal", "q": "x"}, "{q}", "literal"),  # a key that is there is no template
        ({"a}": "odd"}, "a}", "odd"),
    ],
)
def test_keys_paths_and_templates(row: dict[str, Any], key: str, text: str) -> None:
    assert read({**row, "output": "o"}, {"instruction": key}) == Example(text, "", "o", "")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("{q} {z}", 'data[0]: no key "z" for instruction; the keys here are: "q", "n", "t", "output".'),
        ("{q", "a single { stands for nothing; a key is written {key}, and a brace {{"),
        ("q}", "a single } stands for nothing"),
        ("{}", "name a key between the braces"),
        ("{n}", 'every key of "{n}" for instruction is null'),
        ("{t}", '"t" for instruction must be text or a number, got a list'),
        ('"q', 'no key ""q" for instruction'),
    ],
)
def test_templates_that_are_none(key: str, words: str) -> None:
    assert words in refused({"q": "x", "n": None, "t": [1], "output": "o"}, {"instruction": key})


def test_what_a_template_has_is_no_other_field_too() -> None:
    row = {"instruction": "q", "input": "c", "output": "o", "category": "k"}
    assert read(row, {"instruction": "{instruction}\n{input}"}) == Example("q\nc", "", "o", "k")
    assert read(row, {"output": "{output} ({category})"}) == Example("q", "c", "o (k)", "")
    assert 'takes the key "instruction", which would be' in refused(row, {"output": "{instruction}!"})


def test_labels_may_be_numbers_and_truths(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "\n".join(
            json.dumps({"instruction": "x", "output": y, "category": c}) for y, c in ((True, 1), (0, False))
        )
    )
    found = load_examples("a.jsonl", fields={}, base=tmp_path)
    assert [(e.output, e.category) for e in found] == [("true", "1"), ("0", "false")]
    assert '"instruction" for instruction must be text or a number, got true or false' in refused(
        {"instruction": True, "output": "x"}, {}
    )


# --- multiple choice ----------------------------------------------------------------------------------------

FIELDS: dict[str, str | None] = {"instruction": "question", "output": "answer"}


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (["one", "two", "three"], 2, "C"),
        (["one", "two"], "B", "B"),
        (["one", "two"], "(b)", "B"),
        (["one", "two"], " two ", "B"),
        (["one", "two"], "0", "A"),
        (["5", "2", "7"], 0, "A"),  # a number is a place, whatever the texts are
        (["5", "0"], 1, "B"),
        ([5, 7], 7, "B"),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", "B"),  # as in ARC
        ({"text": ["x", "y"], "label": ["A", "B"]}, 1, "B"),
    ],
)
def test_a_list_of_choices_becomes_letters(choices: Any, answer: Any, letter: str) -> None:
    row = {"question": "Which?", "choices": choices, "answer": answer}
    found = read(row, FIELDS)
    texts = choices["text"] if isinstance(choices, dict) else choices
    lines = "\n".join(f"{name}. {text}" for name, text in zip("ABC", texts, strict=False))
    assert found == Example(f"Which?\n{lines}", "", letter, "", choices=len(texts))
    below = read({**row, "input": "About."}, FIELDS)
    assert (below.instruction, below.input) == ("Which?", f"About.\n{lines}")


@pytest.mark.parametrize(
    ("choices", "answer", "words"),
    [
        (["a", "b"], 2, "which is none of its 2 choices; places count from 0 to 1"),
        (["a", "b"], "c", "which is none of its 2 choices"),
        (["B", "A"], "B", "which may mean A and B; write its letter"),
        (["1", "0"], "1", "which may mean A and B; write its letter"),
        ([1, 2, 3], 2, "which may mean B and C; write its letter"),
        (["a", "b"], None, "has the answer None"),
        (["a", "b"], True, "has the answer True"),
        (["x"] * 27, 0, "has 27 choices, and there are 26 letters"),
    ],
)
def test_answers_that_are_no_choice(choices: list[Any], answer: Any, words: str) -> None:
    assert words in refused({"question": "Which?", "choices": choices, "answer": answer}, FIELDS)


def test_what_is_no_choice_is_left_alone() -> None:
    row: dict[str, Any] = {"instruction": "q", "output": "free text", "choices": ["a", "b"]}
    assert "set data.fields.choices to null" in refused(row, {})
    assert read(row, {"choices": None}) == Example("q", "", "free text", "")
    for odd in ("a, b", [{"message": 1}], [], ["one"], None):
        assert read({**row, "choices": odd}, {}) == Example("q", "", "free text", "")
    message = refused({**row, "options": "a, b"}, {"choices": "options"})
    assert '"options" for choices must be a list of texts, got text' in message
    assert 'no key "options" for choices' in refused(row, {"choices": "options"})
    assert read({**row, "options": ["free text", "b"]}, {"choices": "options"}).output == "A"


def test_a_configuration_names_choices_and_templates(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        'data: {fields: {instruction: "{q}\\n{c}", output: gold, choices: options}}\n'
        "method: {name: fedavg, rounds: 1}\n"
    )
    fields = load_config(tmp_path / "c.yaml").data.fields
    assert fields == {"instruction": "{q}\n{c}", "output": "gold", "choices": "options"}


def test_an_operator_is_told_of_every_key_that_is_read() -> None:
    config = parse_config({"method": {"name": "fedavg"}}, "test")
    rows = [{"q": "x", "secret": "s", "about": "a", "answer": "b", "options": ["a", "b"]}]
    fields = {"instruction": "{q} {secret}", "input": "about", "output": "answer", "choices": "options"}
    examples = ObjectData.read(rows, fields).examples
    method = registry.build(config.method, config.seed)
    asked = Asked.of(config, method, examples, fields, weights="", signed=False)
    assert asked.fields == ("q", "secret", "about", "answer", "options")


def test_real_multiple_choice(shared_data: Path) -> None:
    for name, fields in (
        ("arc/arc_challenge.jsonl", {"instruction": "query", "output": "gold"}),
        ("mmlu/mmlu_dev.jsonl", {"instruction": "question", "output": "answer", "category": "subject"}),
    ):
        path = shared_data / name
        found = load_examples(str(path), fields=fields)
        for example, line in zip(found, path.read_text().splitlines(), strict=True):
            row = json.loads(line)
            gold = row.get("gold", row.get("answer"))
            assert example.output == (gold if isinstance(gold, str) else "ABCDE"[gold])
            assert example.instruction.endswith(f"\n{'ABCDE'[len(row['choices']) - 1]}. {row['choices'][-1]}")


@pytest.mark.parametrize(
    ("row", "field", "said"),
    [
        (
            {"instruction": "a", "context": "", "response": "b", "category": "c"},
            "output",
            "response",
        ),  # Dolly's
        ({"prompt": "a", "completion": "b"}, "instruction", "prompt"),
        ({"title": "a", "Question": "b", "output": "c"}, "instruction", "Question"),  # the likelier one
        ({"instruction": "a", "outputs": "b"}, "output", "outputs"),  # no usual name: the nearest
    ],
)
def test_a_field_that_is_missing_is_looked_for_under_its_usual_names(
    row: dict[str, str], field: str, said: str
) -> None:
    assert likely(field, field, row) == f' Did you mean "{said}"?'
    message = refused(row, {})
    assert f'no key "{field}" for {field}; ' in message and f'Did you mean "{said}"?' in message


def test_a_key_that_somebody_named_is_held_against_the_keys_that_are_there() -> None:
    assert likely("answr", "output", {"response": "a", "answer": "b"}) == ' Did you mean "answer"?'
    assert likely("zzz", "output", {"response": "a"}) == ""
