"""Where examples come from: files, folders of tasks, Hugging Face data sets, and the set that is bundled.

All go through one mapping of fields and one set of checks, so a bad record is refused with its place wherever
it came from. Nothing remote is run: the `datasets` library reads data files only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from fedtune.data.conversations import Reading
from fedtune.data.examples import Example
from fedtune.data.places import require_hub_name, say_asking
from fedtune.data.records import INSTRUCTIONS, check_doubles, check_fields, examples_from
from fedtune.errors import InputError, nearest

_FILE_SUFFIXES = (".jsonl", ".json")


def load_examples(
    source: str,
    *,
    fields: Mapping[str, str | None],
    split: str = "train",
    base: Path = Path("."),
    setting: str = "data.fields",
    reading: Reading = INSTRUCTIONS,
) -> list[Example]:
    """Loads a data set.

    Args:
        source: "bundled"; a path that ends in .jsonl (one object a line) or .json (an array of objects, or
            one object a line); a folder of Natural Instructions task files, one .json a task; or the name of
            a Hugging Face data set, "owner/name" or "owner/name:configuration".
        fields: Our field names to the source's keys; a field that is not named keeps its own name. Dots lead
            into nested objects and, by number, into lists ("answers.text.0"). None for `input` or `category`:
            no example has one, whatever keys there are.
        split: Which part of a Hugging Face data set or of the bundled one. A file has one part only. Of a
            task folder: a text file with a task's name a line, or "train" for all tasks; with a percentage
            behind it ("test_tasks.txt[2%]") a random part of each task's instances, the same for every seed.
        base: The folder that a relative path starts from.
        setting: What an error calls `fields`.
        reading: Whether records are instructions, conversations or plain texts; see `examples_from`.

    Returns:
        The examples in the source's order. Numbers become text as JSON writes them. An absent key of `input`
        or `category` reads as "" unless `fields` names it; a null there always does. So does a key that
        another field was given: no text stands twice in an example unless `fields` says so. Of a task:
        definition and input, the first output, and the task's name as category.

    Raises:
        InputError: The source is missing, unreadable or empty, or a record does not fit, with file and line.
    """
    check_fields(fields, setting)
    check_doubles(fields, setting)
    if source == "bundled":
        return bundled_examples(split, fields=fields)
    path = base / source
    if source.endswith(_FILE_SUFFIXES):
        if split != "train":
            raise InputError(f'{path}: a file has no split "{split}"; give the file of that part.')
        if not path.is_file():
            what = "is not a file" if path.exists() else "there is no such file"
            raise InputError(f"{path}: {what}. Paths start from {base.resolve()}.")
        return examples_from(_file_rows(path, str(path)), fields, str(path), setting, reading)
    if path.is_dir():
        return examples_from(_task_rows(path, split, base), fields, str(path), setting)
    if path.exists():
        raise InputError(f"{path}: this is a local path, and only files ending in .jsonl or .json are read.")
    require_hub_name(source.partition(":")[0], base, "data set", ["bundled"])
    rows = _hub_rows(source, split)
    return examples_from(rows, fields, f'data set "{source}"', setting, reading)


def count_records(file: Path) -> int:
    """Records of a .jsonl or .json file, whatever keys they have. Raises InputError if it cannot be read."""
    return sum(1 for _ in _file_rows(file, str(file)))


def bundled_examples(part: str = "train", *, fields: Mapping[str, str | None] | None = None) -> list[Example]:
    """Loads the data set that comes with the package, without network.

    Args:
        part: "train" or "test".
        fields: As in `load_examples`.

    Raises:
        InputError: There is no such part, or the installed package lacks the file.
    """
    if part not in ("train", "test"):
        raise InputError(f'the bundled data set has no split "{part}"; it has "train" and "test".')
    file = resources.files("fedtune.data") / f"bundled_{part}.jsonl"
    if not file.is_file():
        raise InputError(f"the bundled data file {file.name} is not installed; install fedtune again.")
    return examples_from(_file_rows(file, file.name), fields or {}, file.name)


def _file_rows(file: Path | Traversable, name: str) -> Iterator[tuple[str, Any]]:
    """Yields (place, decoded value) for each record of a JSON Lines or JSON file; blank lines are skipped."""
    with _readable(name), file.open("rb") as lines:
        if name.endswith(".json"):
            start = lines.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()
            lines.seek(0)
            if start.startswith(b"["):
                yield from _array_rows(lines.read(), name)
                return
        # lines end at line feeds only: str.splitlines would also cut at U+2028, which JSON allows in text
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line := line.strip():
                yield f"{name}:{number}", _decoded(line, name, number)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}.") from error


def _array_rows(content: bytes, name: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_decoded(content.removeprefix(b"\xef\xbb\xbf"), name, 1), start=1):
        yield f"{name}: item {number}", row


def _decoded(text: bytes, name: str, first_line: int) -> Any:
    """Decodes one JSON text that starts at `first_line` of the file."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = first_line + text.count(b"\n", 0, error.start)
        raise InputError(f"{name}:{line}: not UTF-8 text; save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(
            f"{name}:{line}: not valid JSON: {error.msg} at column {error.colno}. "
            "Each line must be one JSON object."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or endless nesting
        raise InputError(f"{name}:{first_line}: JSON that cannot be read: {error}.") from error


def _task_rows(folder: Path, split: str, base: Path) -> Iterator[tuple[str, Any]]:
    """The instances of a folder of Natural Instructions tasks (Wang et al. 2022), one file a task."""
    parsed = re.fullmatch(r"(.+?)(?:\[(\d+(?:\.\d+)?)%\])?", split)
    if parsed is None or not 0 < float(parsed[2] or 100) <= 100:
        raise InputError(
            f'{folder}: the split must be "FILE" or "FILE[P%]" with 0 < P <= 100, got "{split}".'
        )
    files = {file.stem: file for file in sorted(folder.glob("*.json"))}
    if not files:
        raise InputError(
            f"{folder}: this folder has no .json file; give a .jsonl file, or a folder of task files."
        )
    tasks = list(files) if parsed[1] == "train" else _listed(base / parsed[1], files, folder)
    for task in tasks:
        name = str(files[task])
        with _readable(name), files[task].open("rb") as file:
            content = _decoded(file.read().removeprefix(b"\xef\xbb\xbf"), name, 1)
        if not isinstance(content, dict) or not isinstance(content.get("Instances"), list):
            raise InputError(f'{name}: not a task of Natural Instructions: it has no list "Instances".')
        definition, instances = _first(content.get("Definition")), content["Instances"]
        for number in part_of_task(task, len(instances), float(parsed[2] or 100)):
            row = instances[number]
            if isinstance(row, dict):
                row |= {"instruction": definition, "output": _first(row.get("output")), "category": task}
            yield f"{name}: instance {number + 1}", row


def _listed(path: Path, files: Mapping[str, Path], folder: Path) -> list[str]:
    """The tasks that a list names, one a line, in its order."""
    if not path.is_file():
        raise InputError(
            f'{folder}: its split must be "train" for all tasks or a file that lists tasks; there '
            f"is no file {path}."
        )
    with _readable(str(path)):
        # a name that is damaged by another encoding is one that no file has
        text = path.read_text(encoding="utf-8", errors="replace")
    names = [line.strip() for line in text.splitlines() if line.strip()]
    for number, name in enumerate(names, start=1):
        if name not in files:
            raise InputError(f'{path}: {folder} has no task "{name}".{nearest(name, files)}')
        if name in names[: number - 1]:
            raise InputError(f'{path}: the task "{name}" is listed twice.')
    return names


def part_of_task(task: str, count: int, percent: float) -> list[int]:
    """Which instances are taken, in order: by rank of a hash, so that every run takes the same."""
    wanted = min(count, max(1, round(count * percent / 100)))
    ranked = sorted(range(count), key=lambda i: hashlib.sha256(f"{task} {i}".encode()).digest())
    return sorted(ranked[:wanted])


def _first(value: Any) -> Any:
    """The first of a list: later versions of the data write definitions and outputs as lists."""
    if isinstance(value, list):
        return value[0] if value else None
    return value


def _hub_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets  # heavy, and needed for this kind of source alone

    name, _, configuration = source.partition(":")
    say_asking(f'data set "{source}"')
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # in this order: the network or an unknown name; a split or configuration; a script; damaged files
        reason = " ".join(str(error).split())
        raise InputError(
            f'the data set "{source}" (split "{split}") could not be loaded from the Hugging Face hub: '
            f"{reason} Check the name and the network, or give a .jsonl file. "
            f'A configuration is written "owner/name:configuration".'
        ) from error
    for number, row in enumerate(rows):
        yield f'data set "{source}", row {number}', row
