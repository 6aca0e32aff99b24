"""What local training makes smaller: the loss on answers, or on which of them are preferred.

What the latter are stands in preference.py (dpo, orpo) and kto.py.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fedtune.core.settings import Settings


class Objective(Settings):
    """The objective of a client's steps."""

    name: Literal["sft", "dpo", "orpo", "kto"] = "sft"  # loss on answers, on pairs, on judged answers
    beta: float = Field(0.1, gt=0)  # dpo, kto: β; orpo: λ of the odds ratio
    desirable: float = Field(1.0, gt=0)  # kto: λ_D, what a good answer weighs
    undesirable: float = Field(1.0, gt=0)  # kto: λ_U, what a bad answer weighs

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.name == "sft" and self.beta != 0.1:
            raise ValueError("beta has no effect with name: sft; it belongs to dpo, orpo and kto")
        for weight in ("desirable", "undesirable"):
            if self.name != "kto" and getattr(self, weight) != 1.0:
                raise ValueError(f"{weight} has no effect with name: {self.name}; it belongs to kto")
        return self

    @property
    def of_pairs(self) -> bool:
        """Whether it takes pairs of answers, one of which is preferred; kto also answers that were judged."""
        return self.name != "sft"


class Preferring(Settings):
    """What training makes smaller."""

    objective: Objective = Objective()

    @model_validator(mode="after")
    def _reference(self) -> Self:
        name = self.objective.name
        if name not in ("dpo", "kto"):
            return self
        if name == "kto" and getattr(self, "batch_size", 2) == 1:
            raise ValueError(
                "objective: kto measures by a batch's other answers how far the model has gone from its "
                "reference; set batch_size to 2 or more"
            )
        trains, lora = getattr(self, "trainable", ""), getattr(self, "lora", None)
        if trains != "lora":
            raise ValueError(
                f"objective: {name} has as its reference the model with the adapter switched off; take "
                f"trainable: lora, got {trains}, or objective: orpo, which has none"
            )
        if lora is not None and (lora.bias != "none" or lora.modules_to_save):
            raise ValueError(
                f"objective: {name} has as its reference the model with the adapter switched off, in which "
                "biases and whole modules that were trained would be left; leave lora.bias and "
                "lora.modules_to_save out"
            )
        if (how := getattr(self, "aggregation", "mean")) in ("stack", "residual"):
            raise ValueError(
                f"objective: {name} has as its reference the model with the adapter switched off, and "
                f"aggregation: {how} changes that in each round; take mean, svd, refine or freeze-a"
            )
        return self


def pairs_refusal(*, format: str, task: str, batching: str, too_long: str, adapter: bool) -> str | None:
    """Why a run's settings do not go with an objective that takes pairs; None if they do.

    Args:
        format: As `data.format`.
        task: As `model.task`.
        batching: As `data.batching`.
        too_long: As `data.too_long`.
        adapter: Whether training goes on from an adapter.
    """
    if task != "causal-lm":
        return f"it is for model.task: causal-lm, got {task}"
    if format not in ("auto", "preference"):
        return f"it takes records with chosen and rejected answers; set data.format: preference, got {format}"
    if batching == "packed":
        return "a pair of answers is a row of its own; set data.batching to random or length-grouped"
    if too_long == "drop":
        return "with data.too_long: drop one answer of a pair could be left alone; take cut or error"
    if adapter:
        return (
            "its reference is the model with the adapter switched off, and model.adapter would be "
            "switched off too; merge it (fedtune export --merge) and give that as model.name"
        )
    return None
