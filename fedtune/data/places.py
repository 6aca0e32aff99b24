"""What a name in a setting means: a place on this machine, or a repository of the hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from fedtune.errors import InputError, nearest

log = logging.getLogger("fedtune")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(source: str, base: Path) -> bool:
    """Whether a name is written as a data set of the hub, with configuration and revision if it has some."""
    name = source.partition("@")[0].partition(":")[0]
    return bool(_HUB_NAME.fullmatch(name)) and not (base / name.partition("/")[0]).exists()


def require_hub_name(name: str, base: Path, setting: str, known: Iterable[str] = ()) -> None:
    """Refuses a name that means a place on this machine, where there is nothing.

    Only OWNER/NAME means the hub, and only where there is no folder OWNER: `models/base` with a folder
    `models` is a place in it, and a slip in it is not asked for elsewhere.

    Args:
        name: A name that is nothing on this machine.
        base: The folder that relative names start from.
        setting: What it was given for, in front of an error.
        known: Names that stand for something else, to propose.

    Raises:
        InputError: It is no name of the hub; proposes what is there.
    """
    owner = name.partition("/")[0]
    if _HUB_NAME.fullmatch(name) and not (base / owner).exists():
        return
    path = Path(name).expanduser()
    above = (base / path).parent
    there = []
    if above.is_dir():
        there = [str(path.with_name(entry.name)) for entry in above.iterdir() if entry.name[:1] != "."]
    local = path.is_absolute() or name.startswith(".")
    where = "" if path.is_absolute() else f"; looked for {(base / path).absolute()}"
    hub = "A repository of the Hugging Face hub is written OWNER/NAME, and no folder here is called OWNER."
    raise InputError(
        f'{setting}: there is no "{name}" on this machine{where}.{nearest(name, [*known, *sorted(there)])}'
        + ("" if local else f" {hub}")
    )


def say_asking(what: str) -> None:
    """Says that the hub is asked for something, before it is."""
    log.warning("%s is not on this machine; asking the Hugging Face hub for it", what)
