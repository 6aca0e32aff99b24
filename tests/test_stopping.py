"""SIGTERM, SIGHUP and Ctrl-C stop a command alike: a summary, no child and no temporary folder is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from command import fedtune, write_config
from deployed import descendants

from fedtune.cli.stopping import stoppable

RUN: dict[str, Any] = {
    "data": {"clients": 3, "max_examples": 24, "max_length": 64},
    "method": {"name": "fedavg", "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}, "rounds": 2},
    "evaluation": {"tasks": ["loss"], "max_examples": 8},
}


class Process:
    """A command of its own, in a session of its own, with its own folder for temporary files."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="ft-"))  # Ray's sockets need a short name
        environment = {**os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "fedtune.cli.main", *arguments]
        with (cwd / "err").open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=environment, stderr=log, stdout=log, start_new_session=True
            )
        self.log = cwd / "err"

    def stop(self, number: int, when: Any) -> list[int]:
        """Sends a signal to the process alone once something holds; returns what had been started."""
        end = time.monotonic() + 120
        while not when():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)
        children = descendants(self.process.pid)
        self.process.send_signal(number)
        self.process.wait(60)
        return children


def gone(pids: list[int]) -> bool:
    """Whether processes end, which some do a moment after their parent."""
    end, left = time.monotonic() + 60, set(pids)
    while left and time.monotonic() < end:
        for pid in list(left):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    continue
            left.discard(pid)
        time.sleep(0.05)
    return not left


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_in_the_middle_of_a_round(number: signal.Signals, tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", RUN)
    stopped = fedtune(
        "run", "c.yaml", "--out", "run", "--quiet",
        cwd=tmp_path, die_at=2, watched="round-0001.replies", die_by=number,
    )  # fmt: skip
    assert stopped.status == 128 + number and "Traceback" not in stopped.err
    assert f"interrupted by {number.name}; a run continues with --resume" in stopped.err
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "interrupted"


def test_a_comparison_is_stopped_too(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", RUN)
    stopped = fedtune(
        "compare", "c.yaml", "--out", "all", "--quiet",
        cwd=tmp_path, die_at=2, watched="round-0001.replies", die_by=signal.SIGTERM,
    )  # fmt: skip
    assert stopped.status == 143 and "Traceback" not in stopped.err
    (summary,) = [json.loads(path.read_text()) for path in (tmp_path / "all").glob("*/summary.json")]
    assert summary["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("transport", [{"name": "flower-simulation"}, {"workers": 2}], ids=str)
def test_the_simulations_processes_end_with_it(transport: dict[str, Any], tmp_path: Path) -> None:
    if "name" in transport:
        pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    document = {**RUN, "transport": transport, "method": {**RUN["method"], "rounds": 99}}
    write_config(tmp_path / "c.yaml", document)
    running = Process("run", "c.yaml", "--out", "run", "--quiet", cwd=tmp_path)
    children = running.stop(signal.SIGTERM, (tmp_path / "run/checkpoints/round-0001").exists)
    assert running.process.returncode == 143, running.log.read_text()
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "interrupted"
    assert children and gone(children)
    assert list(running.temporary.glob("fedtune-*")) == []
    shutil.rmtree(running.temporary)
    assert "SIGTERM received" not in running.log.read_text()  # Ray's stack trace


SANDBOX = """
import sys
from unittest import mock
from fedtune.cli import main
from fedtune.evaluation import sandbox
import fedtune

def evaluate(*arguments):
    sandbox.run({}, [sandbox.Step(("sleep", "600"), 600.0, 256)], isolation="none")

fedtune.evaluate = evaluate
sys.argv = ["fedtune", "eval", "run", "--tasks", "humaneval-x"]
main.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="generated code is run on Linux alone")
def test_an_evaluations_programs_end_with_it(tmp_path: Path) -> None:
    running = Process.__new__(Process)
    running.temporary, running.log = tmp_path, tmp_path / "err"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with running.log.open("wb") as log:
        running.process = subprocess.Popen(
            [sys.executable, "-c", SANDBOX], env=environment, stderr=log, start_new_session=True
        )

    def sleeping() -> bool:
        commands = [Path(f"/proc/{pid}/cmdline") for pid in descendants(running.process.pid)]
        with contextlib.suppress(OSError):
            return any(path.read_text().startswith("sleep\0") for path in commands)
        return False

    children = running.stop(signal.SIGTERM, sleeping)
    assert running.process.returncode == 143, running.log.read_text()
    assert len(children) >= 2 and gone(children)
    assert list(tmp_path.glob("fedtune-*")) == []


def test_the_second_signal_does_not_wait() -> None:
    program = """
import os, signal, time
from fedtune.cli.stopping import stoppable
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a test that runs under nohup inherits another
with stoppable() as stopped:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    except KeyboardInterrupt:
        print(stopped.by.name, stopped.status, flush=True)
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(5)
        print("still here")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("SIGTERM 143\n", -signal.SIGHUP)


def test_what_is_ignored_stays_ignored_and_what_was_there_comes_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
        assert {number: signal.getsignal(number) for number in before} == before
    finally:
        signal.signal(signal.SIGHUP, hup)
