"""A plugin file that plants a fault in a client's work, as long as `fault.json` lies in the run's folder.

`fault.json` holds `kind`, `client` and `round`. Processes of simulated clients import the same file.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from fedtune.core.client import ClientRunner
from fedtune.core.types import ClientError
from fedtune.core.wire import decode

HERE = Path.cwd()
handle, forward = ClientRunner.handle, LlamaForCausalLM.forward
now: dict[str, int] = {}


def raised(kind: str) -> None:
    """Breaks as the kind says."""
    if kind == "device memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has none left.")
    if kind == "memory":
        raise MemoryError
    if kind == "allocator":
        torch.empty(1 << 60)
    if kind == "program":
        raise KeyError("no_such_tensor")
    if kind == "package":
        import no_such_package.inner  # noqa: F401
    if kind == "disk":
        raise OSError(24, os.strerror(24), "held/x")
    if kind == "exit":
        raise SystemExit(7)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "data":
        raise ClientError("the loss became nan at step 1; lower method.lr")


def broken_handle(self: ClientRunner, client: int, frame: Any) -> bytes:
    now.update(client=client, round=int(decode(bytes(frame)).meta["round"]), calls=0)
    try:
        return handle(self, client, frame)
    finally:
        now.clear()


def broken_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    file = HERE / "fault.json"
    if now and file.exists():
        now["calls"] += 1
        fault = json.loads(file.read_text())
        if now["calls"] == 2 and now["client"] == fault["client"] and fault["round"] in (now["round"], None):
            raised(fault["kind"])
    return forward(self, *args, **kwargs)


ClientRunner.handle = broken_handle  # type: ignore[method-assign]
LlamaForCausalLM.forward = broken_forward  # type: ignore[method-assign]
