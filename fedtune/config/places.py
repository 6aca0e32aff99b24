"""Where a run's inputs are: relative names made absolute, and inputs that were moved named anew."""

from __future__ import annotations

import json
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

from fedtune.config.data import CLIENTS, OBJECTS
from fedtune.config.file import apply_overrides, parse_config
from fedtune.config.schema import RunConfig
from fedtune.data.files import is_pattern
from fedtune.errors import InputError

# Where the same thing may be another time. What it is, a digest says.
MOVABLE = ("model.name", "data.train", "data.holdout.source", "data.partition.path")
_PLACES = (
    *MOVABLE,
    "data.public.source",
    "evaluation.task_folder",
    "evaluation.data_folder",
    "model.adapter",
)
_TASK_LISTS = ("data.split", "data.holdout.split", "data.public.split")  # where a split is a file
CACHES = (BESIDE, NONE) = ("beside", "none")  # of data.cache; everything else is a folder
_WORDS = ("bundled", CLIENTS, OBJECTS)


def located(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths in place of relative ones, so that it means the same anywhere.

    What is nothing in the working folder stays as it is: `bundled`, a name of the hub.
    """
    document = config.resolved()
    for setting in _PLACES + _TASK_LISTS:
        block, key = _inside(document, setting)
        if block is not None and isinstance(name := block.get(key), str) and name not in _WORDS:
            block[key] = _absolute_list(name) if setting in _TASK_LISTS else _absolute(name)
    cache = document["data"]["cache"]
    if cache not in CACHES:
        document["data"]["cache"] = str(Path(cache).expanduser().absolute())
    files = document["evaluation"]["files"]
    files.update({task: _absolute(name) for task, name in files.items()})
    if document == config.resolved():
        return config
    if config.checkpoints.rollback is not None:  # no property of a run, and not in its document
        document["checkpoints"]["rollback"] = config.checkpoints.rollback
    return parse_config(document, "the configuration")


def moved(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A run's configuration with other places for its inputs.

    Args:
        config: The run's.
        overrides: `key=value`, as in "model.name=/data/base".

    Raises:
        InputError: One of them is no place: what a run is does not change any more.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key not in MOVABLE:
            raise InputError(
                f"{override}: a run has its settings; only where its inputs are now can be said: "
                f"{', '.join(MOVABLE)}"
            )
    document = config.resolved()
    if any(override.startswith("model.name=") for override in overrides):
        document["model"]["revision"] = None  # of the place that it had
    apply_overrides(document, overrides)
    return located(parse_config(document, "the run"))


def places(own: RunConfig, config: RunConfig) -> list[str]:
    """What `moved` took to make the one configuration into the other, a `key=value` each."""
    its, now = (_places(each.resolved()) for each in (own, config))
    return [f"{setting}={json.dumps(name)}" for setting, name in now.items() if its.get(setting) != name]


def _places(document: dict[str, Any]) -> dict[str, str]:
    found = {}
    for setting in MOVABLE:
        block, key = _inside(document, setting)
        if block is not None and isinstance(name := block.get(key), str):
            found[setting] = name
    return found


def without_places(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration but for where inputs, caches and simulated clients are, and who is told."""
    document = located(config).resolved()
    del document["data"]["cache"], document["model"]["revision"], document["tracking"]
    if config.transport.name != "flower":
        del document["transport"]
    for setting in _places(document):
        block, key = _inside(document, setting)
        assert block is not None
        block[key] = ""
    return document


def _inside(document: dict[str, Any], setting: str) -> tuple[dict[str, Any] | None, str]:
    """The block that a dotted setting is in, if there is one, and its own name."""
    *blocks, key = setting.split(".")
    for name in blocks:
        inner = document.get(name)
        if not isinstance(inner, dict):
            return None, key
        document = inner
    return document, key


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    if is_pattern(name, Path(".")):
        return str(path if path.is_absolute() else Path(escape(str(Path.cwd()))) / path)
    return str(path.absolute()) if name and path.exists() else name


def _absolute_list(split: str) -> str:
    """A list of tasks may have a percentage behind it."""
    file, bracket, part = split.partition("[")
    return _absolute(file) + bracket + part if Path(file).is_file() else split
