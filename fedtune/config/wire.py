"""What `federation.wire` asks for: how the updates that clients send travel; see core/compression.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from fedtune.core.settings import Settings

if TYPE_CHECKING:
    from fedtune.core.compression import Compression


class Wire(Settings):
    """How updates travel: in which dtype, and how many of their numbers; see wire.md."""

    dtype: Literal["float32", "bfloat16", "int8", "int4"] = "float32"  # narrower ones rounded without bias
    top_k: float | None = Field(None, gt=0, lt=1)  # share of each tensor's numbers that travels: the largest
    error_feedback: bool = False  # a client adds what its last update lost to the next

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.error_feedback and not self.compresses:
            raise ValueError(
                "error_feedback keeps what compression loses, and dtype: float32 without top_k loses "
                "nothing; set one of them"
            )
        return self

    @property
    def compresses(self) -> bool:
        """Whether anything travels otherwise than as the method sends it."""
        return self.dtype != "float32" or self.top_k is not None

    def refusal(self, method: Any, *, secure: bool, privacy: bool) -> str | None:
        """Why compression does not go with a method, or with masks or noise; None if it does."""
        from fedtune.core.compression import CompressedMethod  # here, so that settings are read without torch

        name, single = method.config.name, method.rounds == 1
        if not method.uses_wire:
            return f"the clients of {name} send nothing"
        if secure:
            return (
                "under federation.secure_aggregation an update travels as numbers of secure_aggregation.bits "
                "bits each, whatever is masked in them, and all of them; lower these bits in its place"
            )
        if privacy and self.error_feedback:
            return (
                "federation.privacy counts each round by itself, and with error_feedback a client sends what "
                "it kept from the rounds that asked it; leave error_feedback out"
            )
        if not isinstance(method, CompressedMethod):
            return f"the clients of {name} send no updates of weights; what they send is small already"
        if self.error_feedback and single:
            return "error_feedback adds what one round lost to the next, and there is one; leave it out"
        reason = method.compression_refusal(sparse=self.top_k is not None, feedback=self.error_feedback)
        return reason and f"{name}: {reason}"

    def compression(self, method: Any) -> Compression | None:
        """What both ends of the wire do; None for nothing, and for a method that sends nothing."""
        if not self.compresses or not method.uses_wire:
            return None
        from fedtune.core.compression import Compression

        return Compression(method, self.dtype, self.top_k, self.error_feedback)
