"""The configurations that come with fedtune, by name, in a source tree and in an installed package alike."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from fedtune.errors import InputError, nearest

log = logging.getLogger("fedtune")

_PACKAGE = Path(__file__).resolve().parents[1]
_SUFFIX = ".yaml"


def folder() -> Path:
    """Where they are: beside the package in a source tree, inside it where it was installed from a wheel.

    Raises:
        InputError: In neither place.
    """
    for place in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if place.is_dir():
            return place
    raise InputError(f"the configurations of fedtune are not in {_PACKAGE}; install fedtune again")


def shipped() -> dict[str, Path]:
    """Every one by its name, sorted: "demo", "papers/fedlora"."""
    root = folder()
    found = sorted(path for path in root.rglob(f"*{_SUFFIX}"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in found}


def find(path: Path) -> Path:
    """The file that is meant: `path` if it is there, else the one that comes with fedtune under this name.

    Both "demo" and "configs/demo.yaml" are demo's names; a file of the name goes first.

    Raises:
        InputError: It is neither there nor one of those that come with fedtune.
    """
    if path.is_file():
        return path
    name, known = path.as_posix().removeprefix("configs/").removesuffix(_SUFFIX), shipped()
    if name not in known or path.is_absolute():
        if os.path.lexists(path):
            return path
        raise InputError(
            f"{path}: no such configuration file in {Path.cwd()}, and none of that name comes with fedtune "
            f"(fedtune ls configs).{nearest(name, known)} fedtune init writes one to start from"
        )
    if path.suffix:
        log.warning("%s is not in %s; taken is the one that comes with fedtune", path, Path.cwd())
    return known[name]


def listing() -> list[dict[str, str]]:
    """Of each its name, where it is from, and what it is."""
    return [{"name": n, "origin": "fedtune", "summary": about(path)} for n, path in shipped().items()]


def about(path: Path) -> str:
    """The first sentence of the comment on top of a configuration; "" where there is none."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("#").strip())
    return re.split(r"\.(?: (?![0-9])|$)", " ".join(lines))[0]
