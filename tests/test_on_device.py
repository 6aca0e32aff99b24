"""Batches on their way to a device: from pinned memory and without waiting to a GPU, nowhere on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.data.batches import collate, on_device
from fedtune.data.encoded import Encoded

BATCH = collate([Encoded((3, 4, 5), (3, 4, 5)), Encoded((6, 7), (6, 7))], 0)


def test_on_a_cpu_a_batch_is_where_it_was() -> None:
    there = on_device(BATCH, torch.device("cpu"))
    assert there.keys() == BATCH.keys()
    assert all(there[name] is BATCH[name] for name in BATCH)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_to_a_gpu_it_goes_from_pinned_memory_and_nobody_waits(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, moved = list[Tensor](), dict[int, Any]()

    def pin_memory(self: Tensor) -> Tensor:
        pinned.append(self.clone())
        return pinned[-1]

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moved[id(self)] = (args, kwargs)
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    there = on_device(BATCH, torch.device(device))
    assert all(torch.equal(there[name], BATCH[name]) for name in BATCH)
    assert len(pinned) == len(BATCH) == 3
    assert [moved[id(each)] for each in pinned] == [((torch.device(device),), {"non_blocking": True})] * 3
