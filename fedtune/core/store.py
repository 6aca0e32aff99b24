"""What a client holds beside what it kept from its last round: large, read-only content under its SHA-256.

A method whose clients never get the whole model sends them a smaller one, once. It is kept here, on disk
where there is a folder, so that a client that was restarted does not ask for it again. Content has its
digest as its name: simulated clients of one process that were sent the same bytes share them. What is on
disk is mapped and not read into memory; what no client names any more is thrown away (`retain`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedtune.core.permissions import as_the_umask_says
from fedtune.core.types import ClientError, Payload, Scalar
from fedtune.models.mapped import unread

T = TypeVar("T")
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


def digest(payload: Payload) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors, and the scalars."""
    sha = hashlib.sha256(json.dumps(dict(payload.scalars), sort_keys=True).encode())
    for name in sorted(payload.tensors):
        tensor = payload.tensors[name].detach().cpu().contiguous()
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def digests_in(states: Iterable[Mapping[str, Scalar]]) -> set[str]:
    """Every digest that stands in what clients keep: what they hold."""
    texts = (str(value) for scalars in states for value in scalars.values())
    return {key for text in texts for key in _DIGEST.findall(text)}


class Store:
    """Payloads by digest, in memory and, with a folder, on disk; and what was built from them.

    Args:
        folder: Where they are kept; made when the first comes. None: in memory alone.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._payloads: dict[str, Payload] = {}
        self._built: dict[str, Any] = {}

    def key_of(self, payload: Payload) -> str:
        """What `payload` is kept under: its digest."""
        return digest(payload)

    def put(self, payload: Payload) -> str:
        """Keeps `payload` and returns its digest."""
        key = self.key_of(payload)
        if key not in self._payloads:
            if self._folder is not None:
                self._write(self._folder, key, payload)
                payload = self._read(self._folder / f"{key}.safetensors") or payload
            self._payloads[key] = payload
        return key

    def get(self, key: str) -> Payload | None:
        """What has this digest, or None: it never came, was lost, or is not what it was any more."""
        if key not in self._payloads and self._folder is not None:
            path = self._folder / f"{key}.safetensors"
            payload = self._read(path)
            if payload is not None and digest(payload) == key:
                # mapped anew: every page of the first mapping has been read, and is in memory with it
                self._payloads[key] = self._read(path) or payload
        return self._payloads.get(key)

    def read(self, key: str, name: str) -> Tensor:
        """A tensor of what was put under this digest; from disk it is mapped anew.

        Raises:
            ClientError: It is not there any more.
        """
        if self._folder is None:
            return self._payloads[key].tensors[name]
        try:
            with safe_open(self._folder / f"{key}.safetensors", framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ClientError(f"it does not have {name} of {key} any more: {error}") from error
        return tensor

    def built(self, key: str, build: Callable[[], T]) -> T:
        """What `build` makes, once for each key."""
        if key not in self._built:
            self._built[key] = build()
        found: T = self._built[key]
        return found

    def unread(self, key: str) -> None:
        """Takes what is mapped of a payload out of memory until it is used, by a model built of it too.

        Nothing of it may have been changed since; what is in memory alone stays there.
        """
        if self._folder is not None and key in self._payloads:
            unread(self._payloads[key].tensors.values())

    @property
    def on_disk(self) -> bool:
        """Whether what was put is mapped from disk, so that the memory it came in is free for other use."""
        return self._folder is not None

    def retain(self, keys: Collection[str]) -> None:
        """Forgets everything but these, on disk too."""
        for known in (self._payloads, self._built):
            for key in known.keys() - set(keys):
                del known[key]
        if self._folder is not None and self._folder.is_dir():
            for path in self._folder.glob("*.safetensors"):
                if path.stem not in keys:
                    path.unlink()
            for path in self._folder.glob(".*.new"):
                if not _alive(path.suffixes[-2]):
                    path.unlink(missing_ok=True)  # half written, by a process that was killed

    def clear(self) -> None:
        """Forgets everything, on disk too."""
        self._payloads.clear()
        self._built.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, folder: Path, key: str, payload: Payload) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f".{key}.{os.getpid()}.new"  # simulated clients of several processes share a folder
        tensors = {n: t.detach().cpu().contiguous() for n, t in payload.tensors.items()}
        if len({t.untyped_storage().data_ptr() for t in tensors.values()}) < len(tensors):
            tensors = {n: t.clone() for n, t in tensors.items()}  # safetensors refuses what shares memory
        save_file(tensors, new, metadata={"scalars": json.dumps(dict(payload.scalars))})
        as_the_umask_says([new], folder)
        os.replace(new, folder / f"{key}.safetensors")

    def _read(self, path: Path) -> Payload | None:
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                scalars = json.loads(file.metadata()["scalars"])
                return Payload({name: file.get_tensor(name) for name in file.keys()}, scalars)  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None  # as good as lost: the server sends it again


def _alive(process: str) -> bool:
    """Whether a process may still be there; `process` is a dot and its number."""
    try:
        os.kill(int(process[1:]), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # it is another user's
        pass
    return True
