"""`fedtune generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fedtune
from fedtune.cli.display import Plugin
from fedtune.errors import InputError


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What is asked, or what a picture shows.")],
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Where inputs were moved to, as model.name=/data/base."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG file to write, of a text-to-image model; must not exist.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of a picture's noise.")] = 0,
    plugin: Plugin = None,
) -> None:
    """Use a run's result: print its answer to a prompt, or write the picture that it makes.

    Example: fedtune generate runs/mine "a photo of sks dog in the snow" --out picture.png
    """
    made = fedtune.open(run, *places or [])
    if made.config.model.task != "text-to-image":
        if out is not None or seed:
            raise InputError(f"--out and --seed are for text-to-image models, and {run} answers in words")
        print(made.generate([prompt])[0])
        return
    if out is None:
        raise InputError("--out is missing: the PNG file that the picture goes into")
    print(made.draw_to(prompt, out, seed=seed))
