"""`fedtune init` and `fedtune cp`: a configuration to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtune.api import starting


def init(
    name: Annotated[
        Path, typer.Argument(metavar="[NAME]", help="File to write; without a suffix it gets .yaml.")
    ] = Path("fedtune.yaml"),
    template: Annotated[str, typer.Option(help="What to start from; --list says what there is.")] = "demo",
    model: Annotated[str | None, typer.Option(help="Your model: a folder, or owner/name of the hub.")] = None,
    data: Annotated[str | None, typer.Option(help="Your training examples.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List the templates and write nothing.")] = False,
) -> None:
    """Write a commented configuration to start from.

    Example: fedtune init mine --template lora --model path/to/model --data rows.jsonl
    """
    if show:
        known = starting.starts()
        for each, about in known.items():
            print(f"{each:{max(map(len, known))}}  {about}")
        return
    path = starting.init(name, template=template, model=model, data=data)
    command = f"fedtune server {path} --keys FOLDER" if template == "deploy" else f"fedtune run {path}"
    print(f"{path}: {starting.starts()[template]}\nLook through it; then: {command}")


def cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of fedtune ls configs.")],
    to: Annotated[
        Path | None, typer.Argument(metavar="[TO]", help="File or folder; default: the working folder.")
    ] = None,
) -> None:
    """Copy a configuration that comes with fedtune.

    Example: fedtune cp papers/fedlora mine.yaml
    """
    print(starting.copy(name, to))
