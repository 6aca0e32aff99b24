"""Names of the tasks of lm-evaluation-harness, read from its files without importing it.

The harness has some 14,000 task files and reads all of them before it knows a name, which takes many seconds.
A configuration is checked far more often than such a task is run, so names are found here as text. What is
found is slightly more than what there is; loading a task has the last word.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from fedtune.errors import InputError

LOCAL_TASKS = Path(__file__).with_name("harness_tasks")

_NAME = r"""["']?([\w.:+()-]+)["']?"""
_NAMED = re.compile(rf"""^\s*(?:-\s+)?(?:\{{\s*)?["']?(?:task|group|tag)["']?\s*:\s*{_NAME}""", re.MULTILINE)
_LISTED = re.compile(rf"^\s*-\s+{_NAME}\s*(?:#.*)?$", re.MULTILINE)  # tags and members of groups


def installed() -> bool:
    """Whether the harness is there."""
    return importlib.util.find_spec("lm_eval") is not None


def known_names(task_folder: str | None) -> frozenset[str]:
    """Names of tasks, groups and tags: the harness's, fedtune's on local files, and those of a folder.

    Raises:
        InputError: The folder is missing, or a file in it is not YAML.
    """
    folder = None if task_folder is None else Path(task_folder)
    if folder is not None:
        _check(folder)
    return _default_names() | _names(LOCAL_TASKS) | (_names(folder) if folder else frozenset())


def _check(folder: Path) -> None:
    """The harness passes over files that it cannot read; a user's own should not go missing silently."""
    if not folder.is_dir():
        raise InputError(f"evaluation.task_folder: no such folder: {folder}")
    for path in sorted(folder.rglob("*.yaml")):
        try:
            for _ in yaml.parse(path.read_text(encoding="utf-8")):  # functions in it stay names
                pass
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(
                f"evaluation.task_folder: {path}: not YAML: {' '.join(str(error).split())}"
            ) from None


@functools.cache
def _default_names() -> frozenset[str]:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    return _names(Path((spec.submodule_search_locations or [""])[0]) / "tasks")


def _names(folder: Path) -> frozenset[str]:
    found: set[str] = set()
    for path in _task_files(folder):
        text = path.read_text(encoding="utf-8", errors="replace")
        found.update(_NAMED.findall(text), _LISTED.findall(text))
    return frozenset(found)


def _task_files(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder):
        for name in names:
            if name.endswith("yaml") or "." not in name:  # shared parts are without the dot, or any ending
                yield Path(where, name)
