"""The base of every configuration block: strict types, no unknown key, immutable."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A block of the configuration. An unknown key or a value of another type is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    float16: ClassVar[bool] = False
    """Of a method's settings: whether the model may be float16, in which gradients underflow."""

    @property
    def quantized_refusal(self) -> str:
        """Of a method's settings: why they do not go with a quantised model; "" where they do."""
        return ""

    @property
    def adapter_refusal(self) -> str:
        """Of a method's settings: why they cannot go on from an adapter; "" where they can."""
        return "it trains no adapter of the whole model; merge the adapter and give that as model.name"
