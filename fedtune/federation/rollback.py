"""A run set back to an earlier round, with nothing lost: what came later is moved into rolled-back-N/.

The run goes on from that round's checkpoint as if it had never gone further. What is to be done is written
down first and crossed out last, so that a rollback that was killed is finished when the run is continued
next; each part of it can be done twice.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from fedtune.errors import InputError
from fedtune.federation import checkpoint
from fedtune.federation.files import disk_errors, read_json, write_json
from fedtune.federation.folder import LOGS

_INTENT = "rollback.json"


def check(path: Path, round: int, *, config_sha256: str) -> None:
    """Raises InputError unless the run in `path` can be set back to `round`."""
    folder = path / "checkpoints"
    checkpoint.require(folder, round)
    checkpoint.load(folder, round, config_sha256=config_sha256)
    best = max(checkpoint.rounds(folder / "best"), default=0)
    if best > round:
        raise InputError(
            f"{path} has its best round in {best} (checkpoints.best), and the best one up to {round} was not "
            f"kept; go back to round {best} or a later one"
        )


def roll_back(path: Path, round: int) -> None:
    """Sets the run in `path` back to `round`, which `check` found to be possible.

    Raises:
        FederationError: The disk is full or cannot be written; the run's next start goes on from there.
    """
    taken = [re.fullmatch(r"rolled-back-(\d+)", entry.name) for entry in path.iterdir()]
    number = 1 + max((int(name[1]) for name in taken if name), default=0)
    sizes = read_json(path / "checkpoints" / f"round-{round:04d}" / "checkpoint.json")["logs"]
    with disk_errors(f"the rollback to round {round}"):
        write_json(path / _INTENT, {"round": round, "into": f"rolled-back-{number}", "logs": sizes})
    finish(path)


def finish(path: Path) -> None:
    """Does what is left of a rollback; nothing where none was begun.

    Raises:
        FederationError: As `roll_back`.
    """
    if not (path / _INTENT).exists():
        return
    intent = read_json(path / _INTENT)
    into, done = path / intent["into"], int(intent["round"])
    with disk_errors(f"the rollback to round {done}"):
        for log in LOGS:
            _move_tail(path / log, into / log, int(intent["logs"].get(log, 0)))
        folder = path / "checkpoints"
        for entry in sorted(folder.iterdir()):
            name = re.fullmatch(r"round-(\d{4,})(\.replies)?", entry.name)
            if name and int(name[1]) > done:
                _move(entry, into / "checkpoints" / entry.name)
        for result in ("final", "summary.json"):
            if (path / result).exists():
                _move(path / result, into / result)
        (path / _INTENT).unlink()


def _move_tail(log: Path, to: Path, size: int) -> None:
    """Moves what a log holds beyond its first `size` bytes."""
    if not log.exists() or log.stat().st_size <= size:
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    with log.open("r+b") as file:
        file.seek(size)
        temporary = to.with_name(f".{to.name}.tmp")
        with temporary.open("wb") as tail:
            while part := file.read(1 << 20):
                tail.write(part)
            tail.flush()
            os.fsync(tail.fileno())
        temporary.replace(to)
        file.truncate(size)  # only now: until here the tail is still in the log


def _move(what: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    what.rename(to)
