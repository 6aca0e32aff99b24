"""Records to examples: which of a record's keys is which field, and what a value may be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from fedtune.data.conversations import Reading, conversations, form_of
from fedtune.data.examples import Example
from fedtune.data.turns import is_turns, kind_of
from fedtune.errors import InputError, nearest

INSTRUCTIONS = Reading("instruction")
FIELDS = ("instruction", "input", "output", "category")
_OPTIONAL = ("input", "category")
_NO_TURNS = (
    "A conversation is read whole, since who speaks at a position differs from row to row: leave instruction "
    "and output out of data.fields, or set data.format to conversation."
)


def check_fields(fields: Mapping[str, str | None], setting: str = "data.fields") -> None:
    """Raises InputError for a field that is none, a null that may not be, or an empty key.

    Args:
        fields: As in `load_examples`.
        setting: What an error calls them.
    """
    for ours, theirs in fields.items():
        if ours not in FIELDS:
            raise InputError(
                f'{setting}: unknown field "{ours}"; the fields are {", ".join(FIELDS)}.'
                f"{nearest(ours, FIELDS)}"
            )
        if theirs is None and ours not in _OPTIONAL:
            raise InputError(f"{setting}: {no_null(ours)}.")
        if theirs == "":
            none = ", or null for none" if ours in _OPTIONAL else ""
            raise InputError(f"{setting}.{ours} is empty; give the key that holds it, or leave it out{none}.")


def check_doubles(fields: Mapping[str, str | None], setting: str) -> None:
    """Raises InputError where one key would be two fields. Arguments are those of `check_fields`."""
    for ours in FIELDS:
        takers = [name for name, key in fields.items() if key == ours != name and name != "category"]
        if ours not in _OPTIONAL and ours not in fields and takers:
            raise InputError(
                f'{setting}.{takers[0]} takes the key "{ours}", which would be the {ours} too; set '
                f"{setting}.{ours} to the key that holds the {ours}."
            )


def no_null(field: str) -> str:
    """What is wrong with a field that must be there and was mapped to null."""
    return (
        f"{field} is null, but every example needs one; name the key that holds it, or leave it out if that "
        f'is "{field}". Only {" and ".join(_OPTIONAL)} can be null, for none'
    )


def examples_from(
    rows: Iterator[tuple[str, Any]],
    fields: Mapping[str, str | None],
    name: str,
    setting: str = "data.fields",
    reading: Reading = INSTRUCTIONS,
) -> list[Example]:
    """Examples from records, each with its place.

    Args:
        rows: (place, record); the place stands in front of an error.
        fields: Our field names to the records' keys, as in `load_examples`.
        name: Of all of them together.
        setting: What an error calls `fields`.
        reading: Whether they are instructions, conversations or plain texts; the first one decides where
            that does not say so. What it came to is said there.

    Raises:
        InputError: There is none, or one does not fit.
    """
    check_fields(fields, setting)
    first = next(rows, None)
    if first is not None:
        form = form_of(reading.format, first[1] if isinstance(first[1], dict) else {}, fields, first[0])
        rows, fields = chain([first], rows), {**form.fields, **fields}
        if form.said:
            reading.said.append(form.said)
        if form.name != "instruction":
            return list(conversations(rows, form, fields.get("category", "category"), reading.trees))
    check_doubles(fields, setting)
    keys = [(field, _plain_key(field, fields)) for field in FIELDS]
    examples, categories = [], dict[str, str]()
    for place, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{place}: a record must be a JSON object, got {kind_of(row)}.")
        values = []
        for field, key in keys:
            value = row.get(key) if key else None
            if type(value) is not str or not _is_unicode(value):
                value = _field(row, field, fields, place, setting)
            values.append(value)
        instruction, about, output, category = values
        category = categories.setdefault(category, category)  # one text for all that have it
        examples.append(Example(instruction, about, output, category))
    if not examples:
        raise InputError(f"{name}: holds no examples; at least one is needed.")
    return examples


def _plain_key(field: str, fields: Mapping[str, str | None]) -> str | None:
    """The key under which a text is the field's, whatever else a record has; None: it has to be looked at."""
    inside = any(key and key.split(".")[0] == field for key in fields.values())
    return None if field in _OPTIONAL and field not in fields and inside else fields.get(field, field)


def _is_unicode(text: str) -> bool:
    """Whether no half of a surrogate pair is in a text: UTF-8 has no form for one."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _field(
    row: dict[str, Any], field: str, fields: Mapping[str, str | None], place: str, setting: str
) -> str:
    key = fields.get(field, field)
    optional = field in _OPTIONAL
    if key is None or (optional and field not in fields and _claimed(row, field, fields)):
        return ""
    found, value, turns = _lookup(row, key)
    if turns:
        what = "holds" if turns == key else f'leads into "{turns}", which holds'
        raise InputError(f'{place}: "{key}" for {field} {what} a conversation. {_NO_TURNS}')
    if not found:
        if optional and field not in fields:
            return ""
        keys = ", ".join(f'"{k}"' for k in row) or "none"
        missing = f'{place}: no key "{key}" for {field}; the keys here are: {keys}.'
        talks = [k for k, held in row.items() if is_turns(held)]
        if talks and not optional:
            raise InputError(f'{missing} "{talks[0]}" holds a conversation. {_NO_TURNS}')
        raise InputError(f"{missing} Set {setting}.{field} to the right one.")
    if value is None and optional:
        return ""  # Arrow writes null for a key that only other rows have
    if isinstance(value, str):
        if not _is_unicode(value):
            raise InputError(f'{place}: "{key}" holds half of a surrogate pair, which is not Unicode text.')
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        hint = f' Name one of its values, such as "{key}.0".' if isinstance(value, list) else ""
        raise InputError(
            f'{place}: "{key}" for {field} must be text or a number, got {kind_of(value)}.{hint}'
        )
    return json.dumps(value)


def _claimed(row: dict[str, Any], name: str, fields: Mapping[str, str | None]) -> bool:
    """Whether another field was given the key `name` of this row, or something inside it."""
    return any(
        key == name or (key not in row and key.split(".")[0] == name) for key in fields.values() if key
    )


def _lookup(row: dict[str, Any], key: str) -> tuple[bool, Any, str]:
    """Finds a key, or a dotted path of keys and list positions.

    Returns:
        (found, value, turns): the last is the part of the path at which a conversation starts, and then there
        is no value; "" where there is none.
    """
    if key in row:
        return True, row[key], key if is_turns(row[key]) else ""
    value: Any = row
    parts = key.split(".")
    for number, part in enumerate(parts, start=1):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isascii() and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False, None, ""
        if is_turns(value):
            return True, None, ".".join(parts[:number])
    return True, value, ""
