"""Checkpoints: the server's state and what clients keep, after each round, in safetensors and JSON.

A checkpoint is written beside its place and renamed, so it is whole or not there. It names the
configuration it belongs to and is refused by any other.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from isal.isal_zlib import crc32
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune.core.store import digests_in
from fedtune.core.types import Payload
from fedtune.errors import InputError
from fedtune.federation.files import atomic_folder, disk_errors, write_json


@dataclass(frozen=True)
class Checkpoint:
    """Everything needed to go on after a round.

    Attributes:
        round: Rounds that are done; 0 before the first.
        state: The server's state.
        clients: What each client keeps between its rounds.
        logs: Bytes of each log file at that moment.
        seconds: Wall seconds by part so far.
    """

    round: int
    state: Payload
    clients: Mapping[int, Payload]
    logs: Mapping[str, int]
    seconds: Mapping[str, float]


def save(folder: Path, checkpoint: Checkpoint, *, config_sha256: str, keep: int | None) -> None:
    """Writes a checkpoint into `folder` and removes all but the newest `keep`.

    Raises:
        FederationError: The disk is full or cannot be written; earlier checkpoints are untouched.
    """
    path = folder / f"round-{checkpoint.round:04d}"
    with disk_errors(f"checkpoint {path.name}"), atomic_folder(path) as new:
        _save_payload(new, "state", checkpoint.state)
        clients, same = sorted(checkpoint.clients), dict[str, str]()
        if clients:
            kept = {f"{c}/{n}": t for c in clients for n, t in checkpoint.clients[c].tensors.items()}
            same = _repeated(kept)
            _save_payload(
                new,
                "clients",
                Payload(
                    {name: tensor for name, tensor in kept.items() if name not in same},
                    {f"{c}/{n}": v for c in clients for n, v in checkpoint.clients[c].scalars.items()},
                ),
            )
        write_json(
            new / "checkpoint.json",
            {
                "round": checkpoint.round,
                "config_sha256": config_sha256,
                "clients": clients,
                "same": same,
                "logs": dict(checkpoint.logs),
                "seconds": dict(checkpoint.seconds),
                "crc32": {file.name: _crc32(file) for file in sorted(new.iterdir())},
            },
        )
    if keep is not None:
        for old in rounds(folder)[:-keep]:
            shutil.rmtree(folder / f"round-{old:04d}")


def rename(folder: Path, *, config_sha256: str) -> None:
    """Has all checkpoints of a folder, the best too, belong to a configuration, whichever they did."""
    for file in sorted(folder.glob("**/checkpoint.json")):
        about = json.loads(file.read_text(encoding="utf-8"))
        if about["config_sha256"] != config_sha256:
            write_json(file, about | {"config_sha256": config_sha256})


def rounds(folder: Path) -> list[int]:
    """The rounds that `folder` has complete checkpoints of, ascending."""
    if not folder.is_dir():
        return []
    names = [re.fullmatch(r"round-(\d{4,})", path.name) for path in folder.iterdir()]
    return sorted(int(name[1]) for name in names if name)


def held(folder: Path, round: int) -> set[str]:
    """Digests of what clients hold as of a round's checkpoint."""
    file = folder / f"round-{round:04d}" / "clients.json"
    return digests_in([json.loads(file.read_text(encoding="utf-8"))]) if file.is_file() else set()


def require(folder: Path, round: int) -> None:
    """Raises InputError if `folder` has no checkpoint of a round; names those that it has."""
    there = rounds(folder)
    if round not in there:
        raise InputError(
            f"{folder.parent} has checkpoints of rounds {', '.join(map(str, there)) or 'none'}, not of "
            f"{round}; choose one of these. A run with checkpoints.keep=null keeps all of them"
        )


def load(folder: Path, round: int, *, config_sha256: str) -> Checkpoint:
    """Reads the checkpoint of a round.

    Raises:
        InputError: It is broken, or belongs to another configuration.
    """
    path = folder / f"round-{round:04d}"
    try:
        about = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        if about["config_sha256"] != config_sha256:
            raise InputError(
                f"{path} belongs to another configuration ({about['config_sha256'][:12]}, this one is "
                f"{config_sha256[:12]}); continue it with the config.yaml of its own run folder"
            )
        for name, crc in about["crc32"].items():
            if _crc32(path / name) != crc:
                raise ValueError(f"{name} was altered")
        state = _load_payload(path, "state")
        both = _load_payload(path, "clients") if about["clients"] else Payload()
        tensors = dict(both.tensors) | {
            name: both.tensors[first].clone() for name, first in about["same"].items()
        }
        done, logs, seconds = int(about["round"]), dict(about["logs"]), dict(about["seconds"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"checkpoint {path} is damaged: {type(error).__name__}: {error}. Remove that folder to continue "
            "from the checkpoint before it."
        ) from None
    clients = {}
    for client in about["clients"]:
        prefix = f"{client}/"
        clients[client] = Payload(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)},
            {n.removeprefix(prefix): v for n, v in both.scalars.items() if n.startswith(prefix)},
        )
    return Checkpoint(done, state, clients, logs, seconds)


def _repeated(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are an earlier one over again, with its name: clients may well keep the same."""
    firsts: dict[tuple[object, ...], str] = {}
    same = {}
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        key = (tensor.dtype, tensor.shape, hashlib.sha256(data).digest())
        if firsts.setdefault(key, name) != name:
            same[name] = firsts[key]
    return same


def _save_payload(folder: Path, name: str, payload: Payload) -> None:
    # clone: safetensors refuses tensors that share memory, as a state's fields may
    save_file(
        {n: t.detach().cpu().clone().contiguous() for n, t in payload.tensors.items()},
        folder / f"{name}.safetensors",
    )
    write_json(folder / f"{name}.json", dict(payload.scalars))


def _load_payload(folder: Path, name: str) -> Payload:
    scalars = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return Payload(load_file(folder / f"{name}.safetensors"), scalars)


def _crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            crc = crc32(chunk, crc)
    return crc
