"""Settings of local training, which most methods share; what they do stands in local_training.py."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from fedtune.core.settings import Settings


def _words(value: object) -> object:
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


Checkpointing = Annotated[
    Literal["auto", "none", "full"] | Annotated[int, Field(ge=1)], BeforeValidator(_words)
]

Masters = Literal["float32", "kahan", "stochastic"]


class Training(Settings):
    """How a client trains within one round."""

    local_epochs: int | None = Field(None, ge=1)
    local_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    gradient_accumulation: int = Field(1, ge=1)  # batches a step, whose loss is the mean over their tokens
    optimizer: Literal["adamw", "adamw-8bit", "sgd"] = "adamw"
    lr: float = Field(3e-4, gt=0)
    lr_schedule: Literal["linear", "constant", "cosine"] = "linear"
    lr_warmup: float = Field(0.0, ge=0, lt=1)  # share of the steps, at the start, in which the rate rises
    lr_over: Literal["round", "run"] = "round"  # what rise and fall reach over: each round, or all of them
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1)  # sgd
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2)  # adamw, adamw-8bit
    max_grad_norm: float | None = Field(None, gt=0)
    optimizer_in_backward: bool = False  # a weight moves as soon as its gradient is there, which then goes
    masters: Masters = "float32"  # what a step moves in the place of bfloat16 weights, see fedavg.md
    gradient_checkpointing: Checkpointing = "auto"  # activations computed again: none, all, each N-th block's
    compile: bool = False  # blocks compiled by PyTorch at the first step; needs a C++ compiler
    offload_params: Literal["none", "disk"] = "none"  # where frozen weights of blocks are, but while in use

    @model_validator(mode="before")
    @classmethod
    def _one_epoch(cls, values: object) -> object:
        if (
            isinstance(values, dict)
            and values.get("local_epochs") is None
            and values.get("local_steps") is None
        ):
            return {**values, "local_epochs": 1}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("local_epochs and local_steps are both set; keep the one that is meant")
        if self.optimizer != "sgd" and self.momentum:
            raise ValueError(f"momentum belongs to optimizer: sgd; {self.optimizer} takes betas")
        if self.optimizer == "sgd" and self.betas != [0.9, 0.999]:
            raise ValueError("betas belong to optimizer: adamw; sgd takes momentum")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if self.optimizer_in_backward and (self.max_grad_norm is not None or self.gradient_accumulation > 1):
            together = (
                f"max_grad_norm: {self.max_grad_norm}, which is of all gradients together"
                if self.max_grad_norm is not None
                else f"gradient_accumulation: {self.gradient_accumulation}, which adds gradients up"
            )
            raise ValueError(
                "optimizer_in_backward takes each weight's step before the other gradients are there; it "
                f"does not go with {together}. Leave one of the two out"
            )
        if self.compile and self.offload_params != "none":
            raise ValueError(
                "compile is for weights that stay where they are, and offload_params is "
                f"{self.offload_params}; leave one of the two out"
            )
        return self

    def rate(self, step: int, steps: int, round: int = 1) -> float:
        """The learning rate of a step.

        With w of n steps to rise in, step s from 0 and p = (s − w) / (n − w) it is

            lr · (s + 1) / (w + 1)      while s < w
            lr · (1 − p)                then, linear
            lr · (1 + cos πp) / 2       cosine
            lr                          constant

        Args:
            step: Of the round, from 0.
            steps: Of a round.
            round: From 1. With `lr_over: run` n is all rounds' steps, as many in each as in this one.
        """
        if self.lr_over == "run":
            step, steps = (round - 1) * steps + step, getattr(self, "rounds", 1) * steps
        rise = math.ceil(self.lr_warmup * steps)
        if step < rise:
            return self.lr * ((step + 1) / (rise + 1))
        done = (step - rise) / (steps - rise)
        if self.lr_schedule == "cosine":
            return self.lr * (0.5 * (1 + math.cos(math.pi * done)))
        return self.lr * (1 - done if self.lr_schedule == "linear" else 1.0)

    def steps(self, examples: int) -> int:
        """Optimiser steps of a round for a client with that many examples."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.local_epochs is not None
        return self.local_epochs * math.ceil(
            math.ceil(examples / self.batch_size) / self.gradient_accumulation
        )
