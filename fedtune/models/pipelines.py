"""Stable Diffusion pipelines: read from safetensors alone, and put to work.

The only module that imports diffusers. No safety checker is loaded or asked for, and no code of a folder
runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fedtune.errors import InputError
from fedtune.models.boundary import first_line, usable
from fedtune.models.folders import CONFIG, PIPELINE, of_revision
from fedtune.models.load import DTYPES, Loaded, quiet
from fedtune.models.pipeline_folders import (
    PART_WEIGHTS,
    PARTS,
    part_settings_sha256,
    pipeline_folder,
    pipeline_sha256,
)
from fedtune.models.text_to_image import PREDICTIONS, Learning, TextToImage, text_to_image

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX = PIPELINE
KNOWN = "Stable Diffusion 1.x and 2.x: a UNet2DConditionModel, an autoencoder and one CLIP text encoder"


def require_diffusers() -> Any:
    """Diffusers. Raises InputError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise InputError("model.task: text-to-image needs diffusers; install fedtune[image]") from error
    return diffusers


def load_pipeline(name: str, *, dtype: str, base: Path, learning: Learning) -> Loaded:
    """Loads a pipeline as one module, with its tokenizer.

    Args:
        name: "bundled", a folder (relative to `base`) or a hub name, with @ and a revision behind it or not.
        dtype: Of all weights, a name in `DTYPES`.
        base: The folder that relative names start from.
        learning: How the loss is taken.

    Raises:
        InputError: No such folder, no pipeline of a known kind, a part or its safetensors are missing, or
            diffusers is.
    """
    folder = pipeline_folder(name, base)
    diffusers = require_diffusers()
    about = _index(name, folder)
    for part, file in PART_WEIGHTS.items():
        _require_file(name, folder / part, file)
    for part in ("unet", "vae", "text_encoder"):
        _require_file(name, folder / part, CONFIG)
    _require_file(name, folder / "scheduler", "scheduler_config.json")
    import transformers

    def loaded(kind: str, **more: Any) -> Any:
        library = transformers if about[kind].startswith("CLIP") else diffusers
        loader = getattr(library, about[kind])
        with usable(f"model {name}: its {kind} cannot be loaded from {folder / kind}"):
            return loader.from_pretrained(folder / kind, local_files_only=True, **more)

    weights: dict[str, Any] = {"dtype": DTYPES[dtype], "use_safetensors": True}
    with quiet(), without_reports():
        unet, vae, text_encoder = (loaded(kind, **weights) for kind in PART_WEIGHTS)
        tokenizer, scheduler = loaded("tokenizer"), loaded("scheduler")
        with usable(f"model {name}: its scheduler cannot mix noise into latents"):
            noising = diffusers.DDPMScheduler.from_config(scheduler.config)
    _check(name, unet, vae, text_encoder, tokenizer, noising)
    model = TextToImage(
        unet,
        vae,
        text_encoder,
        scheduler=scheduler,
        noising=noising,
        name=of_revision(name)[0] if not Path(name).is_dir() else name,
        learning=learning,
    )
    model.eval()
    digests = pipeline_sha256(name, folder), part_settings_sha256(folder)
    return Loaded(cast(Any, model), tokenizer, name, *digests)


def meta_pipeline(name: str, *, dtype: str, base: Path) -> TextToImage:
    """The parts of a pipeline on torch's meta device, from their config.json alone: no weights, no memory.

    Raises:
        InputError: As `load_pipeline`, but weights and tokenizer are neither needed nor read.
    """
    folder = pipeline_folder(name, base, weights=False)
    diffusers = require_diffusers()
    about = _index(name, folder)
    import transformers

    def built(kind: str) -> Any:
        _require_file(name, folder / kind, CONFIG)
        with usable(f"model {name}: its {kind} cannot be made from {folder / kind / CONFIG}"):
            if kind == "text_encoder":
                settings = transformers.CLIPTextConfig.from_pretrained(folder / kind, local_files_only=True)
                return cast(Any, transformers.CLIPTextModel(settings)).to(DTYPES[dtype])
            part = getattr(diffusers, about[kind])
            return part.from_config(part.load_config(folder / kind, local_files_only=True)).to(DTYPES[dtype])

    with quiet(), without_reports(), torch.device("meta"):
        unet, vae, text_encoder = (built(kind) for kind in PART_WEIGHTS)
    noising = diffusers.DDPMScheduler()  # of any settings: how many numbers there are is all that is asked
    return TextToImage(
        unet, vae, text_encoder, scheduler=None, noising=noising, name=name, learning=Learning()
    )


def pipeline_tokenizer(name: str, base: Path) -> PreTrainedTokenizerBase:
    """A pipeline's tokenizer alone. Raises InputError where there is none."""
    folder = pipeline_folder(name, base, weights=False) / "tokenizer"
    from transformers import CLIPTokenizer

    with quiet(), usable(f"model {name}: its tokenizer cannot be loaded from {folder}"):
        found: PreTrainedTokenizerBase = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return found


