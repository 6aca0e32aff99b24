"""What an operator asks of a run that is under way, finished or killed, out of its folder alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.config.yaml_text import read_yaml
from fedtune.federation.claim import is_claimed
from fedtune.federation.files import read_json
from fedtune.federation.folder import RunFolder
from fedtune.federation.rows import client_rows
from fedtune.federation.standing import STANDING

SILENT_S = 60.0  # a status.json that is older than this is of a process that is gone


def status(path: Path) -> dict[str, Any]:
    """How a run stands.

    Returns:
        `run`, `state` (`under way`, `killed`, or that of summary.json: `done`, `stopped`, `interrupted`),
        `method`, `model`; `round`, the last one that is finished, of `rounds`; `evaluation` of the last round
        that has one; `payload_bytes` and `framed_bytes` {`down`, `up`} so far; `clients`, one dictionary
        each: `client`, `name`, `examples`, `rounds` it was counted in, `left_out` how often, `payload_bytes`,
        `fault`, the last reason, and over a network `here` and `seen`; `now`, what status.json says of a run
        that is under way or was killed, else None.

    Raises:
        InputError: It is no run's folder.
    """
    folder = RunFolder.open(path)
    document = read_yaml(path / "config.yaml")
    rounds, messages = list(folder.entries("rounds.jsonl")), list(folder.entries("wire.jsonl"))
    file = path / STANDING
    now = read_json(file) if file.is_file() else None
    summary = folder.summary()
    if _under_way(path, now):
        state = "under way"
    else:
        state = str(summary["status"]) if summary is not None and now is None else "killed"
    sums = {kind: {"down": 0, "up": 0} for kind in ("payload_bytes", "framed_bytes")}
    for message in messages:
        for kind, of in sums.items():
            of[message["direction"]] += message[kind]
    partition = read_json(path / "partition.json")
    clients = client_rows(partition, rounds, messages, folder.entries("memory.jsonl"))
    faults = last_faults(rounds)
    here = {} if now is None else now["clients"]
    for row in clients:
        del row["peak_memory_bytes"]
        client = str(row["client"])
        row["fault"] = (now or {}).get("faults", {}).get(client) or faults.get(client, "")
        row |= {key: here[client][key] for key in ("here", "seen") if client in here}
    return {
        "run": str(path),
        "state": state,
        "method": document["method"]["name"],
        "model": document["model"]["name"],
        "round": rounds[-1]["round"] if rounds else None,
        "rounds": document["method"].get("rounds", 0),
        "evaluation": next((entry["eval"] for entry in reversed(rounds) if entry["eval"]), {}),
        **sums,
        "clients": list(clients),
        "now": now,
    }


def last_faults(rounds: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Why each client was left out last, with the round, by its number."""
    return {
        client: f"round {entry['round']}: {reason}"
        for entry in rounds
        for client, reason in entry.get("left_out", {}).items()
    }


def _under_way(path: Path, now: Mapping[str, Any] | None) -> bool:
    """Whether a process writes it: one that holds its lock here, or writes status.json from elsewhere."""
    for folder in (path, path.absolute().parent):  # runs of a comparison or a sweep are one claim
        if (held := is_claimed(folder)) is not None and (held or folder == path):
            return held
    if now is None:
        return False
    age = datetime.now(UTC) - datetime.fromisoformat(now["updated"])
    return age.total_seconds() < SILENT_S
