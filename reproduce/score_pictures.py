"""What a pipeline of pretrain_pictures.py and its CLIP can do, on drawn shapes of their own seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from fedtune.data import shapes
from fedtune.data.shapes import Figure
from fedtune.evaluation.shapes import right

TOKENS = 24  # the longest caption that the text encoders take
TRAINING = "training.json"  # how each part was trained
ABOUT = """# The bundled text-to-image pipeline

A Stable Diffusion pipeline for pictures of 32 x 32 pixels (UNet {:,} parameters, text encoder {:,},
autoencoder {:,}) and a CLIP ({:,}), float16, pre-trained from nothing by
`reproduce/pretrain_pictures.py` on the shapes that `fedtune/data/shapes.py` draws. No outside pictures,
texts or weights went in. Licence: Apache-2.0, as the rest of fedtune.

{trained}

`python reproduce/pretrain_pictures.py --out FOLDER --part scores` writes this file:

{rows}
"""


def drawn(figures: Sequence[Figure], rng: np.random.Generator) -> Tensor:
    """Pictures (figures, 3, side, side)."""
    return torch.from_numpy(np.stack([shapes.picture(figure, rng) for figure in figures]))


def encoded(tokens: CLIPTokenizer, texts: Sequence[str]) -> Any:
    """Ids and mask, each (texts, TOKENS)."""
    return tokens(list(texts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")


def scores(pipeline: StableDiffusionPipeline, *, held_out: bool, count: int = 50) -> dict[str, float]:
    """The pixel check of pictures that the pipeline draws, by attribute and as "all"."""
    rng = np.random.default_rng(50)
    figures = [shapes.any_figure(rng, held_out=held_out) for _ in range(count)]
    results = []
    for at in range(0, count, 25):
        some = figures[at : at + 25]
        made = pipeline(
            [figure.caption() for figure in some],
            num_inference_steps=20,
            guidance_scale=3.0,
            height=shapes.SIZE,
            width=shapes.SIZE,
            generator=[torch.Generator().manual_seed(at + each) for each in range(len(some))],
            output_type="np",
        ).images
        pixels = made.transpose(0, 3, 1, 2) * 2 - 1
        results += [right(each, figure, shapes.SHAPES) for each, figure in zip(pixels, some, strict=True)]
    named = {key: float(np.mean([result[key] for result in results])) for key in results[0]}
    return named | {"all": float(np.mean([all(result.values()) for result in results]))}


def chosen(model: CLIPModel, tokens: CLIPTokenizer, *, hard: bool, count: int = 200) -> float:
    """How often the right caption of eight is nearest to a picture; hard: others differ in one attribute."""
    rng, hits = np.random.default_rng(7), 0
    for _ in range(count):
        figure = shapes.any_figure(rng, wide=True, held_out=None)
        texts = [figure.caption()]
        while len(texts) < 8:
            other = shapes.like(figure, rng) if hard else shapes.any_figure(rng, wide=True, held_out=None)
            texts += [other.caption()] if other.caption() not in texts else []
        with torch.no_grad():
            found = model(pixel_values=drawn([figure], rng), **encoded(tokens, texts)).logits_per_image
        hits += int(found.argmax() == 0)
    return hits / count


def decibels(vae: AutoencoderTiny) -> float:
    """Peak signal to noise of pictures through the autoencoder."""
    rng = np.random.default_rng(9)
    pictures = drawn([shapes.any_figure(rng, wide=True, held_out=None) for _ in range(300)], rng)
    with torch.no_grad():
        error = F.mse_loss(vae.decode(vae.encode(pictures).latents).sample, pictures)
    return float(10 * torch.log10(4 / error))


def note(out: Path, part: str, steps: int, seed: int) -> None:
    """Keeps how a part was trained, beside it."""
    file = out / TRAINING
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(known | {part: {"steps": steps, "seed": seed}}, indent=2) + "\n", "utf-8")


def show_scores(out: Path) -> None:
    """Prints what the files in `out` can do, as a Markdown table, and writes it into README.md there."""
    tokens = CLIPTokenizer.from_pretrained(out / "tokenizer")
    pipeline = StableDiffusionPipeline.from_pretrained(
        out,
        dtype=torch.float32,
        local_files_only=True,
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    clip = CLIPModel.from_pretrained(out / "clip", dtype=torch.float32).eval()
    rows = ["| what | score |\n|---|---|"]
    rows += [f"| autoencoder, peak signal to noise | {decibels(pipeline.vae):.1f} dB |"]
    for name, held_out in (("trained", False), ("never trained", True)):
        for key, value in scores(pipeline, held_out=held_out, count=100).items():
            rows += [f"| pixel check of 100 pictures, {name} combinations, {key} | {value:.2f} |"]
    for name, hard in (("any", False), ("one attribute off", True)):
        found = chosen(clip, tokens, hard=hard)
        rows += [f"| CLIP, right caption of eight, the others {name} | {found:.3f} |"]
    print("\n".join(rows))
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.vae, clip)
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    trained = json.loads((out / TRAINING).read_text(encoding="utf-8"))
    (out / "README.md").write_text(ABOUT.format(*sizes, trained=told(trained), rows="\n".join(rows)), "utf-8")


def told(trained: Mapping[str, Mapping[str, int]]) -> str:
    """How parts were trained."""
    return "\n".join(
        f"* {part}: {about['steps']:,} steps, seed {about['seed']}" for part, about in trained.items()
    )
