"""Tasks of text-to-image models: the denoising loss, CLIP scores and the pixel check.

Pictures are made once a model, the same prompts from the same seeds each time. A CLIP score is the cosine of
a picture's embedding and a text's (Hessel et al. 2021 multiply it by 2.5 and cut it at 0; here it is as it
is), or of two pictures'. It can rise while what was asked for is not there: the pixel check looks for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedtune.core.seeds import derive_seed, torch_generator
from fedtune.data.batches import collate, on_device
from fedtune.data.encoded import Encoded
from fedtune.data.pictures import Frame, caption_ids, encode_pictures
from fedtune.data.shapes import figure_of
from fedtune.errors import InputError
from fedtune.evaluation.picture_settings import A_CLIP, PictureSettings
from fedtune.evaluation.shapes import right
from fedtune.evaluation.types import EvalEnv, Outcome, Scored, Task
from fedtune.models.boundary import usable
from fedtune.models.folders import WEIGHTS, weight_files
from fedtune.models.load import quiet
from fedtune.models.names import BUNDLED, bundled_clip
from fedtune.models.pipelines import Drawing, draw_pictures
from fedtune.models.text_to_image import TextToImage, text_to_image

if TYPE_CHECKING:
    from PIL.Image import Image

LEVELS = 8  # time steps that a held-out picture is looked at, evenly spread
_KEY = "pictures"  # of what tasks of one model share


def _pipeline(env: EvalEnv) -> tuple[TextToImage, PictureSettings]:
    base, settings = text_to_image(env.model), env.settings.pictures
    if base is None or settings is None:
        raise InputError("this task is for model.task: text-to-image")
    return base, settings


def _denoising_loss(env: EvalEnv) -> Outcome:
    """The loss of held-out pictures at `LEVELS` time steps, with noise of each picture's own seed."""
    base, settings = _pipeline(env)
    tokens = int(base.config.max_position_embeddings)
    frame = Frame(settings.side or base.side, settings.crop, base.unit)
    found = encode_pictures(env.examples, env.tokenizer, frame=frame, tokens=tokens)
    watched = partial(env.watched, "denoising-loss", LEVELS, tokens)
    losses = denoising_losses(env.model, list(enumerate(found.items)), env.settings.seed, watched)
    cut = found.counts.cut
    notes = (f"{cut} of {len(losses)} captions are cut to {tokens} tokens",) if cut else ()
    return Outcome({"denoising_loss": Scored(losses, lower_is_better=True)}, notes=notes)


