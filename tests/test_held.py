"""What a method says that a client holds while it computes: its bytes, added up by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fedcybgd_bench import bench
from model_families import build
from torch import Tensor, nn
from toy import Bench

from fedtune.data.encoded import Encoded
from fedtune.measure.memory import MemoryMeter
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.fedkseed.method import FedKSeed
from fedtune.methods.fedkseed.settings import Config as KSeedConfig

DATA = {0: [Encoded((3, 9, 4, 7), (3, 9, 4, 7))] * 2}


def tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from (*thing.parameters(), *thing.buffers())
    elif isinstance(thing, torch.optim.Optimizer):
        yield from tensors(list(thing.state.values()))
    elif isinstance(thing, dict):
        yield from tensors(list(thing.values()))
    elif isinstance(thing, list | tuple):
        for one in thing:
            yield from tensors(one)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that each step is told of, shared memory once, without an optimiser's counts of steps."""
    found: list[int] = []
    step = MemoryMeter.step

    def noted(self: MemoryMeter, size: int, resident: Any = (), **about: Any) -> Any:
        resident = list(resident)
        each = {t.data_ptr(): t.nbytes for t in tensors(resident) if t.numel() > 1}
        found.append(sum(each.values()))
        return step(self, size, resident, **about)

    monkeypatch.setattr(MemoryMeter, "step", noted)
    return found


def bytes_of(*things: Any) -> int:
    return sum({t.data_ptr(): t.nbytes for t in tensors(list(things)) if t.numel() > 1}.values())


@pytest.mark.parametrize(
    ("settings", "dtype", "times"),
    [
        ({}, torch.float32, 3),  # weights and Adam's two moments
        ({"proximal": 0.5}, torch.float32, 4),  # and where the round began
        ({"optimizer": "sgd"}, torch.float32, 1),
        ({"optimizer": "sgd", "momentum": 0.5}, torch.float32, 2),
        ({"optimizer": "sgd", "control_variates": True}, torch.float32, 2),
        ({}, torch.bfloat16, 1 + 2 * 3),  # bfloat16 weights; masters and moments are twice as wide
        ({"proximal": 0.5}, torch.bfloat16, 1 + 2 * 4),
    ],
)
def test_a_client_of_fedavg(
    settings: dict[str, Any], dtype: torch.dtype, times: int, held: list[int]
) -> None:
    config = {"trainable": "full", "local_steps": 2, "batch_size": 1, "lr": 1e-3, **settings}
    b = Bench(FedAvg(Config(**config), seed=0), build("llama", dtype), DATA)
    b.round(1)
    weights, buffers = bytes_of(*b.model.parameters()), bytes_of(*b.model.buffers())
    moments = 2 * (4 // dtype.itemsize) * weights if config.get("optimizer") is None else 0
    assert held[1] == times * weights + buffers
    first = times * weights + buffers - moments - (weights if config.get("momentum") else 0)
    assert held[0] == first  # an optimiser has no state before its first step


def test_a_client_of_fedkseed(held: list[int]) -> None:
    config = KSeedConfig(seeds=8, local_steps=2, epsilon=1e-3)
    b = Bench(FedKSeed(config, seed=0), build("llama"), DATA)
    b.round(1)
    assert held == [bytes_of(b.model)] * 2


def test_a_client_of_fedcybgd(held: list[int]) -> None:
    b = bench(1, blocks=3, local_steps=2, local_epochs=None)
    model = bytes_of(b.model)
    own = sum(w.nbytes for name, w in b.state.weights.items() if name.startswith("0:"))
    b.round(1)
    # its own block as it came, in memory where there is no disk; from the second step two moments of it
    assert [size - model for size in held] == [own, 3 * own]


@pytest.mark.parametrize("method", ["fedavg", "fedcybgd"])
def test_a_step_is_as_large_as_the_largest_of_its_batches(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which the meter chooses the steps that it follows: tokens of a batch, padding included."""
    sizes: list[int] = []
    step = MemoryMeter.step

    def noted(self: MemoryMeter, size: int, resident: Any = (), **about: Any) -> Any:
        sizes.append(size)
        return step(self, size, resident, **about)

    monkeypatch.setattr(MemoryMeter, "step", noted)
    common = {"batch_size": 1, "gradient_accumulation": 3, "lr": 1e-3}
    rows = [Encoded((3,) * n, (3,) * n) for n in (2, 7, 4)]
    if method == "fedavg":
        one = Bench(FedAvg(Config(trainable="full", **common), seed=0), build("llama"), {0: rows})
    else:
        one = bench(1, blocks=2, local_epochs=1, **common)
        one.data[0][:] = rows  # type: ignore[index]
    one.round(1)
    assert sizes == [7]
