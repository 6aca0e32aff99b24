"""What a round's evaluation made and cannot be had again: answers, and pictures as a grid.

A grid's rows are prompts, its columns their seeds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.federation.files import disk_errors
from fedtune.federation.folder import RunFolder
from fedtune.federation.scored import Evaluated

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "pictures"


def keep_made(scores: Evaluated, folder: RunFolder, round: int, *, arrivals: int = 0) -> None:
    """Writes a round's pictures and, of a whole round, its answers.

    Args:
        scores: What was made.
        folder: The run's.
        round: Counted from 1; 0 is the model before any training.
        arrivals: Of an asynchronous round, how many clients are in it so far; 0: all that will be.

    Raises:
        FederationError: The disk is full or cannot be written.
    """
    _save_grids(scores.pictures, folder.path, round, arrivals)
    for line in scores.details if not arrivals else ():
        folder.append("answers.jsonl", {"round": round, **line})


def _save_grids(pictures: Mapping[str, Tensor], path: Path, round: int, arrivals: int) -> None:
    """A PNG for each result that made some, as round-0003.png."""
    if not pictures:
        return
    from fedtune.evaluation.pictures import grid

    folder = path / FOLDER
    with disk_errors(FOLDER):
        folder.mkdir(exist_ok=True)
        for name, made in pictures.items():
            file = folder / (
                f"round-{round:04d}"
                + (f"-arrival-{arrivals:04d}" if arrivals else "")
                + ("" if name == "global" else f"-{name}")
                + ".png"
            )
            new = file.with_suffix(".new")
            grid(made).save(new, format="PNG")
            os.replace(new, file)
