"""Settings and state of FedCyBGD and FedBAvg; what they are for stands in method.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fedtune.methods.fedcybgd.order import BlockOrder
from fedtune.methods.fedcybgd.powersgd import PowerSGD
from fedtune.methods.local_training import Checkpointing, Training
from fedtune.methods.tuning import InBlocks
from fedtune.models.compression import Compression


class Config(InBlocks, Training):
    """Settings of `method.name: fedcybgd`."""

    name: Literal["fedcybgd", "fedbavg"] = "fedcybgd"  # the method
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
        return self


class FedBAvgConfig(Config):
    """Settings of `method.name: fedbavg`."""

    name: Literal["fedcybgd", "fedbavg"] = "fedbavg"

    @model_validator(mode="after")
    def _no_cycle(self) -> Self:
        if self.compression == "hybrid":
            raise ValueError("compression: hybrid prunes what a cycle has updated; fedbavg has no cycle")
        return self


@dataclass(frozen=True)
class State:
    """The server's state.

    Attributes:
        weights: Parameters that are trained, by "part:name", in the model's dtype: what clients get.
        masters: Float32 values of those that have changed, where the model's dtype is narrower.
        versions: The turn, from 1, that last changed a part, by its name.
        held: What each client has, as JSON: the version of each part by its name.
        answered: The turn, from 1, of each client's last reply.
        heads, channels: What pruning keeps of a block in its present version, by its name.
        turns: Turns that are over, answered or not.
        missed: The last turn, from 1, that nobody answered; 0: none.
    """

    weights: dict[str, Tensor]
    masters: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    answered: dict[str, int] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)
    turns: int = 0
    missed: int = 0
