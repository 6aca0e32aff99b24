"""The model that an adapter was put on, without a second copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as it did before it got its adapter, without dropout."""
    if not isinstance(model, PeftModel):  # it has none
        yield
        return
    asking = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    trains = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(trains)
        for parameter, asks in asking:  # PEFT has every factor ask for a gradient again
            parameter.requires_grad_(asks)
