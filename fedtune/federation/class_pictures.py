"""Pictures of the subjects' class, for prior preservation: given, or made by the model as it was at first.

A model that is tuned on one dog forgets others. So each batch has as many pictures of the class beside its
own, and the loss is that of its own plus `weight` times theirs (Ruiz et al. 2023, "DreamBooth", eq. 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from fedtune.config.pictures import Prior
from fedtune.config.schema import RunConfig
from fedtune.core.seeds import derive_seed
from fedtune.data.encoded import EncodedSet
from fedtune.data.examples import Example
from fedtune.data.pictures import (
    Frame,
    Picture,
    PictureList,
    caption_ids,
    captioned,
    encode_pictures,
    load_pictures,
)
from fedtune.data.reading import Reading
from fedtune.models.load import Loaded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def beside_class(
    found: EncodedSet,
    config: RunConfig,
    client: int,
    examples: Sequence[Example],
    loaded: Loaded,
    *,
    frame: Frame | None,
    tokens: int,
) -> EncodedSet:
    """A client's encoded pictures with those of the class, which are made when the first one is needed.

    Args:
        found: What `encode_for` made of `examples`; it is what comes back where there is no prior.
        config: The run's configuration.
        client: Whose; what is made comes from seeds of its own.
        examples: This client's.
        loaded: The model. It may be trained until then: what LoRA adds to it is left out.
        frame: The size of the run's pictures.
        tokens: Of a caption.

    Raises:
        InputError: Pictures of the class were given and are not usable; where they are made, as
            `draw_pictures`.
    """
    prior = config.model.diffusion.prior if config.model.diffusion else None
    if prior is None or frame is None:
        return found
    square = replace(frame, crop="center" if frame.crop == "bucket" else frame.crop)
    if prior.source is not None:
        reading = Reading(skip=config.data.bad_rows == "skip", what="model.diffusion.prior.source")
        given = load_pictures(prior.source, "train", prior.caption, reading)
        items = encode_pictures(given, loaded.tokenizer, frame=square, tokens=tokens).items
        return replace(found, items=_beside(found, lambda: list(items)))
    texts = [
        text
        for text in sorted({captioned(prior.caption, example) for example in examples})
        for _ in range(prior.count)
    ]
    seeds = [derive_seed(config.seed, "class pictures", client, n) % 2**32 for n in range(len(texts))]
    make = partial(_made, loaded.model, loaded.tokenizer, texts, seeds, prior, square.side, tokens)
    return replace(found, items=_beside(found, make))


def _beside(found: EncodedSet, others: Any) -> Any:
    return PictureList([item for item in found.items if isinstance(item, Picture)], others)


def _made(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    seeds: Sequence[int],
    prior: Prior,
    side: int,
    tokens: int,
) -> list[Picture]:
    from fedtune.models.pipelines import Drawing, draw_pictures  # diffusers only where it is used

    with _untrained(model):
        drawn = draw_pictures(model, tokenizer, texts, seeds, Drawing(prior.steps, prior.guidance, side))
    return [
        Picture(caption_ids(tokenizer, text, tokens)[0], (0,), pixels=pixels)
        for text, pixels in zip(texts, drawn, strict=True)
    ]


@contextmanager
def _untrained(model: nn.Module) -> Iterator[None]:
    """Inside, the model is as it was before anything was added to it, and in eval mode."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for module, before in training:
            module.training = before
