"""A client that answers its n-th order with something else than was asked; otherwise `fedtune client`.

python hostile_client.py nan,shape,cut,long --server ... (as fedtune client)

The wishes: nan, shape, cut, long, garbage, scaled, and the names in the tables below.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable
from typing import Any

import torch
from hostile_frames import costly, framed

from fedtune.cli.main import main
from fedtune.core.types import Payload
from fedtune.core.wire import HEADER, Content, decode, encode
from fedtune.deploy import client as deployed_client
from fedtune.transport.messages import Message, of_part
from fedtune.transport.worker import Worker

WISHES = iter(sys.argv[1].split(","))


def _with(frame: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The frame with another manifest, under a right checksum."""
    _, _, deflated, length, _, _ = HEADER.unpack(frame[: HEADER.size])
    head, data = frame[HEADER.size : HEADER.size + length], frame[HEADER.size + length :]
    manifest = json.loads(zlib.decompress(head) if deflated else head)
    change(manifest)
    return framed(json.dumps(manifest).encode(), data)


def _overflow(manifest: dict[str, Any]) -> None:
    manifest["tensors"][0][2] = [0, 2**47, 2**47]


MANIFESTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "overflow": _overflow,
    "digits": lambda manifest: manifest["meta"].update(train_loss=10**400),
    "negative": lambda manifest: manifest["meta"].update(peak_bytes=-5e300),
    "unasked": lambda manifest: manifest["meta"].update(balance=1.0),
    "surrogate": lambda manifest: manifest["scalars"].update({"\ud800": 1}),
}
FRAMES = {"dimensions": "160,000 dimensions", "lists": "20 million lists"}
FIELDS: dict[str, dict[str, Any]] = {
    "list": {"fault": ["a", "b"]},
    "megabyte": {"fault": "x" * 900_000},
    "control": {"fault": "\x1b[2J\x1b]0;owned\x07\nclient 0 left: " + "y" * 5000},
}


def _altered(wish: str, message: Message) -> Message:
    """A reply of one message as an attacker, or a broken machine, would send it."""
    frame, fields = bytes(message.body), dict(message.fields)
    if wish == "cut":
        return Message({**fields, "bytes": len(frame) - 100}, frame[:-100])
    if wish == "long":
        return Message({**fields, "bytes": 2 << 30}, frame)
    if wish in FIELDS:
        return Message(FIELDS[wish])
    if wish in MANIFESTS or wish in FRAMES:
        altered = _with(frame, MANIFESTS[wish]) if wish in MANIFESTS else dict(costly())[FRAMES[wish]]
        return Message({**fields, "bytes": len(altered)}, altered)
    message = decode(frame)
    tensors = dict(message.payload.tensors)
    name = next(iter(tensors))
    if wish == "nan":
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    elif wish == "shape":
        tensors[name] = tensors[name].flatten()
    elif wish == "scaled":
        tensors = {name: 1000 * tensor for name, tensor in tensors.items()}
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
        if not wish:
            return answer
        altered = _altered(wish, answer)
        return Message({**altered.fields, **of_part(altered.body)}, altered.body)


deployed_client.Worker = Hostile  # type: ignore[misc]
sys.argv = ["fedtune", "client", *sys.argv[2:]]
main()
