"""A client that answers its n-th order with something else than was asked; otherwise `fedtune client`.

python hostile_client.py nan,shape,cut,long --server ... (as fedtune client)
"""

from __future__ import annotations

import sys

import torch

from fedtune.cli.main import main
from fedtune.core.types import Payload
from fedtune.core.wire import Content, decode, encode
from fedtune.deploy import client as deployed_client
from fedtune.transport.messages import Message
from fedtune.transport.worker import Worker

WISHES = iter(sys.argv[1].split(","))


def _altered(wish: str, message: Message) -> Message:
    """A reply of one message as an attacker, or a broken machine, would send it."""
    frame, fields = bytes(message.body), dict(message.fields)
    if wish == "cut":
        return Message({**fields, "bytes": len(frame) - 100}, frame[:-100])
    if wish == "long":
        return Message({**fields, "bytes": 2 << 30}, frame)
    message = decode(frame)
    tensors = dict(message.payload.tensors)
    name = next(iter(tensors))
    if wish == "nan":
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    elif wish == "shape":
        tensors[name] = tensors[name].flatten()
    elif wish == "garbage":
        return Message({**fields, "bytes": 64}, bytes(64))
    altered = encode(Content(Payload(tensors, message.payload.scalars), message.meta))
    return Message({**fields, "bytes": len(altered)}, altered)


class Hostile(Worker):
    """Alters replies to orders."""

    def answer(self, message: Message) -> Message:
        answer = super().answer(message)
        if message.fields.get("do") != "order" or "bytes" not in answer.fields:
            return answer
        wish = next(WISHES, "")
        return _altered(wish, answer) if wish else answer


deployed_client.Worker = Hostile  # type: ignore[misc]
sys.argv = ["fedtune", "client", *sys.argv[2:]]
main()
