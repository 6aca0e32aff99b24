"""A client's part of a round's sum: its share of the cohort, and its update as one vector of integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedtune.core.cohort import TRAINED_TOKENS
from fedtune.core.types import Payload, SumMethod
from fedtune.protection.settings import Privacy

Shapes = Mapping[str, tuple[int, ...]]

LOSS_UNIT = 2.0**-22  # what 1 stands for in the sum of the clients' training losses
LOSS_NUMBERS = 2  # of a summand: behind the update's own numbers come those of `CohortShare.loss`


@dataclass(frozen=True)
class CohortShare:
    """A client's share of a cohort, weight / total, and the federation's size; no share of a secret."""

    weight: int
    total: int
    population: int

    def summand(self, method: SumMethod[Any], payload: Payload, shapes: Shapes) -> dict[str, Tensor]:
        """What a reply with this share adds to the sum."""
        return method.summand(
            payload, weight=self.weight, total=self.total, population=self.population, shapes=shapes
        )

    def loss(self, metrics: Mapping[str, float]) -> Tensor:
        """What a training loss adds to the sum, int64 (2): loss · tokens / total, in LOSS_UNIT, and tokens.

        A method that does not count its trained tokens has its loss weighted by the client's weight.
        """
        tokens = int(metrics.get(TRAINED_TOKENS, self.weight))
        return torch.tensor([round(metrics.get("train_loss", 0.0) * tokens / self.total / LOSS_UNIT), tokens])

    def clip(self, privacy: Privacy, unit: float) -> float:
        """The largest norm of a summand, in units."""
        return privacy.clip * self.weight / self.total / unit


def mean_loss(numbers: Tensor, total: int) -> float | None:
    """The training loss that a sum of `CohortShare.loss` stands for; None if no token was trained on."""
    loss, tokens = numbers.tolist()
    return loss * LOSS_UNIT * total / tokens if tokens else None


def length(shapes: Shapes) -> int:
    """Numbers of a vector of these tensors."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def flatten(tensors: Mapping[str, Tensor], shapes: Shapes) -> Tensor:
    """Tensors as one vector, by name.

    Raises:
        ValueError: They are not those of `shapes`.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != dict(shapes):
        raise ValueError(f"a sum of {dict(shapes)} was asked for, and there is {found}")
    return torch.cat([tensors[name].reshape(-1) for name in sorted(shapes)])


def unflatten(vector: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """What `flatten` made one."""
    names = sorted(shapes)
    parts = vector.split([torch.Size(shapes[name]).numel() for name in names])
    return {name: part.reshape(shapes[name]) for name, part in zip(names, parts, strict=True)}