def pipeline_of(model: TextToImage, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The parts as diffusers' `StableDiffusionPipeline`, without a safety checker."""
    diffusers = require_diffusers()
    with (
        quiet(),
        without_reports(),
    ):  # importing it, transformers misses torchvision, which nothing here needs
        pipeline = diffusers.StableDiffusionPipeline(
            unet=model.unet,
            vae=model.vae,
            text_encoder=model.text_encoder,
            tokenizer=tokenizer,
            scheduler=model.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class Drawing:
    """How pictures are made.

    Attributes:
        steps: Of the scheduler.
        guidance: Weight of the guess with the caption over that without; 1: the caption's alone.
        side: Pixels; None: as the pipeline was trained.
        together: Pictures at once, at most.
    """

    steps: int = 20
    guidance: float = 7.5
    side: int | None = None
    together: int = 8


def draw_pictures(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Drawing,
) -> Tensor:
    """Pictures for prompts, each from its own seed: uint8 (prompts, 3, side, side).

    Args:
        model: A pipeline, wrapped by PEFT or not.
        tokenizer: Its tokenizer.
        prompts: What each shows.
        seeds: What each begins with: its noise.
        how: Steps and guidance.

    Raises:
        InputError: The autoencoder gives no numbers in this dtype, or the model makes no pictures.
    """
    base = text_to_image(model)
    if base is None:
        raise InputError(f"a {type(model).__name__} makes no pictures; it is no text-to-image pipeline")
    pipeline, side = pipeline_of(base, tokenizer), how.side or base.side
    made = list[Tensor]()
    for at in range(0, len(prompts), how.together):
        some = slice(at, at + how.together)
        with torch.no_grad(), quiet(), without_reports():  # who cut a prompt has said so
            images = pipeline(
                list(prompts[some]),
                num_inference_steps=how.steps,
                guidance_scale=how.guidance,
                height=side,
                width=side,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[some]],
                output_type="pt",
            ).images
        if not bool(images.isfinite().all()):
            dtype = str(base.dtype).removeprefix("torch.")
            raise InputError(
                f"model {base.name_or_path}: its pictures have NaN in {dtype}; set model.dtype to float32 or "
                "bfloat16"
            )
        made.append((images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(made)


def _index(name: str, folder: Path) -> dict[str, str]:
    """The class of each part, by its name in the pipeline."""
    file = folder / INDEX
    if not file.is_file():
        if (folder / CONFIG).is_file():
            raise InputError(
                f"model {name}: {folder} holds a model of transformers and no pipeline; text-to-image needs "
                f"a diffusers folder with {INDEX}. Set model.task to causal-lm or classification, or take "
                f"{KNOWN}."
            )
        raise InputError(f"model {name}: {folder} has no {INDEX}; give a diffusers folder of {KNOWN}.")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        kinds = {key: value[1] for key, value in about.items() if isinstance(value, list) and len(value) == 2}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"model {name}: {file} cannot be read: {first_line(error)}") from error
    if "transformer" in kinds or kinds.get("text_encoder_2"):
        raise InputError(
            f"model {name}: {about.get('_class_name')} is not there for text-to-image (SDXL, SD3 and FLUX "
            f"have other parts); take {KNOWN}."
        )
    for part, allowed in PARTS.items():
        found = kinds.get(part)
        if not found:
            raise InputError(f"model {name}: {file} names no {part}; take {KNOWN}.")
        if allowed and found not in allowed:
            raise InputError(
                f"model {name}: its {part} is a {found}, allowed are {' and '.join(allowed)}; take {KNOWN}."
            )
    scheduler = getattr(require_diffusers(), kinds["scheduler"], None)
    if not (isinstance(scheduler, type) and kinds["scheduler"].endswith("Scheduler")):
        raise InputError(f"model {name}: diffusers has no scheduler named {kinds['scheduler']}.")
    return {part: kinds[part] for part in PARTS}


def _require_file(name: str, folder: Path, file: str) -> None:
    if (folder / file).is_file():
        return
    others = sorted(one.name for pattern in ("*.bin", "*.ckpt", "*.pt") for one in folder.glob(pattern))
    why = (
        f" It has its weights as pickle only ({', '.join(others)}), which can run code when it is read; "
        "convert them to safetensors with save_pretrained."
        if others and file.endswith(".safetensors")
        else ""
    )
    raise InputError(f"model {name}: {folder / file} is missing.{why}")


def _check(name: str, unet: nn.Module, vae: nn.Module, text: nn.Module, tokenizer: Any, noising: Any) -> None:
    """Refuses parts that do not go together."""
    unet_config, vae_config, text_config = (cast(Any, part).config for part in (unet, vae, text))
    kind = noising.config.prediction_type
    if kind not in PREDICTIONS:
        raise InputError(
            f"model {name}: its scheduler predicts {kind}, allowed are {' and '.join(PREDICTIONS)}."
        )
    if unet_config.in_channels != vae_config.latent_channels:
        raise InputError(
            f"model {name}: its UNet takes {unet_config.in_channels} channels and its autoencoder gives "
            f"{vae_config.latent_channels}; pipelines for inpainting and the like are not there."
        )
    if unet_config.cross_attention_dim != text_config.hidden_size:
        raise InputError(
            f"model {name}: its UNet looks at text of width {unet_config.cross_attention_dim}, and its text "
            f"encoder gives {text_config.hidden_size}."
        )
    if len(tokenizer) > text_config.vocab_size:
        raise InputError(
            f"model {name}: its tokenizer has {len(tokenizer)} tokens, but its text encoder has embeddings "
            f"for {text_config.vocab_size}."
        )


@contextmanager
def without_reports() -> Iterator[None]:
    """Without diffusers' reports and progress bars."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
