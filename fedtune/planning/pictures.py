"""What a plan needs of a text-to-image model: its parts without values, its batches, what it computes once.

No picture is decoded and no tokenizer asked: all of a run's pictures have one size, all captions one length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fedtune.config.schema import RunConfig
from fedtune.data.batches import collate
from fedtune.data.encoded import Encoded
from fedtune.data.files import is_here
from fedtune.data.pictures import Picture, PictureList
from fedtune.errors import InputError
from fedtune.federation.base_model import learning_of
from fedtune.federation.data import prepare_data
from fedtune.federation.room import picture_frame
from fedtune.measure.flops import FlopCounter
from fedtune.models.pipelines import Drawing, meta_pipeline
from fedtune.models.text_to_image import Learning, TextToImage, text_to_image
from fedtune.planning.fake import Fakes, values
from fedtune.planning.memory import PartsMeter
from fedtune.planning.workload import Workload


def pipeline_of(config: RunConfig, fakes: Fakes) -> TextToImage | None:
    """The run's pipeline of fake tensors, with the run's loss; None of other models.

    Raises:
        InputError: As `meta_pipeline`.
    """
    own = config.model.diffusion
    if config.data.pictures is None or own is None:
        return None
    base = meta_pipeline(config.model.place, dtype=config.model.dtype, base=Path("."))
    base.learning = learning_of(own, config.data.pictures)
    fakes.empty_out(base)
    return base.eval()


def read(config: RunConfig, pipeline: TextToImage, *, pooled: bool, rows: int) -> Workload:
    """What the configuration's pictures come to.

    Args:
        config: The run's configuration.
        pipeline: Its model.
        pooled: One client holds all pictures.
        rows: The most pictures that a batch will be asked for.

    Raises:
        InputError: The pictures cannot be read or split as asked; or they are not here to count the clients.
    """
    data, side = config.data, side_of(config, pipeline)
    tokens = int(pipeline.config.max_position_embeddings)
    blank = torch.zeros((3, side, side), dtype=torch.uint8)
    largest = tuple(
        Picture(tuple(range(row, row + tokens)), (0,), pixels=blank + row % 256) for row in range(rows)
    )
    if not is_here(data.train):
        if not isinstance(data.clients, int):
            raise InputError("data.clients is null and the pictures are not here to count them; set it")
        note = f"{data.train} is not on this machine: each client is taken to have a full batch"
        return Workload(None, 1 if pooled else data.clients, largest, (), largest[:1], (), (note,))
    split = prepare_data(config, pooled=pooled)
    counts = {client: len(items) for client, items in split.clients.items()}
    return Workload(counts, len(counts), largest, (), largest[: len(split.evaluation)], (), ())


def side_of(config: RunConfig, pipeline: TextToImage) -> int:
    """Pixels a side of the run's square pictures; those of a bucket are at most as many in all.

    Raises:
        InputError: As `picture_frame`.
    """
    frame = picture_frame(config, pipeline)
    assert frame is not None
    return frame.side


def beside_class(config: RunConfig, items: Sequence[Encoded]) -> Sequence[Encoded]:
    """A batch, with prior preservation beside as many pictures of the class."""
    own = config.model.diffusion
    if own is None or own.prior is None:
        return items
    pictures = [item for item in items if isinstance(item, Picture)]
    return PictureList(pictures, lambda: pictures)


def makes_class(config: RunConfig) -> bool:
    """Whether each client has the model make pictures of the class."""
    own = config.model.diffusion
    return own is not None and own.prior is not None and own.prior.source is None


def pixels(items: Sequence[Encoded]) -> int:
    """A side of a batch's pictures; 0 of texts."""
    first = items[0] if items else None
    return first.pixels.shape[-1] if isinstance(first, Picture) and first.pixels is not None else 0


def evaluation_step(models: Iterable[nn.Module], config: RunConfig) -> PartsMeter:
    """The most pictures that are made at once: a guess of each with its caption and without, then decoded."""
    meter, together = PartsMeter(), Drawing().together
    for model in models:
        base = text_to_image(model)
        assert base is not None
        side = side_of(config, base) // base.scale
        width = int(cast(Any, base.text_encoder).config.hidden_size)
        channels = int(cast(Any, base.unet).config.in_channels)
        fake = next(base.unet.parameters())
        with values(), torch.no_grad():
            latents = fake.new_empty((together, channels, side, side))
            captions = fake.new_empty((2 * together, int(base.config.max_position_embeddings), width))
            with meter.whole([model]):
                base.unet(torch.cat([latents, latents]), torch.zeros(2 * together), captions)
            with meter.whole([model]):
                cast(Any, base.vae).decode(latents)
    return meter


def computed_once(pipeline: TextToImage, items: Sequence[Encoded]) -> dict[str, int]:
    """Operations of the parts that are not trained, for one picture: `autoencoder`, `text_encoder`."""
    batch, found = collate(items[:1], 0), dict[str, int]()
    own, pipeline.learning = pipeline.learning, Learning(keep=False)
    parts: dict[str, Any] = {
        "autoencoder": lambda: pipeline.moments(batch["pixels"], torch.tensor([False])),
        "text_encoder": lambda: pipeline.embed(batch["input_ids"]),
    }
    for name, compute in parts.items():
        with values(), torch.no_grad(), FlopCounter() as counter:
            compute()
        found[name] = counter.forward
    pipeline.learning = own
    return found
