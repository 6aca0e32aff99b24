"""Settings of text-to-image models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fedtune.core.settings import Settings

TASK = "text-to-image"


class Prior(Settings):
    """Pictures of the subjects' class beside each batch, so that the model goes on drawing the class."""

    caption: str = Field(min_length=1)  # of the class, as "a photo of a dog"; {folder}: the folder's name
    weight: float = Field(1.0, gt=0)  # of their loss beside the batch's own
    source: str | None = Field(None, min_length=1)  # a folder of them, where each client has one; null: made
    count: int = Field(20, ge=1)  # that each client has the base model make, a caption
    steps: int = Field(20, ge=1)  # of the scheduler, a picture
    guidance: float = Field(3.0, ge=1)  # as of evaluation.pictures


class Diffusion(Settings):
    """How the loss of a text-to-image model is taken; see text-to-image.md."""

    snr_gamma: float | None = Field(None, gt=0)  # min-SNR weighting of the loss; null: none
    draws: int = Field(1, ge=1)  # noises and time steps a picture and step; their mean is its loss
    keep: bool = True  # latents of pictures and embeddings of captions, once computed
    prior: Prior | None = None  # prior preservation of DreamBooth; null: none


class Pictures(Settings):
    """How pictures are read and brought to one size."""

    side: int | None = Field(None, ge=8)  # pixels; null: as the pipeline was trained
    crop: Literal["center", "stretch", "pad", "bucket"] = "center"  # bucket: a size for its aspect, no square
    flip: bool = False  # each is mirrored with chance 1/2 in training
    caption: str | None = Field(None, min_length=1)  # of pictures without one; {folder}: their folder's name


class DrawnPrompt(Settings):
    """What pictures are made of in evaluation."""

    text: str = Field(min_length=1)  # what the pipeline is given
    says: str | None = Field(None, min_length=1)  # what CLIP and the pixel check hold it to; null: the text
    subject: str | None = None  # category of the held-out pictures that it should look like; null: all


Prompts = Annotated[
    list[DrawnPrompt],
    BeforeValidator(
        lambda given: (
            [{"text": one} if isinstance(one, str) else one for one in given]
            if isinstance(given, list)
            else given
        )
    ),
]


class Drawn(Settings):
    """The pictures that tasks look at."""

    prompts: Prompts = Field(default_factory=list)  # texts, or each with what CLIP should see; bundled: own
    clip: str | None = Field(None, min_length=1)  # a CLIP folder, or bundled; null: the bundled model's
    steps: int = Field(20, ge=1)  # of the scheduler, a picture
    guidance: float = Field(3.0, ge=1)  # the caption's guess over the one without; 1: the caption's alone
    each: int = Field(4, ge=1)  # pictures a prompt, each from a seed of its own


def filled(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's values with the blocks of text-to-image, where it is one and they are plain.

    The bundled pipeline brings its CLIP, and with the bundled pictures is held to what it draws.
    """
    model = values.get("model", {})
    if not isinstance(model, dict) or model.get("task") != TASK:
        return values
    filled = dict(values)
    for name, own in (("model", "diffusion"), ("data", "pictures"), ("evaluation", "pictures")):
        block = values.get(name, {})
        if isinstance(block, dict):
            filled[name] = {**block, own: {} if block.get(own) is None else block[own]}
    data, evaluation, bundled = filled["data"], filled["evaluation"], "bundled"
    if isinstance(evaluation, dict):
        ours = model.get("name", bundled) == bundled
        if ours and isinstance(drawn := evaluation["pictures"], dict) and drawn.get("clip") is None:
            evaluation["pictures"] = {**drawn, "clip": bundled}
        drawing = ours and isinstance(data, dict) and data.get("train", bundled) == bundled
        tasks = ["denoising-loss", *(["clip-score", "pixel-check"] if drawing else [])]
        evaluation.setdefault("tasks", tasks)
    return filled
