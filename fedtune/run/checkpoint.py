"""Checkpoints: the server's state and what clients keep, after each round, in safetensors and JSON.

A checkpoint is written beside its place and renamed, so it is whole or not there. It names the
configuration it belongs to and is refused by any other.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedtune.core.types import Payload
from fedtune.errors import InputError
from fedtune.run.files import disk_errors, read_json, whole_folder, write_json


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
    with disk_errors(f"checkpoint {path.name}"), whole_folder(path) as new:
        _save_payload(new, "state", checkpoint.state)
        clients = sorted(checkpoint.clients)
        if clients:
            _save_payload(
                new,
                "clients",
                Payload(
                    {f"{c}/{n}": t for c in clients for n, t in checkpoint.clients[c].tensors.items()},
                    {f"{c}/{n}": v for c in clients for n, v in checkpoint.clients[c].scalars.items()},
                ),
            )
        write_json(
            new / "checkpoint.json",
            {
                "round": checkpoint.round,
                "config_sha256": config_sha256,
                "clients": clients,
                "logs": dict(checkpoint.logs),
                "seconds": dict(checkpoint.seconds),
            },
        )
    if keep is not None:
        for old in rounds(folder)[:-keep]:
            shutil.rmtree(folder / f"round-{old:04d}")


def rounds(folder: Path) -> list[int]:
    """The rounds that `folder` has complete checkpoints of, ascending."""
    if not folder.is_dir():
        return []
    names = [re.fullmatch(r"round-(\d{4,})", path.name) for path in folder.iterdir()]
    return sorted(int(name[1]) for name in names if name)


def load(folder: Path, round: int, *, config_sha256: str) -> Checkpoint:
    """Reads the checkpoint of a round.

    Raises:
        InputError: It is broken, or belongs to another configuration.
    """
    path = folder / f"round-{round:04d}"
    about = read_json(path / "checkpoint.json")
    if about.get("config_sha256") != config_sha256:
        raise InputError(
            f"{path} belongs to another configuration ({str(about.get('config_sha256'))[:12]}, this one is "
            f"{config_sha256[:12]}); continue it with the config.yaml of its own run folder"
        )
    both = _load_payload(path, "clients") if about["clients"] else Payload()
    clients = {}
    for client in about["clients"]:
        prefix = f"{client}/"
        clients[client] = Payload(
            {n.removeprefix(prefix): t for n, t in both.tensors.items() if n.startswith(prefix)},
            {n.removeprefix(prefix): v for n, v in both.scalars.items() if n.startswith(prefix)},
        )
    return Checkpoint(about["round"], _load_payload(path, "state"), clients, about["logs"], about["seconds"])


def _save_payload(folder: Path, name: str, payload: Payload) -> None:
    # clone: safetensors refuses tensors that share memory, as a state's fields may
    save_file(
        {n: t.detach().cpu().clone().contiguous() for n, t in payload.tensors.items()},
        folder / f"{name}.safetensors",
    )
    write_json(folder / f"{name}.json", dict(payload.scalars))


def _load_payload(folder: Path, name: str) -> Payload:
    path = folder / f"{name}.safetensors"
    try:
        tensors: dict[str, Any] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read: {error}. Remove {folder} to continue from the checkpoint before it."
        ) from None
    return Payload(tensors, read_json(folder / f"{name}.json"))
