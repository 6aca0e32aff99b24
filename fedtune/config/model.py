"""Which model is tuned, and how it is held."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from fedtune.config.pictures import Diffusion
from fedtune.core.settings import Settings

CARD = r"^cuda:\d{1,3}$"
ONE_GPU = (
    "A model lies on one GPU: dividing one over several (device_map, FSDP) is not there. Several train as "
    "many clients at a time (model.device: [cuda:0, cuda:1] with transport.workers: auto). What is too large "
    "for one fits with model.quantization: nf4, method.gradient_checkpointing: full, "
    "method.offload_params: disk or method.name: fedkseed, and fedtune plan says which"
)


class ModelSettings(Settings):
    """Which model, and how it is held."""

    name: str = "bundled"  # bundled, a Hugging Face model folder, or a hub name
    revision: str | None = Field(None, min_length=1)  # of a hub model: a commit, a branch or a tag
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "int8", "nf4"] = "none"  # linear layers of blocks: quantized.md
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"  # which implementation of it
    adapter: str | None = Field(None, min_length=1)  # PEFT folder, or a run, whose adapter is trained further
    initial: Literal["pretrained", "scratch"] = "pretrained"
    task: Literal["causal-lm", "classification", "text-to-image"] = "causal-lm"
    diffusion: Diffusion | None = None  # with task: text-to-image
    device: str | list[str] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _not_divided(cls, values: object) -> object:
        """Refuses the settings by which accelerate divides a model, with what there is in their place."""
        for name in ("max_memory", "device_map", "fsdp", "fsdp_config"):
            if isinstance(values, dict) and name in values:
                raise ValueError(
                    f"{name} is how accelerate divides a model over devices; leave it out. {ONE_GPU} "
                    "(memory_by_device in its --json) before anything is loaded. What evaluation may take is "
                    "evaluation.memory"
                )
        return values

    @model_validator(mode="after")
    def _of_the_hub(self) -> Self:
        if self.revision is not None and (self.name == "bundled" or Path(self.name).expanduser().is_dir()):
            raise ValueError(
                f"revision: {self.revision} is of a hub model, and name: {self.name} is on this machine; "
                "leave revision out"
            )
        return self

    @model_validator(mode="after")
    def _cards(self) -> Self:
        named = self.device if isinstance(self.device, list) else [self.device]
        words = () if isinstance(self.device, list) else ("auto", "cpu", "cuda")
        known = all(name in words or re.match(CARD, name) for name in named)
        if not known or len(set(named)) < max(1, len(named)):
            raise ValueError(
                "device must be auto, cpu, cuda, one GPU as cuda:1, or a list that names each once, as "
                f"[cuda:0, cuda:1], got {self.device}. {ONE_GPU}"
            )
        return self

    @property
    def cards(self) -> list[str]:
        """GPUs that are named by number."""
        named = self.device if isinstance(self.device, list) else [self.device]
        return [name for name in named if name.startswith("cuda:")]

    @property
    def place(self) -> str:
        """What to load: the name, with @ and the revision behind it if there is one."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"
