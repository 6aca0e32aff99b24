"""Configuration files: dotted overrides, and errors that name the setting."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from fedtune.config.other_names import OTHER_NAMES
from fedtune.config.partitions import partition_class
from fedtune.config.schema import RunConfig
from fedtune.config.yaml_text import dump_yaml, load_yaml, read_yaml
from fedtune.core.settings import Settings
from fedtune.data.partition import PARTITIONERS
from fedtune.errors import InputError, foreign, nearest, short
from fedtune.methods import registry


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, applies `key=value` overrides with dotted keys, and checks the whole.

    Raises:
        InputError: The file is missing or not YAML, or a setting is unknown, of a wrong type or out of
            range. The message names every such setting and, for an unknown one, the nearest known.
    """
    document = read_yaml(path)
    apply_overrides(document, overrides)
    return parse_config(document, str(path))


def dump_config(config: RunConfig) -> str:
    """The YAML of a resolved configuration, which `load_config` reads back as an equal one."""
    return dump_yaml(config.resolved())


def dump_settings(config: RunConfig) -> str:
    """The YAML of what a configuration sets, defaults left out; it too is read back as an equal one."""
    return dump_yaml(config.model_dump(mode="json", exclude_unset=True))


def parse_config(document: Mapping[str, Any], source: str) -> RunConfig:
    """The configuration in a mapping; `source` stands in front of each error. Raises InputError."""
    values, problems = dict(document), list[str]()
    values["method"] = _named(
        values.get("method", {"name": "fedavg"}),
        "method",
        registry.METHODS,
        registry.config_class,
        source,
        problems,
    )
    data = values.get("data")
    if isinstance(data, dict) and "partition" in data:
        block = _named(data["partition"], "data.partition", PARTITIONERS, partition_class, source, problems)
        values["data"] = {**data, "partition": block}
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += _problems(error, RunConfig, (), together=not problems)
    if problems:
        said = (problem.removeprefix(f"{source}: ") for problem in dict.fromkeys(problems))
        raise InputError("\n".join(f"{source}: {problem}" for problem in said))
    return config


def _named(
    block: Any,
    setting: str,
    known: Iterable[str],
    class_of: Callable[[str], type[Settings]],
    source: str,
    problems: list[str],
) -> Settings:
    """A block whose name says which settings it has; what is wrong with these is added to `problems`.

    Raises:
        InputError: It is no block, or its name is missing or not known.
    """
    if not isinstance(block, dict):
        raise InputError(
            f"{source}: {setting} must be a block of settings with a name, got {short(repr(block))}"
        )
    if "name" not in block:
        raise InputError(f"{source}: {setting}.name is missing; known are {', '.join(known)}")
    try:
        cls = class_of(str(block["name"]))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    try:
        return cls.model_validate(block)
    except ValidationError as error:
        problems += _problems(error, cls, tuple(setting.split(".")))
        return cast(Any, cls).model_construct(name=block["name"])  # so that the rest can be looked at


def _problems(
    error: ValidationError, cls: type[BaseModel], prefix: tuple[str, ...], *, together: bool = True
) -> list[str]:
    """One line a problem, with the dotted name as a user writes it.

    Without `together` nothing of settings that do not go with each other: one of their blocks has problems of
    its own, and another stands in for it.
    """
    lines = list[str]()
    before = dict[str, tuple[str, str]]()  # by name, its line and what that says is allowed
    for problem in error.errors(include_url=False):
        if not (together or problem["loc"]):
            continue
        path, known = _walk(cls, problem["loc"])
        name = foreign(".".join([*prefix, *path])) or "the configuration"
        got = "" if isinstance(problem["input"], dict) else f", got {short(repr(problem['input']))}"
        if problem["type"] == "extra_forbidden":
            ours = OTHER_NAMES.get(path[-1])
            hint = f" Here that is {ours}." if ours else nearest(path[-1], known)
            lines.append(f"{name} is not a known setting; here are known: {', '.join(known)}.{hint}")
        elif problem["type"] == "missing":
            lines.append(f"{name} is missing")
        else:
            if problem["type"] == "literal_error" and isinstance(problem["input"], str):
                got += "." + nearest(problem["input"], re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
            text = short(problem["msg"].removeprefix("Value error, "), 600)
            text = text[0].lower() + text[1:]
            if lines and name in before and lines[-1] is before[name][0]:  # a number or a word would do
                lines.pop()
                text = f"{before[name][1]} or {text.removeprefix('input should be ')}"
            lines.append(f"{name}: {text}{'' if problem['type'] == 'value_error' else got}")
            before[name] = lines[-1], text
    return lines


def _walk(cls: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The dotted path of an error without pydantic's union tags, and the settings beside its last part."""
    path: list[str] = []
    blocks: list[type[BaseModel]] = [cls]
    for part in loc:
        tagged = [b for b in blocks if "name" in b.model_fields and b.model_fields["name"].default == part]
        if tagged and len(blocks) > 1:
            blocks = tagged
            continue
        path.append(str(part))
        inner = [
            b.model_fields[part].annotation
            for b in blocks
            if isinstance(part, str) and part in b.model_fields
        ]
        found = [block for annotation in inner for block in settings_blocks(annotation)]
        if not found:
            break
        blocks = found
    known = sorted({name for block in blocks for name in block.model_fields})
    return path, known


def settings_blocks(annotation: Any) -> list[type[BaseModel]]:
    """The settings blocks that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [block for part in typing.get_args(annotation) for block in settings_blocks(part)]
    return []


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets `key=value` pairs with dotted keys in a document. Raises InputError for anything else."""
    for override in overrides:
        _override(document, override)


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts, shown = key.split("."), short(override)
    if not equals or not all(parts):
        raise InputError(
            f"{shown!r} is not an override; write key=value with a dotted key, as in method.lr=1e-4"
        )
    block = document
    for part in parts[:-1]:
        inner = block.setdefault(part, {})
        if not isinstance(inner, dict):
            raise InputError(f"override {shown!r}: {part} is {short(repr(inner))}, not a block of settings")
        block = inner
    block[parts[-1]] = load_yaml(value, f"override {shown!r}")