def denoising_losses(
    model: nn.Module,
    numbered: Sequence[tuple[int, Encoded]],
    seed: int,
    watched: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[float]:
    """The loss of each picture, the mean over `LEVELS` time steps, without min-SNR weighting.

    Args:
        model: A pipeline, wrapped by PEFT or not.
        numbered: Encoded pictures, each with its place among the held-out ones, which says its noise.
        seed: The run's.
        watched: Entered around each picture.
    """
    base = text_to_image(model)
    assert base is not None
    steps = int(base.noising.config.num_train_timesteps)
    times = torch.tensor([[steps * (2 * level + 1) // (2 * LEVELS)] for level in range(LEVELS)])
    device, losses = next(base.parameters()).device, list[float]()
    many = replace(base.learning, draws=LEVELS, flip=False, snr_gamma=None)
    own, base.learning = base.learning, many
    try:
        for number, item in numbered:
            batch = collate([item], 0)
            draws = base.draws(batch["pixels"], torch_generator(seed, "denoising", number))
            given = on_device({**batch, **draws, "times": times}, device)
            with watched(), torch.no_grad():
                losses.append(float(model(**given).each))
    finally:
        base.learning = own
    return losses


def _clip_score(env: EvalEnv) -> Outcome:
    """Mean cosine of pictures and what their prompts say, and of pictures and the subject's held-out ones."""
    base, settings = _pipeline(env)
    made = _made(env)  # (prompts, each, 3, side, side)
    if settings.clip is None:
        raise InputError(f"clip-score needs evaluation.pictures.clip: {A_CLIP}")
    clip = load_clip(settings.clip)
    texts, cut = clip.texts([prompt.wanted for prompt in settings.prompts])
    pictures = torch.stack([clip.pictures(some) for some in made])  # (prompts, each, width)
    by_text = torch.einsum("pew,pw->pe", pictures, texts).mean(1).tolist()
    more, notes = dict[str, float](), list[str]()
    own = _subjects(env, base, settings)
    alike = []
    for number, prompt in enumerate(settings.prompts):
        real = [pixels for category, pixels in own if prompt.subject in (None, category)]
        if real:
            alike.append(float((pictures[number] @ clip.pictures(real).T).mean()))
    if alike:
        more["clip_image_score"] = float(np.mean(alike))
    if cut:
        more["cut"] = cut
        notes.append(f"{cut} of {len(texts)} texts are cut to {clip.tokens} tokens")
    notes += _cut_prompts(env, base, settings)
    return Outcome({"clip_score": Scored(by_text)}, more, tuple(notes), pictures=made)


def _pixel_check(env: EvalEnv) -> Outcome:
    """Share of pictures whose pixels show all that the prompt says, and by attribute."""
    base, settings = _pipeline(env)
    figures = []
    for prompt in settings.prompts:
        figure = figure_of(prompt.wanted)
        if figure is None:
            raise InputError(
                f'pixel-check reads captions of drawn shapes, as "a red circle on a blue background"; got '
                f'"{prompt.wanted}". Leave the task out, or give evaluation.pictures.prompts that say such'
            )
        figures.append(figure)
    made = _made(env)
    each = [
        [right(pixels, figure) for pixels in some.numpy().astype(np.float32) / 127.5 - 1]
        for some, figure in zip(made, figures, strict=True)
    ]
    shown = [float(np.mean([all(one.values()) for one in some])) for some in each]
    more = {
        f"shown/{name}": float(np.mean([one[name] for some in each for one in some])) for name in each[0][0]
    }
    return Outcome({"shown": Scored(shown)}, more, tuple(_cut_prompts(env, base, settings)), pictures=made)


def _cut_prompts(env: EvalEnv, base: TextToImage, settings: PictureSettings) -> list[str]:
    """What is said where the pipeline's text encoder does not take all of a prompt."""
    tokens = int(base.config.max_position_embeddings)
    cut = sum(caption_ids(env.tokenizer, prompt.text, tokens)[1] for prompt in settings.prompts)
    return [f"{cut} of {len(settings.prompts)} prompts are cut to {tokens} tokens"] if cut else []


def _made(env: EvalEnv) -> Tensor:
    """The pictures of all prompts: uint8 (prompts, each, 3, side, side); made once."""
    _, settings = _pipeline(env)
    if _KEY not in env.shared:
        texts = [prompt.text for prompt in settings.prompts for _ in range(settings.each)]
        seeds = [
            derive_seed(env.settings.seed, "picture", number) % 2**32
            for _ in settings.prompts
            for number in range(settings.each)
        ]
        how = Drawing(settings.steps, settings.guidance, settings.side)
        with env.watched("pictures", min(len(texts), how.together), settings.steps):
            drawn = draw_pictures(env.model, env.tokenizer, texts, seeds, how)
        env.shared[_KEY] = drawn.unflatten(0, (len(settings.prompts), settings.each))
    made: Tensor = env.shared[_KEY]
    return made


def _subjects(env: EvalEnv, base: TextToImage, settings: PictureSettings) -> list[tuple[str, Tensor]]:
    """The held-out pictures with their categories."""
    frame = Frame(settings.side or base.side, settings.crop, base.unit)
    tokens = int(base.config.max_position_embeddings)
    found = encode_pictures(env.examples, env.tokenizer, frame=frame, tokens=tokens)
    return [(e.category, item.pixels) for e, item in zip(env.examples, found.items, strict=True)]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Clip:
    """A CLIP model with what puts texts and pictures into it; embeddings are of length 1."""

    model: Any
    tokenizer: Any
    processor: Any

    @property
    def tokens(self) -> int:
        """Of a text, at most."""
        return int(self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> tuple[Tensor, int]:
        """(texts, width), and how many texts were cut."""
        whole = [len(ids) for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]]
        given = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        )
        found = self.model.text_projection(self.model.text_model(**given).pooler_output)
        return functional.normalize(found, dim=-1), sum(length > self.tokens for length in whole)

    @torch.no_grad()
    def pictures(self, pixels: Iterable[Tensor]) -> Tensor:
        """(pictures, width), of uint8 (3, height, width) each."""
        images = [as_picture(one) for one in pixels]
        given = self.processor(images=images, return_tensors="pt")["pixel_values"]
        found = self.model.visual_projection(self.model.vision_model(given).pooler_output)
        return functional.normalize(found, dim=-1)


@lru_cache(maxsize=1)
def load_clip(name: str) -> Clip:
    """A CLIP in float32 on the CPU.

    Args:
        name: "bundled", or a folder of a CLIP model with its tokenizer and image processor.

    Raises:
        InputError: There is none, or it is no CLIP.
    """
    from transformers import AutoConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = bundled_clip() if name == BUNDLED else Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"evaluation.pictures.clip: {folder} holds no CLIP model: it has no config.json")
    if not (folder / WEIGHTS).is_file():
        weight_files(str(folder), folder)
    with quiet(), usable(f"evaluation.pictures.clip: {folder} cannot be loaded as a CLIP"):
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind != "clip":
            raise InputError(f'evaluation.pictures.clip: {folder} is a model of type "{kind}", and no CLIP')
        model = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    return Clip(model.eval(), tokenizer, processor)


def as_picture(pixels: Tensor) -> Image:
    """A picture of uint8 (3, height, width)."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def grid(pictures: Tensor, least: int = 96) -> Image:
    """Pictures side by side, uint8 (rows, columns, 3, side, side), each of `least` pixels a side or more."""
    from PIL import Image

    rows, columns, _, height, width = pictures.shape
    times, gap = max(1, -(-least // width)), 4
    sheet = Image.new(
        "RGB", (columns * (width * times + gap) + gap, rows * (height * times + gap) + gap), "white"
    )
    for row in range(rows):
        for column in range(columns):
            one = as_picture(pictures[row, column]).resize(
                (width * times, height * times), Image.Resampling.NEAREST
            )
            sheet.paste(one, (gap + column * (width * times + gap), gap + row * (height * times + gap)))
    return sheet


TASKS = {
    "denoising-loss": Task(_denoising_loss, "denoising_loss", examples=True),
    "clip-score": Task(_clip_score, "clip_score", examples=False),
    "pixel-check": Task(_pixel_check, "shown", examples=False),
}
