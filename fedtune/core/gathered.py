"""The replies of a round side by side, for a server that has to see all of them before it can go on.

On disk, where there is a folder: what is read is a piece of a tensor of each client, so that the server's
memory does not grow with a cohort's updates. The file has no name and is gone with the process that made it.
"""

from __future__ import annotations

import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fedtune.core.types import Payload, Reply


class Gathered(ABC):
    """Replies of one round, told apart by their clients. Used as a context manager."""

    def __init__(self) -> None:
        self._replies: dict[int, Reply] = {}
        self._shapes: dict[int, dict[str, tuple[int, ...]]] = {}

    def put(self, reply: Reply) -> None:
        """Keeps a reply."""
        tensors, scalars = reply.payload.tensors, reply.payload.scalars
        self._replies[reply.client] = Reply(reply.client, Payload({}, scalars), reply.metrics, reply.cohort)
        self._shapes[reply.client] = {name: tuple(tensors[name].shape) for name in sorted(tensors)}

    def replies(self) -> dict[int, Reply]:
        """Those that were kept, without their tensors, by client in ascending order."""
        return dict(sorted(self._replies.items()))

    def shapes(self, client: int) -> Mapping[str, tuple[int, ...]]:
        """Of a client's tensors, by name."""
        return self._shapes[client]

    @abstractmethod
    def read(self, client: int, name: str, start: int, end: int) -> Tensor:
        """The numbers `start` to `end` of a tensor, in one dimension."""

    def whole(self, client: int, without: Collection[str] = ()) -> dict[str, Tensor]:
        """All tensors of a client, but for those of some names."""
        return {
            name: self.read(client, name, 0, math.prod(shape)).reshape(shape)
            for name, shape in self._shapes[client].items()
            if name not in without
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._replies.clear()


class InMemory(Gathered):
    """Gathered in memory, as they came."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[int, Mapping[str, Tensor]] = {}

    def put(self, reply: Reply) -> None:
        """Keeps a reply."""
        super().put(reply)
        self._tensors[reply.client] = reply.payload.tensors

    def read(self, client: int, name: str, start: int, end: int) -> Tensor:
        """The numbers `start` to `end` of a tensor, in one dimension."""
        return self._tensors[client][name].reshape(-1)[start:end]


class OnDisk(Gathered):
    """Gathered in a file of `folder`, which takes as many bytes as the replies have."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed in __exit__
        self._places: dict[tuple[int, str], tuple[int, torch.dtype]] = {}

    def put(self, reply: Reply) -> None:
        """Keeps a reply."""
        super().put(reply)
        self._file.seek(0, os.SEEK_END)
        for name, tensor in sorted(reply.payload.tensors.items()):
            self._places[reply.client, name] = self._file.tell(), tensor.dtype
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                self._file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def read(self, client: int, name: str, start: int, end: int) -> Tensor:
        """The numbers `start` to `end` of a tensor, in one dimension."""
        at, dtype = self._places[client, name]
        if end <= start:
            return torch.empty(0, dtype=dtype)
        buffer = bytearray((end - start) * dtype.itemsize)
        self._file.seek(at + start * dtype.itemsize)
        if self._file.readinto(buffer) != len(buffer):
            raise OSError(f"the gathered reply of client {client} is cut short")
        return torch.frombuffer(buffer, dtype=dtype)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._file.close()
