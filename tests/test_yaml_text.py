"""YAML of any shape: what is written is read back; what else is read is a value or one short error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config.file import parse_config
from fedtune.config.schema import RunConfig
from fedtune.config.yaml_text import dump_yaml, load_yaml, read_yaml
from fedtune.errors import InputError

AMBIGUOUS = (
    *(
        "1e-4",
        "1E5",
        ".5",
        "1_000",
        "0x10",
        "0o7",
        "017",
        "1:30",
        "2001-01-01",
        "2001-01-01 01:02:03",
        "-",
        "?",
    ),
    *(
        "yes",
        "No",
        "on",
        "OFF",
        "null",
        "~",
        "true",
        ".inf",
        "-.inf",
        ".nan",
        "=",
        "<<",
        "!",
        "&a",
        "*a",
        "|",
        ">",
    ),
    *(
        "",
        " ",
        "a: b",
        "- a",
        "#",
        "a #b",
        "'",
        '"',
        "\\",
        "%",
        "@",
        "`",
        "\t",
        "\n",
        "a\nb\n",
        "\x00",
        "\x85",
    ),
    *(
        "\u2028",
        "\ufeff",
        "é",
        "日本",
        "😀",
        "{",
        "}",
        "[",
        "]",
        ",",
        "---",
        "...",
        "!!python/object:os.system",
    ),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(AMBIGUOUS)
NUMBERS = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False)
PLAIN = st.recursive(
    TEXTS | NUMBERS | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
SIGNS = st.lists(st.sampled_from([*AMBIGUOUS, *":-,[]{}&*!|>'\"%@`?# \n\t", "\n  ", ": ", "- "]), max_size=30)
SETTINGS = ("seed", "model", "data", "method", "federation", "evaluation", "transport", "checkpoints")


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


def value_or_error(text: str) -> Any:
    try:
        return load_yaml(text, "file.yaml")
    except InputError as error:
        assert str(error).startswith("file.yaml: ") and len(str(error)) < 400 and "\n" not in str(error)
        return None


@settings(max_examples=400, deadline=None)
@given(PLAIN)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert same(load_yaml(dump_yaml(value), ""), value)


@settings(max_examples=400, deadline=None)
@given(SIGNS)
def test_a_text_of_signs_is_a_value_or_a_short_error(signs: list[str]) -> None:
    value_or_error("".join(signs))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_where_the_library_gives_plain_values_ours_are_the_same_but_for_numbers(text: str) -> None:
    try:
        theirs = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        theirs = None
    found = value_or_error(text)
    if isinstance(theirs, str) and not isinstance(found, float | None):
        assert found == theirs


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80) | SIGNS.map(lambda signs: "".join(signs).encode()))
def test_a_file_of_any_bytes_is_settings_or_an_error(tmp_path_factory: Any, content: bytes) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "any.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(read_yaml(path), dict)
    except InputError as error:
        assert str(path) in str(error) and len(str(error)) < 400 + len(str(path))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from(SETTINGS), PLAIN | st.dictionaries(TEXTS, PLAIN, max_size=3), max_size=3)
)
def test_a_document_of_any_values_is_a_configuration_or_an_error(document: dict[str, Any]) -> None:
    try:
        assert isinstance(parse_config(document, "c.yaml"), RunConfig)
    except InputError as error:
        assert all(line.startswith("c.yaml: ") for line in str(error).splitlines())
