"""Weights formed just in time: the model stays as it was loaded, and each module computes with others.

While `formed` is open, a module's own parameters are replaced right before its forward pass and put back
right after it. One module's weights exist in memory beside the model at a time, in a buffer that all
modules use in turn, nothing is ever written into the model, and so nothing drifts however many forward
passes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.models.tuning import canonical_name

Form = Callable[[str, Tensor, Tensor], None]
_ALIGNMENT = 64  # bytes


@contextmanager
def formed(model: nn.Module, form: Form) -> Iterator[None]:
    """Inside, every floating-point parameter of `model` acts as what `form` makes of it.

    For inference only: gradients would belong to the replaced weights. A parameter that two modules share
    has one name and so one form.

    Args:
        model: Used through its modules' `forward`; a parameter that some other module reads directly keeps
            its own value there (no model of transformers that fedtune loads does that).
        form: Gets the parameter's canonical name, its own value, which it must not change, and a tensor of
            the same shape and dtype to write to.
    """
    buffer = torch.empty(max(map(_own_bytes, model.modules()), default=0), dtype=torch.uint8)
    taken = 0  # bytes of the buffer in use: more than one module's only where modules with weights nest
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():  # a tied parameter comes once, under its first name
        names[id(parameter)] = canonical_name(model, name)
    hidden: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}

    def place(own: Tensor) -> Tensor:
        nonlocal taken
        begin, taken = taken, taken + _aligned(own.nbytes)
        if taken > buffer.numel() or own.device != buffer.device:
            return torch.empty_like(own)
        return buffer[begin : begin + own.nbytes].view(own.dtype).view(own.shape)

    def replace(module: nn.Module, args: Any) -> None:
        swapped = hidden.setdefault(id(module), [])
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                own = parameter.data
                swapped.append((parameter, own))
                effective = place(own)
                form(names[id(parameter)], own, effective)
                parameter.data = effective

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal taken
        for parameter, own in hidden.pop(id(module), []):
            parameter.data = own
            taken -= _aligned(own.nbytes)

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


def _own_bytes(module: nn.Module) -> int:
    return sum(_aligned(p.nbytes) for p in module.parameters(recurse=False) if p.is_floating_point())


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
