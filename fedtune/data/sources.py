"""Where examples come from: files, folders, patterns, Hugging Face data sets, and the set that is bundled.

All go through one mapping of fields and one set of checks, so a bad record is refused with its place wherever
it came from. Nothing remote is run: the `datasets` library reads data files only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from fedtune.data import files
from fedtune.data.examples import Example
from fedtune.data.json_rows import Rows, line_rows
from fedtune.data.opening import check_ordinary, opened
from fedtune.data.places import require_hub_name, say_asking
from fedtune.data.reading import NONE_THERE, Reading
from fedtune.data.records import check_fields, examples_from
from fedtune.data.task_folders import is_task_folder, task_rows
from fedtune.errors import InputError


def load_examples(
    source: str,
    *,
    fields: Mapping[str, str | None],
    split: str = "train",
    base: Path = Path("."),
    setting: str = "data.fields",
    reading: Reading | None = None,
    streamed: int | None = None,
) -> list[Example]:
    """Loads a data set.

    Args:
        source: "bundled"; a file (`files.FORMATS`, text ones also packed); a folder of such files, of
            `save_to_disk`, or of Natural Instructions tasks; a pattern of names, as "parts/*.parquet"; or a
            Hugging Face data set, "owner/name", "owner/name:configuration", and behind it "@revision".
        fields: Our field names to the source's keys; a field that is not named keeps its own name. Dots lead
            into nested objects and, by number, into lists ("answers.text.0"); braces make a template of
            several keys (`fedtune.data.keys`). None for `input`, `category` or `choices`: no example has one,
            whatever keys there are.
        split: Which part of a Hugging Face data set, of a folder or of the bundled set. A file has one part
            only. Of a task folder: a text file with a task's name a line, or "train" for all tasks; with a
            percentage behind it ("test_tasks.txt[2%]") a random part of each task's instances, the same for
            every seed.
        base: The folder that a relative path starts from.
        setting: What an error calls `fields`.
        reading: Whether records are instructions, conversations or plain texts, and whether bad ones are
            skipped (see `examples_from`). Is told what was read and what was skipped.
        streamed: Of a Hugging Face data set: take only so many rows from its start, and keep nothing of it.

    Returns:
        The examples in the source's order, of several files in the order of their names. Numbers become text
        as JSON writes them. An absent key of `input` or `category` reads as "" unless `fields` names it; a
        null there always does. So does a key that another field was given: no text stands twice in an example
        unless `fields` says so. Of a task: definition and input, the first output, and the task's name as
        category.

    Raises:
        InputError: The source is missing, unreadable or empty, or a record does not fit, with file and line.
    """
    check_fields(fields, setting)
    account = reading if reading is not None else Reading("instruction")
    account.kinds.clear()
    parts, about = _parts(source, split, base, streamed)
    found, empty = list[Example](), list[str]()
    for name, kind, rows in parts:
        before = len(account.skipped)
        part = examples_from(rows, fields, name, setting, account)
        account.kinds[kind] += len(part) + len(account.skipped) - before
        if not part:
            empty.append(name)
        found += part
    if not found:
        raise InputError(f"{about.name}: {NONE_THERE}")
    account.line(_said(about, empty))
    return found


Part = tuple[str, str, Rows]  # what a part of a source is called, its format, its rows


class _About:
    """What a source is, for the line that is said of it."""

    def __init__(self, name: str, *, files: int = 0, left: list[str] | None = None) -> None:
        self.name, self.files, self.left = name, files, left or []


def _parts(source: str, split: str, base: Path, streamed: int | None) -> tuple[Iterator[Part], _About]:
    """The parts of a source, each with its rows, and what the source is."""
    path, name = base / source, str(base / source)
    if streamed is not None and (source == "bundled" or files.is_here(source, base)):
        raise InputError(f"data.streaming is for data sets of the Hugging Face hub, and {source} is here")
    if source == "bundled":
        return iter([("bundled", "JSON Lines", _bundled_rows(split))]), _About("the bundled set")
    if path.is_dir():
        return _folder_parts(path, split, base)
    if files.is_pattern(source, base):
        fits = files.matching(source, base)
        folder = next((one for one in fits if one.is_dir()), None)
        if folder is not None:
            raise InputError(
                f"{name}: it fits the folder {folder}; a pattern stands for files (with data.clients: files "
                "also for a folder a client)."
            )
        if not fits:
            raise InputError(f"{name}: nothing fits this pattern. Paths start from {base.resolve()}.")
        return (_file_part(one, split) for one in fits), _About(name, files=len(fits))
    if files.format_of(source) or path.exists() or path.is_symlink():
        check_ordinary(path)
        return iter([_file_part(path, split)]), _About(name)
    called, _, revision = source.partition("@")
    require_hub_name(called.partition(":")[0], base, "data set", ["bundled"])
    about = _About(f'data set "{source}"')
    return iter([(about.name, "the hub", _hub_rows(source, split, revision, streamed))]), about


def _folder_parts(path: Path, split: str, base: Path) -> tuple[Iterator[Part], _About]:
    from fedtune.data.tables import saved_rows, saved_splits

    name = str(path)
    if saved_splits(path) is not None:
        return iter([(name, "a saved data set", saved_rows(path, split))]), _About(name)
    if is_task_folder(path):
        return iter([(name, "Natural Instructions", task_rows(path, split, base))]), _About(name)
    found = files.files_in(path, split)
    left = []
    if found.other_splits:
        left.append(f"of other splits: {_names(path, found.other_splits)}")
    if found.others:
        left.append(f"of no known format: {_some(found.others)}")
    return (_file_part(one, "train") for one in found.files), _About(name, files=len(found.files), left=left)


def _file_part(file: Path, split: str) -> Part:
    return str(file), files.format_of(file.name) or "", files.rows_in(file, split)


def _names(folder: Path, found: tuple[Path, ...]) -> str:
    return _some(tuple(str(one.relative_to(folder)) for one in found))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _said(about: _About, empty: list[str]) -> str:
    line = f"from {about.name}"
    line += f" ({about.files} file{'s' * (about.files > 1)})" if about.files else ""
    line += f"; {len(empty)} hold no rows: {_some(empty)}" if empty else ""
    return line + "".join(f"; not read, {what}" for what in about.left)


def has_parts(folder: Path) -> bool:
    """Whether a folder is one data set as it was saved, or one of tasks, and no collection of files."""
    if not folder.is_dir():
        return False
    from fedtune.data.tables import saved_splits

    return saved_splits(folder) is not None or is_task_folder(folder)


def held_out_split(source: str, base: Path = Path(".")) -> str:
    """The part of a held-out source that is meant where none is named: `test` where there are parts."""
    path = base / source
    if source == "bundled":
        return "test"
    if path.is_dir():
        from fedtune.data.tables import saved_splits

        splits = saved_splits(path)
        if splits is not None or is_task_folder(path):
            return "test" if splits != [] else "train"
        there = [files.part_of(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
        return "test" if "test" in there else "train"
    return "train" if files.format_of(source) or files.is_here(source, base) else "test"


def count_records(place: Path) -> int:
    """Records of a file or a folder, whatever keys they have. Raises InputError if it cannot be read."""
    return sum(1 for _, _, rows in _parts(str(place.absolute()), "train", Path("."), None)[0] for _ in rows)


def bundled_examples(part: str = "train", *, fields: Mapping[str, str | None] | None = None) -> list[Example]:
    """Loads the data set that comes with the package, without network.

    Args:
        part: "train" or "test".
        fields: As in `load_examples`.

    Raises:
        InputError: There is no such part, or the installed package lacks the file.
    """
    return examples_from(_bundled_rows(part), fields or {}, f"bundled_{part}.jsonl")


def _bundled_rows(part: str) -> Rows:
    if part not in ("train", "test"):
        raise InputError(f'the bundled data set has no split "{part}"; it has "train" and "test".')
    file = resources.files("fedtune.data") / f"bundled_{part}.jsonl"
    if not file.is_file():
        raise InputError(f"the bundled data file {file.name} is not installed; install fedtune again.")
    with opened(file, file.name) as stream:
        yield from line_rows(stream, file.name)


def _hub_rows(source: str, split: str, revision: str, streamed: int | None) -> Rows:
    import datasets  # heavy, and needed for this kind of source alone

    name, _, configuration = source.partition("@")[0].partition(":")
    how: dict[str, Any] = {"revision": revision} if revision else {}
    how |= {"streaming": True} if streamed is not None else {}
    say_asking(f'data set "{source}"')
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, **how)
        for number, row in enumerate(rows if streamed is None else islice(rows, streamed)):
            yield f'data set "{source}", row {number}', row
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # in this order: the network or an unknown name; a split or configuration; a script; damaged files
        reason = " ".join(str(error).split())
        raise InputError(
            f'the data set "{source}" (split "{split}") could not be loaded from the Hugging Face hub: '
            f"{reason} Check the name and the network, or give a file. "
            f'Configuration and revision are written "owner/name:configuration@revision".'
        ) from error
