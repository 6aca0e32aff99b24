"""Pictures of a run's result."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.config.schema import RunConfig
from fedtune.data.pictures import caption_ids
from fedtune.errors import InputError
from fedtune.federation.files import disk_errors
from fedtune.models.load import Loaded

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("fedtune")


def drawn(config: RunConfig, loaded: Loaded, prompt: str, seed: int) -> Tensor:
    """A picture, uint8 (3, side, side), with the steps and guidance of the run's evaluation.

    Raises:
        InputError: The run is of no text-to-image model, the prompt is empty, or the seed is below 0.
    """
    pictures, sizes = config.evaluation.pictures, config.data.pictures
    if pictures is None or sizes is None:
        raise InputError(f"the run's model answers in words (model.task: {config.model.task}); use generate")
    if not prompt.strip():
        raise InputError("the prompt is empty; say what the picture shows")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be from 0 to 2^63 - 1, got {seed}")
    from fedtune.models.pipelines import Drawing, draw_pictures

    tokens = int(loaded.model.config.max_position_embeddings)
    if caption_ids(loaded.tokenizer, prompt, tokens)[1]:
        log.warning("the prompt is longer than the text encoder takes, and is cut to %d tokens", tokens)
    how = Drawing(pictures.steps, pictures.guidance, sizes.side)
    return draw_pictures(loaded.model, loaded.tokenizer, [prompt], [seed], how)[0]


def write_picture(picture: Tensor, out: Path) -> Path:
    """Writes a PNG; returns `out`.

    Raises:
        InputError: `out` is taken, its folder is not there, or it ends in something else.
        FederationError: The disk is full or cannot be written.
    """
    from fedtune.evaluation.pictures import as_picture

    with disk_errors(str(out)), out.open("xb") as file:
        as_picture(picture).save(file, format="PNG")
    return out


def check_picture_file(out: Path) -> None:
    """Raises InputError unless a PNG can be written at `out`."""
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: pictures are written as .png")
    if out.exists():
        raise InputError(f"{out} exists already; give another --out, or move it away")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
