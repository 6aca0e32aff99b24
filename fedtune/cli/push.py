"""`fedtune push`: a run's result for others, with a card that says what it is."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

import fedtune
from fedtune.cli.answer import Finished, Moved
from fedtune.cli.display import Plugin


class Format(StrEnum):
    """Forms in which a result is written out."""

    peft = "peft"
    merged = "merged"
    gguf = "gguf"


def push(
    run: Finished,
    target: Annotated[
        str,
        typer.Argument(
            metavar="REPO|FOLDER",
            help="owner/name on the hub; or a folder to write, as ./name, not there yet.",
        ),
    ],
    format: Annotated[
        Format | None,
        typer.Option(help="Default: an adapter where its base model is on the hub, else a whole model."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="A repository that everybody sees; else it is private.")
    ] = False,
    moved: Moved = None,
    plugin: Plugin = None,
) -> None:
    """Give a run's result away with a model card, into a folder or to the Hugging Face hub.

    The card says data split, method, rounds, scores, bytes, privacy spent and versions. No example, name of a
    client or category, or place of this machine is in any file. For the hub log in first: hf auth login.

    Example: fedtune push runs/demo ./demo-model

    Example: fedtune push runs/mine owner/name
    """
    print(fedtune.open(run, *moved or []).push(target, format=format, public=public))
