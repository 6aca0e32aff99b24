"""Values of trained parameters put into a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedtune.core.wire import FrameError


def load(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copies values into parameters of the same names.

    Raises:
        FrameError: A value is for a parameter that is not there, or has another shape.
    """
    with torch.no_grad():
        for name, value in values.items():
            there = tuple(parameters[name].shape) if name in parameters else None
            if there != tuple(value.shape):
                raise FrameError(f"weights {name} {tuple(value.shape)} were sent, the model here has {there}")
            parameters[name].copy_(value)
