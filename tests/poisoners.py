"""A plugin file that alters the replies of some clients, as `poison.json` in the run's folder says.

`poison.json` holds `clients`, `rounds` and `factor`: what the tensors of their replies are multiplied by.
`limit` puts every number just below what the wire takes instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fedtune.core.aggregate import LIMIT
from fedtune.core.client import ClientRunner
from fedtune.core.types import Payload
from fedtune.core.wire import Content, decode, encode

POISON = json.loads((Path.cwd() / "poison.json").read_text())
handle = ClientRunner.handle


def altered(frame: bytes, factor: float | None) -> bytes:
    """A reply with its tensors multiplied, or, without a factor, as large as they may be."""
    reply = decode(frame)
    tensors = {
        name: tensor * factor if factor is not None else torch.full_like(tensor, LIMIT * 0.999)
        for name, tensor in reply.payload.tensors.items()
    }
    return encode(Content(Payload(tensors, reply.payload.scalars), reply.meta))


def poisoned_handle(self: ClientRunner, client: int, frame: Any) -> bytes:
    round, answer = decode(bytes(frame)).meta["round"], handle(self, client, frame)
    if client in POISON["clients"] and round in POISON["rounds"]:
        return altered(answer, POISON.get("factor"))
    return answer


ClientRunner.handle = poisoned_handle  # type: ignore[method-assign]
