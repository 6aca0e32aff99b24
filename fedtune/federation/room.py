"""How long a run's examples may be, in tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.config.schema import RunConfig
from fedtune.data.batching import Batching
from fedtune.data.pictures import Frame
from fedtune.errors import InputError
from fedtune.methods.tuning import Tuning
from fedtune.models.context import positions
from fedtune.models.names import BUNDLED, bundled_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

LEAST = 8  # tokens of an example: what data.max_length asks for


@dataclass(frozen=True)
class Room:
    """How long a run's examples may be.

    Attributes:
        tokens: Of prompt and answer together.
        shortened: Why that is less than `data.max_length`; empty where it is not.
    """

    tokens: int
    shortened: str = ""


def reserved_tokens(config: RunConfig) -> int:
    """Tokens of the model's context that the method's soft prompt takes."""
    method = config.method
    if not isinstance(method, Tuning):
        return 0
    soft = method.prompt or method.p_tuning or method.prefix
    return soft.tokens if soft else 0


def example_room(config: RunConfig, model: PretrainedConfig) -> Room:
    """`data.max_length`, or what the model sees beside the method's soft prompt if that is less.

    Args:
        config: The run's configuration.
        model: Its model's.

    Raises:
        InputError: No example fits.
    """
    return _room(config, positions(model))


def _room(config: RunConfig, limit: int | None) -> Room:
    asked, reserved = config.data.max_length, reserved_tokens(config)
    if limit is None or asked <= limit - reserved:
        return Room(asked)
    beside = f", of which the soft prompt takes {reserved}" if reserved else ""
    if limit - reserved < LEAST:
        raise InputError(
            f"{config.model.name} sees {limit} tokens{beside}: no example fits. Take a model that sees more"
            + (", or a shorter prompt" if reserved else "")
        )
    return Room(
        limit - reserved,
        f"data.max_length is {asked}, but {config.model.name} sees {limit} tokens{beside}: an example has at "
        f"most {limit - reserved}",
    )


def picture_frame(config: RunConfig, model: nn.Module) -> Frame | None:
    """The size of a run's pictures; None of texts.

    Raises:
        InputError: The pipeline takes no pictures of that size.
    """
    pictures = config.data.pictures
    if pictures is None:
        return None
    from fedtune.models.text_to_image import text_to_image

    pipeline = text_to_image(model)
    assert pipeline is not None
    side = pictures.side or pipeline.side
    if side % pipeline.unit:
        raise InputError(
            f"data.pictures.side must be a multiple of {pipeline.unit} for {config.model.name}, got {side}"
        )
    return Frame(side, pictures.crop, pipeline.unit)


def batching_of(config: RunConfig, room: Room) -> Batching:
    """How the run's examples become batches; a row of several is as long as one may be."""
    return Batching(config.data.batching, room.tokens)


def shortening(config: RunConfig, room: Room, *, lost: bool = False) -> list[str]:
    """What is said where the model sees less than `data.max_length`; nothing of a default that does no harm.

    Args:
        config: The run's configuration.
        room: As `example_room` gives it.
        lost: Whether an example was cut or dropped.
    """
    meant = config.data.max_length != type(config.data).model_fields["max_length"].default
    return [room.shortened] if room.shortened and (meant or lost) else []


def known_room(config: RunConfig) -> Room | None:
    """As `example_room`, of a model that is on this machine; None of others: nothing is downloaded for it.

    Captions are cut to what their text encoder sees; of them it is None too.

    Of the bundled model it is known without torch, which takes seconds to import.

    Raises:
        InputError: No example fits, or the model's configuration cannot be read.
    """
    name = config.model.name
    if config.data.pictures is not None:
        return None
    if name == BUNDLED:
        about = json.loads((bundled_folder() / "config.json").read_bytes())
        return _room(config, about["max_position_embeddings"])
    if not Path(name).expanduser().is_dir():
        return None
    from fedtune.models.load import model_config

    return example_room(config, model_config(config.model.place, base=Path("."), task=config.model.task))
