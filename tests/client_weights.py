"""The weights that a zeroth-order client's modules compute with, seen from inside a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def computed_with(model: nn.Module, weights: Any) -> dict[str, Tensor]:
    """What each parameter is while `weights` (of `step_weights`) takes a loss, unperturbed; by name.

    Whatever way the weights come about, an operation on a parameter gets them.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, inputs: Any) -> None:
        for parameter in module.parameters(recurse=False):
            now, name = parameter.clone().detach(), names[id(parameter)]
            assert name not in seen or torch.equal(now, seen[name])  # tied: both modules use the same
            seen[name] = now

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    tokens = torch.tensor([[3, 4, 5]])
    weights.loss({"input_ids": tokens, "labels": tokens}, 0, 0.0)
    for hook in hooks:
        hook.remove()
    return seen
