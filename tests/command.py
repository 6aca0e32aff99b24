"""The command line in processes of its own, which tests can kill, interrupt and starve of disk.

They are forked from a server that has done the imports, so that a run starts in a tenth of a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "fedtune.federation.compare",
        "fedtune.federation.results",
        "fedtune.methods.references",
        "fedtune.report.display",
    ]
)


LIMIT_S = 120  # after which a command hangs


@dataclass(frozen=True)
class Result:
    """How a command ended. `status` is negative for a signal."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


class Command:
    """A running `fedtune`.

    Args:
        arguments: Of the command line.
        cwd: Its working folder; also where its output goes.
        die_at: It sends itself the signal `die_by` before the n-th file operation on a path with `watched`
            in it.
        file_bytes: No file may grow beyond this (the error is that of a full disk, by another name).
    """

    def __init__(
        self,
        *arguments: str | Path,
        cwd: Path,
        die_at: int | None = None,
        watched: str = "",
        die_by: int = signal.SIGKILL,
        file_bytes: int | None = None,
    ) -> None:
        self._out, self._err = cwd / ".out", cwd / ".err"
        for path in (self._out, self._err):
            path.write_text("")  # for one that is killed before it is there itself
        limits = (die_at, watched, die_by, file_bytes)
        self._process = _context.Process(
            target=_run, args=([str(a) for a in arguments], cwd, self._out, self._err, *limits)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return cast(int, self._process.pid)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.is_alive()

    def when(self, condition: Callable[[], bool], signal_number: int) -> Result:
        """Sends a signal as soon as a condition holds (or the command has ended)."""
        while self._process.is_alive() and not condition():
            time.sleep(0.0005)
        if self._process.is_alive():
            os.kill(cast(int, self._process.pid), signal_number)  # a number since `start`
        return self.wait()

    def wait(self) -> Result:
        self._process.join(LIMIT_S)
        assert self._process.exitcode is not None, "the command hangs"
        return Result(self._process.exitcode, self._out.read_text(), self._err.read_text())


def fedtune(
    *arguments: str | Path,
    cwd: Path,
    die_at: int | None = None,
    watched: str = "",
    die_by: int = signal.SIGKILL,
    file_bytes: int | None = None,
) -> Result:
    """Runs a command to its end."""
    limits = {"die_at": die_at, "watched": watched, "die_by": die_by, "file_bytes": file_bytes}
    return Command(*arguments, cwd=cwd, **limits).wait()  # type: ignore[arg-type]


def _run(
    arguments: list[str],
    cwd: Path,
    out: Path,
    err: Path,
    die_at: int | None,
    watched: str,
    die_by: int,
    file_bytes: int | None,
) -> None:
    import torch

    torch.set_num_threads(1)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # the process's own, to its end
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as nohup does this one
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if die_at is not None:
        left = die_at

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if event in WRITES and isinstance(args[0], str | Path) and watched in str(args[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), die_by)

        sys.addaudithook(hook)
    sys.argv = ["fedtune", *arguments]
    from fedtune.cli.main import main

    main()


def write_config(path: Path, document: dict[str, Any]) -> Path:
    """A configuration file (JSON is YAML)."""
    path.write_text(json.dumps(document))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcome(run: Path) -> dict[str, Any]:
    """What of a run must come out the same whenever it is repeated or continued: all but wall time."""
    rounds = lines(run / "rounds.jsonl")
    for entry in rounds:
        del entry["seconds"]
    summary = json.loads((run / "summary.json").read_text())
    del summary["seconds"]
    final = run / "final"
    return {
        "final": {str(f.relative_to(final)): f.read_bytes() for f in sorted(final.rglob("*.safetensors"))},
        "rounds": rounds,
        "wire": lines(run / "wire.jsonl") if (run / "wire.jsonl").exists() else [],
        "memory": lines(run / "memory.jsonl"),
        "summary": summary,
        "folder": sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()),
    }
