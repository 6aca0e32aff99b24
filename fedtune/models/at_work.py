"""Models that lie on the host, and on a GPU while they compute.

In a simulation one card serves all roles in turn. The server's models, and those that clients were sent, are
not needed there together: each comes for as long as it computes, and so the card holds what the largest role
needs and not the sum. The host keeps its copy meanwhile, and nothing has to be copied back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")


@contextmanager
def at_work(models: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, models of the host are on the device; parameters are the same objects there and afterwards.

    Models that share memory share it on the device too. From another device they come back with the values
    that they went with: what is trained inside has to be read inside.

    Args:
        models: On the host. Those that are elsewhere stay there.
        device: On a CPU nothing happens.
    """
    there: dict[object, Tensor] = {}
    back: dict[object, Tensor] = {}

    def come(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor
        place = _place(tensor)
        if place not in there:
            there[place] = tensor.detach().to(device)
            back[_place(there[place])] = tensor.detach()  # `there` keeps the memory from being another's
        return there[place].detach()

    def go(tensor: Tensor) -> Tensor:
        return back[_place(tensor)].detach() if _place(tensor) in back else tensor.detach().to(HOST)

    moved = [] if device.type == "cpu" else [model for model in models if _on_host(model)]
    try:
        for model in moved:
            model._apply(come)
        yield
    finally:
        for model in moved:
            model.zero_grad(set_to_none=True)
            model._apply(go)


def _on_host(model: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in model.parameters())


def _place(tensor: Tensor) -> object:
    """The same for tensors of the same memory."""
    return tensor.device.type, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
