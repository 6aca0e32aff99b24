"""Settings of FedCyBGD, FedBAvg and BAdam; what they are for stands in method.py and badam.py."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from fedtune.core.settings import Settings
from fedtune.methods.fedcybgd.order import BlockOrder
from fedtune.methods.settings import Checkpointing, Training
from fedtune.methods.tuning import InBlocks

Compression = Literal["none", "layer-drop", "hybrid"]  # see models/compression.py


class PowerSGD(Settings):
    """Each matrix's gradient is replaced by one of low rank; the rest is added to the next step's."""

    rank: int = Field(2, ge=1)  # of the approximated gradient
    iterations: int = Field(4, ge=1)  # of subspace iteration a step
    start_step: int = Field(0, ge=0)  # steps before it begins, with whole gradients
    min_compression_rate: float = Field(1.0, gt=0)  # of a matrix to its factors; one that has less stays


class Config(InBlocks, Training):
    """Settings of `method.name: fedcybgd`."""

    name: Literal["fedcybgd", "fedbavg"] = "fedcybgd"  # the method

    @property
    def quantized_refusal(self) -> str:
        """Blocks travel as whole weights."""
        return "clients are sent the blocks' own weights, whole; take fedavg with trainable: lora"

    rounds: int = Field(3, ge=1)  # cycles; of fedbavg, rounds of one turn each
    blocks_per_client: int = Field(1, ge=1)  # blocks that a client trains in its turn
    block_order: BlockOrder = "ascending"  # of each pass over the blocks
    extra_blocks: list[Literal["embeddings", "norm", "head"]] = Field([])  # trained too, behind the blocks
    compression: Compression = "none"  # of what a client gets beside its own blocks
    drop_ratio: float = Field(0.5, ge=0, lt=1)  # layer-drop, hybrid: of the blocks that may be dropped
    prune_ratio: float = Field(0.5, ge=0, lt=1)  # hybrid: of the heads and MLP channels of updated blocks
    importance_examples: int = Field(10, ge=1)  # hybrid: of the client's own, for first-order importance
    powersgd: PowerSGD | None = None  # gradients pass a low-rank filter before the optimiser
    gradient_checkpointing: Checkpointing = "full"  # activations computed again: none, all, each N-th block's

    @field_validator("extra_blocks")
    @classmethod
    def _once(cls, extra: list[str]) -> list[str]:
        if len(set(extra)) < len(extra):
            raise ValueError(f"each part once, got {', '.join(extra)}")
        return extra

    @model_validator(mode="after")
    def _added(self) -> Self:
        if self.trainable != "full" and self.extra_blocks:
            raise ValueError(f"extra_blocks train whole; they do not go with trainable: {self.trainable}")
        if self.trainable != "full" and self.compression == "hybrid":
            raise ValueError(
                "compression: hybrid prunes blocks that were trained whole; "
                f"trainable: {self.trainable} goes with layer-drop or none"
            )
        if self.lora and self.lora.client_ranks:
            raise ValueError("clients of unlike ranks (client_ranks) are for fedavg; leave it out")
        if self.lora and (said := self.lora.more(dora=False)):
            raise ValueError(
                f"lora.{said} is for fedavg, standalone and centralized; a turn trains what is added to its "
                "own block alone, leave it out"
            )
        if self.powersgd and (self.optimizer_in_backward or self.masters != "float32"):
            with_ = "optimizer_in_backward" if self.optimizer_in_backward else f"masters: {self.masters}"
            raise ValueError(
                f"powersgd filters a block's gradients together, in float32; it does not go with {with_}. "
                "Leave one of the two out"
            )
        return self


class FedBAvgConfig(Config):
    """Settings of `method.name: fedbavg`."""

    name: Literal["fedcybgd", "fedbavg"] = "fedbavg"

    @model_validator(mode="after")
    def _no_cycle(self) -> Self:
        if self.compression == "hybrid":
            raise ValueError("compression: hybrid prunes what a cycle has updated; fedbavg has no cycle")
        return self


class BAdamConfig(Training):
    """Settings of `method.name: badam`."""

    name: Literal["badam"] = "badam"

    @property
    def quantized_refusal(self) -> str:
        """It trains the blocks' weights."""
        return "it trains the blocks' own weights in turn; take centralized with trainable: lora"

    switch_interval: int = Field(100, ge=1)  # steps until the next block
    block_order: BlockOrder = "random"  # of each pass over the blocks
    extra_blocks: list[Literal["embeddings", "norm", "head"]] = Field([])  # trained too, behind the blocks
    gradient_checkpointing: Checkpointing = "full"  # activations computed again: none, all, each N-th block's
