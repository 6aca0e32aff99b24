"""What tests of secure aggregation share: its settings, and states compared by their bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedtune.core.state import to_payload
from fedtune.protection.settings import SecureAggregation

SECURE = SecureAggregation()


def bits_of(bench: Any) -> dict[str, Tensor]:
    return dict(to_payload(bench.state).tensors)


def equal(one: Any, other: Any) -> bool:
    mine, theirs = bits_of(one), bits_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
