"""Which devices of this machine `model.device` stands for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedtune.errors import InputError


def device_of(device: str | Sequence[str]) -> torch.device:
    """Where the model lies and the server works: of a list the first.

    Raises:
        InputError: This machine has no such device, or not all of a list.
    """
    named = [device] if isinstance(device, str) else list(device)
    if named == ["cpu"] or (named == ["auto"] and not torch.cuda.is_available()):
        return torch.device("cpu")
    there = [f"cuda:{card}" for card in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    for name in named:
        if name not in (["auto", "cuda", *there] if there else []):
            sees = f"only {', '.join(there)}" if there else "no GPU"
            ways = ", ".join([*there, *(["cuda"] if there else []), "auto or cpu"])
            raise InputError(f"model.device is {name}, but PyTorch sees {sees} here; set it to {ways}")
    return torch.device("cuda" if named[0] == "auto" else named[0])


def cards_of(device: str | Sequence[str]) -> list[int]:
    """The GPUs that clients train on, by their number among those that this process sees; none on a CPU.

    Raises:
        InputError: As `device_of`.
    """
    if device_of(device).type == "cpu":
        return []
    if device in ("auto", "cuda"):
        return list(range(torch.cuda.device_count()))
    return [torch.device(name).index for name in ([device] if isinstance(device, str) else device)]
