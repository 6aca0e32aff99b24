"""What local training makes smaller: the loss on answers, or on which of two answers is preferred.

What the latter two are stands in preference.py.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fedtune.core.settings import Settings


class Objective(Settings):
    """The objective of a client's steps."""

    name: Literal["sft", "dpo", "orpo"] = "sft"  # loss on answers, or on pairs of which one is preferred
    beta: float = Field(0.1, gt=0)  # dpo: β; orpo: λ of the odds ratio

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.name == "sft" and self.beta != 0.1:
            raise ValueError("beta has no effect with name: sft; it belongs to dpo and orpo")
        return self

    @property
    def of_pairs(self) -> bool:
        """Whether it takes pairs of answers, one of which is preferred."""
        return self.name != "sft"


class Preferring(Settings):
    """What training makes smaller."""

    objective: Objective = Objective()

    @model_validator(mode="after")
    def _reference(self) -> Self:
        if self.objective.name != "dpo":
            return self
        trains, lora = getattr(self, "trainable", ""), getattr(self, "lora", None)
        if trains != "lora":
            raise ValueError(
                "objective: dpo has as its reference the model with the adapter switched off; take "
                f"trainable: lora, got {trains}, or objective: orpo, which has none"
            )
        if lora is not None and (lora.bias != "none" or lora.modules_to_save):
            raise ValueError(
                "objective: dpo has as its reference the model with the adapter switched off, in which "
                "biases and whole modules that were trained would be left; leave lora.bias and "
                "lora.modules_to_save out"
            )
        if (how := getattr(self, "aggregation", "mean")) in ("stack", "residual"):
            raise ValueError(
                "objective: dpo has as its reference the model with the adapter switched off, and "
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
