"""Which model is tuned, and how it is held."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedtune.core.settings import Settings

CARD = r"^cuda:\d{1,3}$"


Card = Annotated[str, Field(pattern=CARD)]
Device = Literal["auto", "cpu", "cuda"] | Card


class ModelSettings(Settings):
    """Which model, and how it is held."""

    name: str = "bundled"  # bundled, a Hugging Face model folder, or a hub name
    revision: str | None = Field(None, min_length=1)  # of a hub model: a commit, a branch or a tag
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "int8", "nf4"] = "none"  # linear layers of blocks: quantized.md
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"  # which implementation of it
    adapter: str | None = Field(None, min_length=1)  # PEFT folder, or a run, whose adapter is trained further
    initial: Literal["pretrained", "scratch"] = "pretrained"
    task: Literal["causal-lm", "classification"] = "causal-lm"
    device: Device | list[Card] = "auto"

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
        if isinstance(self.device, list) and len(set(self.device)) < max(1, len(self.device)):
            raise ValueError(f"device: name each GPU once, as in [cuda:0, cuda:1], got {self.device}")
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
