"""Local JSON Lines files as data sets of lm-evaluation-harness, for the YAML tasks in `harness_tasks`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from fedtune.errors import InputError
from fedtune.evaluation.rows import read_rows


def load(
    *,
    files: Mapping[str, str | list[str]],
    fields: Sequence[str],
    data_folder: str | None = None,
    where: Mapping[str, str] | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """A task's splits; the harness calls this with a task's `dataset_kwargs` and `metadata` together.

    Args:
        files: Of each split one file or several in a row, relative to the data folder.
        fields: What each line must have.
        data_folder: `evaluation.data_folder`, or `lm_eval run --metadata '{"data_folder": ...}'`.
        where: Only lines with these values.

    Raises:
        InputError: No folder or file, or a line that is not JSON or lacks a field.
    """
    if data_folder is None:
        raise InputError(
            f"it reads {', '.join(map(str, files.values()))}: set evaluation.data_folder to their folder"
        )
    found = {}
    for split, names in files.items():
        rows: list[dict[str, Any]] = []
        for name in [names] if isinstance(names, str) else names:
            rows += _rows(Path(data_folder) / name, tuple(fields))
        wanted = (where or {}).items()
        kept = [row for row in rows if all(row[field] == value for field, value in wanted)]
        if not kept:
            raise InputError(f"no lines of {names} in {data_folder} are {dict(wanted)}")
        found[split] = Dataset.from_list(kept)
    return found


@functools.lru_cache(maxsize=8)  # MMLU's subjects share two files
def _rows(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"no such file: {path}; see evaluation.data_folder")
    found = read_rows(path, dict.fromkeys(fields, object), limit=None, task="of lm-evaluation-harness")
    return [{field: row[field] for field in fields} for row in found]
