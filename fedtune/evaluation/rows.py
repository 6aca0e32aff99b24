"""Data files of tasks: JSON Lines with known fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.errors import InputError

Fields = Mapping[str, type | tuple[type, ...]]


def read_rows(path: Path, fields: Fields, *, limit: int | None, task: str) -> list[dict[str, Any]]:
    """The objects of a file, the first `limit` of them.

    Args:
        path: One JSON object a line; empty lines do not count.
        fields: What each object must have, and the type or types of each.
        limit: None: all.
        task: Named in errors.

    Raises:
        InputError: No JSON, no objects, or a field that is missing or of another type.
    """
    found: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also break at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(found) == limit:
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from None
        _check(row, fields, f"{path}, line {number}", task)
        found.append(row)
    if not found:
        raise InputError(f"{path} has no examples for task {task}")
    return found


def _check(row: Any, fields: Fields, where: str, task: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where}: task {task} needs an object on each line, got {type(row).__name__}")
    for name, kinds in fields.items():
        wanted = kinds if isinstance(kinds, tuple) else (kinds,)
        if name not in row:
            raise InputError(
                f"{where}: task {task} needs the fields {', '.join(fields)}; {name} is missing"
                f" (there are {', '.join(map(str, row)) or 'none'})"
            )
        if not isinstance(row[name], wanted) or (
            isinstance(row[name], bool) and not {bool, object} & set(wanted)
        ):
            names = " or ".join(kind.__name__ for kind in wanted)
            raise InputError(f"{where}: {name} must be {names} for task {task}, got {row[name]!r}")
