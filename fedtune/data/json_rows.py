"""Rows of JSON: a line each, an array, or an object that holds the array under one of its keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fedtune.data.opening import LINE, lines_of, not_utf8, opened, refuse_other_encoding, rest_of
from fedtune.data.turns import is_turns
from fedtune.errors import InputError

Rows = Iterator[tuple[str, Any]]
"""(place, row); in place of a row that cannot be read the InputError that says so."""

_MARK = b"\xef\xbb\xbf"


def line_rows(stream: IO[bytes], name: str) -> Rows:
    """A row a line; blank lines are skipped."""
    yield from _rows_of(lines_of(stream, name), name)


def document_rows(stream: IO[bytes], name: str, split: str) -> Rows:
    """The rows of a .json file: an array, an object that holds it, one row over several lines, or lines.

    Args:
        stream: The file.
        name: What it is called.
        split: Which array is taken of an object that holds several, by its key.

    Raises:
        InputError: It is none of these.
    """
    begun = list[bytes]()  # up to the second line that is not blank, or the first that has no end
    while sum(map(bool, map(bytes.strip, begun))) < 2 and (line := stream.readline(LINE)):
        if not begun:
            refuse_other_encoding(line, name)
            line = line.removeprefix(_MARK)
        begun.append(line)
        if not line.endswith(b"\n") or line.lstrip().startswith(b"["):
            break
    filled = [line for line in begun if line.strip()]
    if not filled:
        return
    several = len(filled) == 2 and isinstance(_tried(filled[0]) or _tried(filled[1]), dict)
    if several or not filled[0].lstrip().startswith((b"[", b"{")):
        _refuse_split(name, split)
        yield from _rows_of(lines_of(stream, name, begun), name)
        return
    whole = rest_of(stream, name, b"".join(begun))
    document = decoded(whole, name, 1)
    if isinstance(document, list):
        _refuse_split(name, split)
        for number, row in enumerate(document, start=1):
            yield f"{name}: item {number}", row
        return
    key = _key_of_rows(document, name, split)
    if key is None:
        _refuse_split(name, split)
        yield f"{name}:1", document
        return
    for number, row in enumerate(document[key], start=1):
        yield f"{name}: {key}, item {number}", row


def _rows_of(lines: Iterator[tuple[int, bytes]], name: str) -> Rows:
    for number, line in lines:
        if line := line.strip():
            place = f"{name}:{number}"
            try:
                yield place, decoded(line, name, number)
            except InputError as error:
                yield place, error


def _tried(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _key_of_rows(document: dict[str, Any], name: str, split: str) -> str | None:
    """The key under which an object holds its rows; None if the object is a row itself."""
    lists = [
        key
        for key, value in document.items()
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
        if not is_turns(value)
    ]
    if split in lists:
        return split
    if len(lists) == 1 and split == "train":
        return lists[0]
    if lists:
        raise InputError(
            f'{name}: it holds rows under {", ".join(lists)}, and under no key "{split}"; say which ones: '
            f"the split {lists[0]}"
        )
    return None


def _refuse_split(name: str, split: str) -> None:
    if split != "train":
        raise InputError(f'{name}: a file has no split "{split}"; give the file of that part.')


def decoded(text: bytes, name: str, first_line: int) -> Any:
    """Decodes one JSON text that starts at `first_line` of the file."""
    try:
        return json.loads(text.removeprefix(_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        line = first_line + text.count(b"\n", 0, error.start)
        raise InputError(f"{name}:{line}: {not_utf8(error.object, error.start)}.") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(
            f"{name}:{line}: not valid JSON: {error.msg} at column {error.colno}. "
            "Each line must be one JSON object."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or endless nesting
        raise InputError(f"{name}:{first_line}: JSON that cannot be read: {error}.") from error


def whole_document(file: Path) -> Any:
    """The JSON of a small file that fedtune or a library wrote, or a task file."""
    with opened(file, str(file)) as stream:
        return decoded(rest_of(stream, str(file), b""), str(file), 1)
