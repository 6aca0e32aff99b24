"""Which model is tuned, and how it is held."""

from __future__ import annotations

from typing import Literal

from fedtune.core.settings import Settings


class ModelSettings(Settings):
    """Which model, and how it is held."""

    name: str = "bundled"  # bundled, a Hugging Face model folder, or a hub name
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    initial: Literal["pretrained", "scratch"] = "pretrained"
    task: Literal["causal-lm", "classification"] = "causal-lm"
    device: Literal["auto", "cpu", "cuda"] = "auto"
