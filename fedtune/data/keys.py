"""What stands in `data.fields`: a key of a row, a path into it, or a small template of several.

A key that a row has is that key, whatever it looks like. Otherwise dots lead into nested objects and, by
number, into lists (`answers.text.0`); a part in double quotes is a key with dots in it (`meta."site.id"`).
What has braces is a template: `{question}` stands for the text of that key or path, and `{{` for a brace.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any

from fedtune.errors import InputError, nearest

OTHER_NAMES = {  # of our fields in data sets that many train on, the likeliest first
    "instruction": ("question", "prompt", "query", "problem", "sentence", "text", "title"),
    "output": (
        "response",
        "answer",
        "completion",
        "target",
        "targets",
        "label",
        "solution",
        "summary",
        "chosen",
    ),
}

_PARTS = re.compile(r'"((?:[^"]|"")*)"(?=\.|$)|([^.]*)')
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@lru_cache(maxsize=1024)
def parts_of(key: str) -> tuple[str, ...]:
    """The parts of a path: `meta."site.id".0` has three."""
    parts, at = [], 0
    while True:
        found = _PARTS.match(key, at)
        assert found is not None  # the second half fits anything
        parts.append(found[2] if found[1] is None else found[1].replace('""', '"'))
        if found.end() == len(key):
            return tuple(parts)
        at = found.end() + 1


@lru_cache(maxsize=1024)
def template_of(key: str) -> tuple[tuple[str, str], ...]:
    """A template's pieces in order: (text, "") or ("", key). Empty if it is a key or a path.

    Raises:
        InputError: A brace has no partner, or holds no key.
    """
    if "{" not in key and "}" not in key:
        return ()
    pieces, at = [], 0
    for found in _BRACES.finditer(key):
        if found.start() > at:
            pieces.append((key[at : found.start()], ""))
        at = found.end()
        if found[0] in ("{{", "}}"):
            pieces.append((found[0][0], ""))
        elif found[1] is None:
            raise InputError(
                f'"{key}": a single {found[0]} stands for nothing; a key is written {{key}}, and a brace '
                f"{found[0] * 2}"
            )
        elif not found[1].strip():
            raise InputError(f'"{key}": name a key between the braces, as in {{question}}')
        else:
            pieces.append(("", found[1].strip()))
    return (*pieces, (key[at:], "")) if at < len(key) else tuple(pieces)


def names_in(key: str) -> tuple[str, ...]:
    """The keys and paths that are read for a field: of a template those in braces, else the key itself."""
    return tuple(name for _, name in template_of(key) if name) if "{" in key or "}" in key else (key,)


def likely(key: str, field: str, row: Mapping[str, Any]) -> str:
    """' Did you mean "x"?' for the key of a row that a field most likely stands under, or an empty string.

    Args:
        key: What was looked for.
        field: The field's name; where `key` is that too, nobody said what it is called here.
        row: What there is.
    """
    lower = {str(name).lower(): str(name) for name in reversed(list(row))}
    usual = OTHER_NAMES.get(field, ()) if key == field else ()
    known = next((lower[name] for name in usual if name in lower), None)
    return f' Did you mean "{known}"?' if known else nearest(key, map(str, row))


def reads(key: str, name: str, row: Mapping[str, Any] | None = None) -> bool:
    """Whether a field's key takes the text that stands under `name`, or something inside it.

    Args:
        key: As in `data.fields`.
        name: A key of a row.
        row: The row, if one is known.
    """
    if row is not None and key in row:
        return key == name
    return any(
        one == name or (not (row is not None and one in row) and parts_of(one)[0] == name)
        for one in names_in(key)
    )


def text_of(value: Any) -> str | None:
    """A value as text: numbers, true and false as JSON has them, times as ISO 8601; None of anything else."""
    if isinstance(value, str):
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return json.dumps(value) if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return format(value, "f") if value.is_finite() else None
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    return str(value) if isinstance(value, timedelta) else None
