"""Weights formed just in time: the model stays as it was loaded, and each module computes with others.

While `formed` is open, a module's own parameters are replaced right before its forward pass and put back
right after it. One module's weights exist in memory beside the model at a time, nothing is ever written
into the model, and so nothing drifts however many forward passes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.models.tuning import canonical_name

Form = Callable[[str, Tensor], Tensor]


@contextmanager
def formed(model: nn.Module, form: Form) -> Iterator[None]:
    """Inside, every floating-point parameter of `model` acts as `form(name, parameter)`.

    For inference only: gradients would belong to the replaced weights. A parameter that two modules share
    has one name and so one form.

    Args:
        model: Used through its modules' `forward`; a parameter that some other module reads directly keeps
            its own value there (no model of transformers that fedtune loads does that).
        form: Gets the parameter's canonical name and its own value, which it must not change.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():  # a tied parameter comes once, under its first name
        names[id(parameter)] = canonical_name(model, name)
    hidden: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}

    def replace(module: nn.Module, args: Any) -> None:
        swapped = hidden.setdefault(id(module), [])
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                own = parameter.data
                swapped.append((parameter, own))
                parameter.data = form(names[id(parameter)], own)

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        for parameter, own in hidden.pop(id(module), []):
            parameter.data = own

    handles = []
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(replace))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for swapped in hidden.values():
            for parameter, own in swapped:
                parameter.data = own
