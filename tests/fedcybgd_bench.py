"""FedCyBGD on small models, with a look at what goes over the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from model_families import build
from torch import Tensor
from toy import Bench

from fedtune.core.types import ClientError, Payload
from fedtune.core.wire import Content, decode, encode
from fedtune.data.encoded import Encoded
from fedtune.methods.fedcybgd.method import FedCyBGD
from fedtune.methods.fedcybgd.settings import Config

SETTINGS: dict[str, Any] = {"local_epochs": 2, "batch_size": 2, "lr": 1e-2, "lr_schedule": "constant"}


def examples(count: int, first: int, family: str = "llama") -> list[Encoded]:
    found = []
    for k in range(count):
        ids = tuple(3 + (first * 7 + k * 5 + j * 11) % 60 for j in range(3 + k % 3))
        found.append(Encoded(ids, (k % 3,) if family == "roberta" else ids))
    return found


def bench(
    clients: int = 3,
    *,
    family: str = "llama",
    blocks: int = 3,
    dtype: torch.dtype = torch.float32,
    config: type[Config] = Config,
    robust: Any = None,
    **settings: Any,
) -> Bench:
    method = FedCyBGD(config.model_validate({**SETTINGS, **settings}), 0)
    data = {client: examples(2 + client, client, family) for client in range(clients)}
    return Bench(method, build(family, dtype, blocks), data, robust=robust)


class Spy:
    """Notes every order, and lets some clients fail or answer something else."""

    def __init__(self, bench: Bench) -> None:
        self.orders: list[tuple[int, Payload]] = []
        self.fail: set[int] = set()
        self.replies: list[Payload] = []
        self.change: dict[int, Any] = {}
        self._handle = bench.runner.handle
        bench.runner.handle = self  # type: ignore[assignment, method-assign]

    def __call__(self, client: int, frame: bytes) -> bytes:
        self.orders.append((client, decode(frame).payload))
        if client in self.fail:
            raise ClientError("gone")
        reply = self._handle(client, frame)
        message = decode(reply)
        self.replies.append(message.payload)
        if client in self.change:
            return encode(Content(self.change[client](message.payload), message.meta))
        return reply


def part_of(name: str) -> str:
    return name.partition(":")[0]


def changed_parts(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}
