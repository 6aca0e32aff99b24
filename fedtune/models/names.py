"""What `model.name` can be."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

BUNDLED = "bundled"


def bundled_folder() -> Path:
    """Where the bundled model's files are."""
    return Path(str(importlib.resources.files("fedtune.models") / BUNDLED))


def bundled_pipeline() -> Path:
    """Where the bundled text-to-image pipeline's files are, in a folder for each part."""
    return Path(str(importlib.resources.files("fedtune.models") / "bundled_pipeline"))


def bundled_clip() -> Path:
    """Where the bundled CLIP is, which knows drawn shapes alone."""
    return bundled_pipeline() / "clip"


def listing() -> list[dict[str, str]]:
    """What `model.name` can be: `name`, `summary` and `origin` of each kind."""
    bundled = (
        "1 M parameters, comes with fedtune: Llama architecture, pre-trained on generated text; with "
        "model.task: text-to-image a pipeline of 1.8 M, pre-trained on drawn shapes"
    )
    folder = "a Hugging Face causal language model or RoBERTa/BERT classifier, or a Stable Diffusion pipeline"
    return [
        {"name": "bundled", "summary": bundled, "origin": "fedtune"},
        {"name": "FOLDER", "summary": folder, "origin": "this machine"},
        {"name": "OWNER/NAME", "summary": "the same from the Hugging Face hub", "origin": "Hugging Face hub"},
    ]
