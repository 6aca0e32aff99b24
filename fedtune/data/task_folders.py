"""Folders of Natural Instructions tasks (Wang et al. 2022), one .json file a task."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.data.json_rows import Rows, whole_document
from fedtune.data.opening import readable
from fedtune.errors import InputError, nearest


def is_task_folder(folder: Path) -> bool:
    """Whether the first .json file of a folder is a task, damaged or not."""
    with readable(str(folder)):
        first = min(folder.glob("*.json"), default=None)
    if first is None:
        return False
    if not first.is_file():
        return False  # a pipe or a folder; who reads it says so
    with readable(str(first)):
        content = first.read_bytes()
    return content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and b'"Instances"' in content


def task_rows(folder: Path, split: str, base: Path) -> Rows:
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
        content = whole_document(files[task])
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
    with readable(str(path)):
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
