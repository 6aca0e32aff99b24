"""Settings of FedBiOT, FedOT and Offsite-tuning; what they are for stands in method.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, field_validator, model_validator

from fedtune.core.settings import Settings
from fedtune.methods.settings import Training
from fedtune.methods.tuning import Lora

if TYPE_CHECKING:
    from fedtune.data.encoded import Encoded


class Alignment(Settings):
    """How the server tunes the emulator's LoRA on its public examples."""

    steps_before: int = Field(500, ge=0)  # before the first round
    steps: int = Field(10, ge=0)  # after each round
    batch_size: int = Field(10, ge=1)  # public examples a step
    lr: float = Field(3e-3, gt=0)  # constant; for a model of billions the paper's 1e-5 to 1e-4
    form: Literal["mean", "paper", "rms-normalized"] = "mean"  # of the first term, see fedbiot.md
    keep_mb: int = Field(1024, ge=0)  # of what the model makes of public examples, kept to be used again

    def batch(self, public: Sequence[Encoded]) -> str:
        """A step's batch, and what makes it smaller, for a server whose memory is too small."""
        size, longest = min(self.batch_size, len(public)), max(len(item.input_ids) for item in public)
        return (
            f"Its batches have up to {size} public examples x {longest} tokens: lower "
            "method.alignment.batch_size, method.alignment.keep_mb or data.max_length."
        )


class Config(Training):
    """Settings of `method.name: fedbiot`."""

    name: Literal["fedbiot", "fedot", "offsite-tuning"] = "fedbiot"  # the method

    @property
    def quantized_refusal(self) -> str:
        """The emulator is made of the model's own weights, and trained."""
        return (
            "clients are sent an emulator that is cut from the model's own weights and aligned by training "
            "them; take fedavg with trainable: lora"
        )

    rounds: int = Field(10, ge=1)  # communication rounds
    adapter_layers: int = Field(2, ge=1)  # s, the blocks that clients train
    both_ends: bool = False  # the adapter is the first and the last s/2 blocks instead of the last s
    emulator: Literal["layer-dropout", "channel-pruning"] = "layer-dropout"  # how E* is compressed
    layer_dropout: float = Field(0.2, ge=0, lt=1)  # β, the share of E* (blocks, or channels) that is left out
    proximal: float = Field(0.0, ge=0)  # ε, of the distance from the round's start, in reconstructed weights
    distill_weight: float = Field(100.0, ge=0)  # λ
    lora: Lora = Lora(rank=8, alpha=16.0)  # of adapter and emulator; no dropout
    alignment: Alignment = Alignment()
    batch_size: int = Field(10, ge=1)  # examples a batch
    betas: list[float] = Field([0.9, 0.95], min_length=2, max_length=2)  # adamw, also when aligning

    @model_validator(mode="before")
    @classmethod
    def _one_epoch(cls, values: object) -> object:
        """30 local steps unless steps or epochs are given; SGD has no betas."""
        if not isinstance(values, dict):
            return values
        if values.get("local_epochs") is None and values.get("local_steps") is None:
            values = {**values, "local_steps": 30}
        if values.get("optimizer") == "sgd":
            values = {"betas": [0.9, 0.999], **values}
        return values

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if self.masters != "float32":
            raise ValueError(
                f"masters: {self.masters} is for bfloat16 weights that are trained; {self.name} trains LoRA, "
                "which is float32; leave it out"
            )
        if self.optimizer_in_backward and self.proximal:
            raise ValueError(
                "optimizer_in_backward takes a step from the gradient of the loss alone, and proximal "
                f"({self.proximal}) adds a penalty of all factors to it; leave one of the two out"
            )
        return self

    @field_validator("lora")
    @classmethod
    def _one_rank(cls, lora: Lora) -> Lora:
        if lora.client_ranks:
            raise ValueError("clients of unlike ranks (client_ranks) are for fedavg; leave it out")
        if lora.dropout:
            raise ValueError("dropout is for fedavg; the emulator is aligned without it, leave it out")
        if said := lora.more():
            raise ValueError(
                f"{said} is for fedavg, standalone and centralized; the emulator is aligned in plain "
                "factors, leave it out"
            )
        return lora

    @property
    def aligns(self) -> bool:
        """Whether the emulator changes between rounds, so that its LoRA travels."""
        return self.layer_dropout > 0 and self.alignment.steps > 0


class OffsiteConfig(Config):
    """Settings of `method.name: fedot` and `offsite-tuning`."""

    name: Literal["fedbiot", "fedot", "offsite-tuning"] = "fedot"  # the method
    adapter_layers: int = Field(4, ge=1)  # s, half of them at either end
    both_ends: bool = True  # the first and the last s/2 blocks
    alignment: Alignment = Alignment(steps=0)  # on public data, before the first round alone

    @model_validator(mode="before")
    @classmethod
    def _before_only(cls, values: object) -> object:
        """No steps between rounds, also where other settings of the alignment are given."""
        if isinstance(values, dict) and isinstance(values.get("alignment"), dict):
            return {**values, "alignment": {"steps": 0, **values["alignment"]}}
        return values


class OneClientConfig(OffsiteConfig):
    """Settings of `method.name: offsite-tuning`."""

    name: Literal["fedbiot", "fedot", "offsite-tuning"] = "offsite-tuning"  # the method
