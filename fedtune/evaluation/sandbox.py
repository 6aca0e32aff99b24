"""Runs untrusted programs: generated code that loops, forks, writes files or fills memory costs one failure.

With `isolation="namespaces"` (Linux 5.14 or newer, where the system lets users make namespaces) a program

* sees no network, not even the machine's own loopback;
* sees no file but compilers, interpreters and their libraries, read-only, and can write to one folder in
  memory of bounded size, which vanishes with it;
* sees no process but its own, as a user without rights, who can gain none, and none of the user's keys;
* can ask nothing of the kernel that programs of its kind do not need (`system_calls.py`);
* is killed, with all that it has started, when it ends, when it reaches a limit, and when fedtune ends, even
  by a signal that cannot be caught.

Processes and memory in sum are counted every 20 ms. Memory that no process or folder would show (System V's,
files without a name) cannot be had.

With `isolation="none"` a program runs with the same limits, counted every 100 ms, in a folder of the disk
that is removed, and all that it has started is killed. But it can read and write what the user can, use the
network, fill the disk file by file, and kill or outlive what watches it if it means to. That is for machines
that are thrown away.

Neither is a defence against errors in the kernel: who expects attackers needs a virtual machine.
The work is done in `sandbox_child.py`, a process between the program and this one.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fedtune.core.settings import Settings
from fedtune.core.temporary import temporary_folder
from fedtune.errors import InputError
from fedtune.evaluation import system_calls

Isolation = Literal["namespaces", "none"]

MAX_PROCESSES = 64  # threads included; a Java machine has about 20
MAX_FILE_BYTES = 32 << 20
MAX_DISK_BYTES = 64 << 20  # of the folder in memory
MAX_DISK_FILES = 4096
MAX_OUTPUT_BYTES = 16 << 10  # kept of what is printed: the end
GRACE_S = 20.0  # for the process between, on a busy machine, before it is given up


class CodeSettings(Settings):
    """How programs that a model wrote are run (HumanEval-X)."""

    isolation: Isolation = "namespaces"  # none: they can use the network, and the files that you can
    seconds: float = Field(10.0, gt=0)  # of a program, by the clock and the processor's; its compiler has 60
    memory_mb: int = Field(1024, ge=256)  # MiB of a program and its processes; its compiler has 2048
    workers: int = Field(2, ge=1)  # programs compiled and run at a time


@dataclass(frozen=True)
class Step:
    """One command, for example a compiler.

    Attributes:
        command: Program and arguments; run in the program's folder, without a shell.
        seconds: Limit on its time by the clock, and on the processor's.
        memory_mb: Limit on the resident memory of all its processes together, in MiB.
        address_space: Whether the same limit also holds for the address space of each process. That refuses
            an allocation at once, but Java and Go reserve far more addresses than they use.
        environment: Variables beside PATH, LANG and TMPDIR, which are all that there is.
    """

    command: tuple[str, ...]
    seconds: float
    memory_mb: int
    address_space: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """How a command ended.

    Attributes:
        status: Exit status; minus the signal's number where a signal ended it.
        stopped: Which limit ended it: "time", "memory", "processes", or "" for none.
        seconds: By the clock.
        output: The end of what it printed, errors included.
    """

    status: int
    stopped: str
    seconds: float
    output: str

    @property
    def ok(self) -> bool:
        """Whether it ended by itself and successfully."""
        return self.status == 0 and not self.stopped


def run(
    files: Mapping[str, str],
    steps: Sequence[Step],
    *,
    isolation: Isolation,
    readable: Sequence[Path] = (),
) -> list[Finished]:
    """Runs commands one after the other in a new folder, until one fails.

    Args:
        files: Names and texts of what lies in the folder at first; a name may have folders in it.
        steps: The commands.
        isolation: See above.
        readable: Files and folders outside of the usual places (/usr, /bin, /lib) that the commands need.
            They find them under the same absolute paths, read-only.

    Returns:
        How each command ended; shorter than `steps` where one failed.

    Raises:
        InputError: The system does not permit the isolation, or a command cannot be started.
    """
    if sys.platform != "linux":
        raise InputError(f"running generated code needs Linux, got {sys.platform}: run the evaluation there.")
    machine = platform.machine()
    if not system_calls.known(machine):
        raise InputError(
            f"running generated code needs an x86-64 or arm64 processor, got {machine}: what programs may "
            "ask of the kernel is known for these."
        )
    # with namespaces nothing is written to the disk: the new root is mounted over one that each system has
    with temporary_folder() if isolation == "none" else nullcontext("/sys") as folder:
        job = {
            "parent": os.getpid(),
            "isolation": isolation,
            "root": os.path.realpath(folder),
            "readable": [os.path.realpath(path) for path in readable],
            "files": dict(files),
            "steps": [_plain(step) for step in steps],
            "processes": MAX_PROCESSES,
            "file_bytes": MAX_FILE_BYTES,
            "disk_bytes": MAX_DISK_BYTES,
            "disk_files": MAX_DISK_FILES,
            "output_bytes": MAX_OUTPUT_BYTES,
            "filter": system_calls.program(machine).hex(),
            "keyctl": system_calls.keyctl(machine),
        }
        answer = run_child(job, sum(step.seconds for step in steps) + GRACE_S)
    if "refused" in answer:
        raise InputError(_refusal(isolation, str(answer["refused"])))
    return [Finished(**step) for step in answer["steps"]]


def check(isolation: Isolation) -> None:
    """Raises InputError where programs cannot be run with this isolation."""
    run({}, [Step(("true",), 30.0, 256)], isolation=isolation)


def _plain(step: Step) -> dict[str, Any]:
    return {**asdict(step), "memory_bytes": step.memory_mb << 20}


def run_child(job: Mapping[str, Any], patience_s: float) -> dict[str, Any]:
    """The report of the process that does a job; it is ended if it takes longer than `patience_s`."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("sandbox_child.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},  # not even the process between may hold a secret
        start_new_session=True,  # an interrupt from the keyboard is ours to handle
        text=True,
    )
    try:
        report, errors = process.communicate(json.dumps(job), timeout=patience_s)
    except BaseException as error:
        process.kill()  # and with it everything inside
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return _lost("it could not be stopped in time", "time")
    if process.returncode > 0:  # an error of our own, not of the program
        raise RuntimeError(f"the sandbox failed: {errors.strip()}")
    return json.loads(report) if report else _lost("what watched it was killed", "")


def _lost(why: str, stopped: str) -> dict[str, Any]:
    return {"steps": [asdict(Finished(-signal.SIGKILL, stopped, 0.0, why))]}


def _refusal(isolation: Isolation, why: str) -> str:
    if isolation == "none":
        return f"generated code cannot be run here: {why}."
    return (
        f"generated code cannot be isolated from network and files here: {why}. Allow user namespaces on "
        "this system (in a container: a security profile that permits them; Linux 5.14 or newer), or, on a "
        "machine that may be harmed, set evaluation.code.isolation to none."
    )
