"""How tensors are computed, where a device leaves a choice: which bits are promised, and at what price."""

from __future__ import annotations

from typing import Literal

from fedtune.core.settings import Settings


class Computing(Settings):
    """How tensors are computed, where a device leaves a choice."""

    deterministic: Literal["strict", "fast"] = "strict"
    tf32: bool = False
