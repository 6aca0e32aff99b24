"""Simulated clients in several processes of this machine: the bits of one process, whatever goes wrong."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Command, Result, fedtune, outcome, write_config
from deployed import descendants
from other_processes import TRIED, same_bits
from threads_of import threads

from fedtune.config.file import load_config
from fedtune.transport.messages import Message
from fedtune.transport.processes import Processes, processes

MANY = "transport.workers=2"


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    start = Message({"held": str(tmp_path_factory.mktemp("held"))})
    with threads(1), processes("other_processes", start, workers=2, threads=1) as found:
        yield found


@pytest.mark.parametrize(("name", "label"), TRIED)
def test_every_method_ends_with_the_bits_of_a_run_in_process(
    name: str, label: str, channel: Processes
) -> None:
    same_bits(name, label, channel, rest=channel.wait)


def document(**more: Any) -> dict[str, Any]:
    return {
        "data": {"clients": 4, "max_examples": 16, "max_length": 64},
        "method": {"name": "fedavg", "rounds": 2, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}},
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "every": 0},
        **more,
    }


def run(folder: Path, *arguments: str) -> Result:
    done = fedtune("run", "c.yaml", "--quiet", *arguments, cwd=folder)
    assert done.status == 0, done.err
    return done


SCAFFOLD = {
    "name": "fedavg",
    "rounds": 3,
    "local_steps": 2,
    "batch_size": 2,
    "optimizer": "sgd",
    "lr": 0.01,
    "control_variates": True,
    "lora": {"rank": 2},
}


def test_kept_states_drop_outs_and_delays_with_other_numbers_of_processes(tmp_path: Path) -> None:
    given = document(method=SCAFFOLD, seed=6)
    given["federation"] = {"quorum": 1, "simulate": {"dropout": 0.2, "delay_s": 1.0}, "deadline_s": 1.9}
    given["checkpoints"] = {"journal": "always"}
    write_config(tmp_path / "c.yaml", given)
    run(tmp_path, "--out", "one")
    wanted = outcome(tmp_path / "one")
    assert any(entry["left_out"] for entry in wanted["rounds"][1:])
    killed = fedtune(
        *("run", "c.yaml", "--quiet", "transport.workers=3", "--out", "many"),
        cwd=tmp_path,
        die_at=2,
        watched="round-0002.replies",
    )
    assert killed.status == -9, killed.err
    done = run(tmp_path, "--resume", "many", MANY)
    assert "2 processes train clients, with 1 thread each" in done.err
    assert outcome(tmp_path / "many") == wanted
    assert load_config(tmp_path / "many/config.yaml").transport.workers == 3  # what it was begun with


def test_secure_aggregation_has_the_same_sums(tmp_path: Path) -> None:
    pytest.importorskip("Crypto", reason="secure aggregation is not installed (the extra `privacy`)")
    write_config(tmp_path / "c.yaml", document(federation={"secure_aggregation": {"threshold": 0.6}}))
    run(tmp_path, "--out", "one")
    run(tmp_path, "--out", "many", MANY)
    wanted, found = outcome(tmp_path / "one"), outcome(tmp_path / "many")
    assert found["final"] == wanted["final"] and found["rounds"] == wanted["rounds"]
    assert found["wire"] == wanted["wire"] and found["memory"] == wanted["memory"]


def test_a_process_that_is_killed_ends_the_run_which_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    given = document()
    given["method"]["rounds"] = 4
    write_config(tmp_path / "c.yaml", given)
    run(tmp_path, "--out", "one")
    command = Command("run", "c.yaml", "--quiet", MANY, "--out", "many", cwd=tmp_path)
    while not (tmp_path / "many/checkpoints/round-0001").exists():
        assert command.alive, command.wait().err
        time.sleep(0.002)
    children = [pid for pid in descendants(command.pid) if b"client_process" in _called(pid)]
    assert len(children) == 2
    os.kill(children[0], signal.SIGKILL)
    ended = command.wait()
    assert ended.status == 3
    last = ended.err.splitlines()[-1]
    assert "its process of the simulation ended (by SIGKILL)" in last and "lower transport.workers" in last
    assert _gone(children)
    assert json.loads((tmp_path / "many/summary.json").read_text())["status"] == "stopped"
    run(tmp_path, "--resume", "many", MANY)
    assert outcome(tmp_path / "many") == outcome(tmp_path / "one")


def test_the_processes_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    given = document()
    given["method"] |= {"rounds": 99}
    write_config(tmp_path / "c.yaml", given)
    command = Command("run", "c.yaml", "--quiet", MANY, "--out", "many", cwd=tmp_path)
    children: list[int] = []

    def training() -> bool:
        children[:] = [pid for pid in descendants(command.pid) if b"client_process" in _called(pid)]
        return len(children) == 2 and (tmp_path / "many/wire.jsonl").exists()

    assert command.when(training, signal.SIGKILL).status == -9
    assert len(children) == 2 and _gone(children)


def _called(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _gone(pids: list[int]) -> bool:
    """Whether processes end, which they do a moment after their parent."""
    end = time.monotonic() + 60
    while time.monotonic() < end and any(_called(pid) for pid in pids):
        time.sleep(0.05)
    return not any(_called(pid) for pid in pids)
