"""A client that trains nothing: it reads its order, and answers with as many bytes as the order asks for.

python echo_client.py --server ... (as fedtune client)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from fedtune.cli.main import main
from fedtune.core.types import Frame, Payload
from fedtune.core.wire import Content, decode, lay_out
from fedtune.deploy import client as deployed_client
from fedtune.transport.messages import Field
from fedtune.transport.worker import JoinedRun


class Echo:
    """Stands for a `ClientRunner`."""

    store: Any = None

    def __init__(self) -> None:
        self.states: dict[int, Payload] = {}

    def handle(self, client: int, frame: Frame) -> Frame:
        order = decode(frame)
        wanted = int(order.payload.scalars["answer_bytes"])
        tensors = {f"layer.{i}": torch.full((wanted // 64,), i, dtype=torch.float32) for i in range(16)}
        return lay_out(
            Content(Payload(tensors if wanted else {}), {"client": client, "round": order.meta["round"]})
        )


def join(invitation: Mapping[str, Field], **setup: Any) -> JoinedRun:
    """Takes part in any run."""
    return JoinedRun(Echo(), 1, "echo")  # type: ignore[arg-type]


deployed_client.join = join
sys.argv = ["fedtune", "client", *sys.argv[1:]]
main()
