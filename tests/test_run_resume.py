"""A run that is killed at any moment and continued ends as one that was not: same bits, same lines."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Command, fedtune, lines, outcome, write_config
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.types import Arrival, Payload
from fedtune.core.wire import Content, encode
from fedtune.federation.journal import Journal

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"rounds": 2}},
    "scaffold": {
        "method": {"rounds": 2, "control_variates": True, "optimizer": "sgd", "lr": 0.05},
        "checkpoints": {"journal": "never"},
    },
    "one-shot": {
        "method": {"rounds": 1, "local_epochs": 2, "arrival": "asynchronous"},
        "evaluation": {"arrivals": True},
        "federation": {"simulate": {"delay_s": 1.0}},
    },
    "stack": {"method": {"rounds": 2, "aggregation": "stack"}},
    "adam": {
        "seed": 6,  # one client drops out in each of the first two rounds
        "method": {"rounds": 3, "server_optimizer": {"name": "adam", "lr": 0.01}},
        "federation": {
            "clients_per_round": 0.7,
            "quorum": 1,
            "simulate": {"dropout": 0.2, "delay_s": 1.0},
            "deadline_s": 1.9,
        },
        "checkpoints": {"keep": 1, "journal": "auto"},
    },
    "standalone": {"method": {"name": "standalone"}},
}


def config(name: str) -> dict[str, Any]:
    blocks = METHODS[name]
    return {
        "seed": blocks.get("seed", 0),
        "data": {"clients": 3, "max_examples": 24, "max_length": 64},
        "method": {"name": "fedavg", "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}, **blocks["method"]},
        "evaluation": {"tasks": ["loss"], "max_examples": 8, **blocks.get("evaluation", {})},
        "federation": blocks.get("federation", {}),
        "checkpoints": {"journal": "always", **blocks.get("checkpoints", {})},
    }


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The outcome of each configuration's run that nothing disturbed."""
    known: dict[str, dict[str, Any]] = {}

    def of(name: str) -> dict[str, Any]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            write_config(folder / "c.yaml", config(name))
            done = fedtune("run", "c.yaml", "--out", "run", "--quiet", cwd=folder)
            assert done.status == 0, done.err
            known[name] = outcome(folder / "run")
        return known[name]

    return of


Unkilled = Callable[[str], dict[str, Any]]


def finish(folder: Path) -> dict[str, Any]:
    done = fedtune("run", "c.yaml", "--resume", "run", "--quiet", cwd=folder)
    assert done.status == 0, done.err
    assert list(folder.glob(".run.*")) == []
    return outcome(folder / "run")


MOMENTS = {  # before the n-th operation on which file the run dies
    "folder made": ("run/rounds.jsonl", 1),
    "zero-shot recorded": ("run/wire.jsonl", 1),
    "first reply kept": ("round-0001.replies", 2),
    "in mid-round": ("run/wire.jsonl", 4),
    "checkpoint half written": (".round-0001.tmp/.checkpoint.json", 1),
    "checkpoint not yet in its place": ("/.round-0001.tmp", 9),
    "between checkpoint and next round": ("round-0001.replies", 4),
    "in the second round": ("round-0002.replies", 2),
    "after the last round": (".final.tmp", 1),
    "in the final save": (".final.tmp", 6),
    "before the summary": ("run/.summary.json", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(moment: str, unkilled: Unkilled, tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", config("lora"))
    watched, operation = MOMENTS[moment]
    killed = fedtune(
        "run", "c.yaml", "--out", "run", "--quiet", cwd=tmp_path, die_at=operation, watched=watched
    )
    assert killed.status == -signal.SIGKILL
    assert (tmp_path / "run").exists()
    assert not (tmp_path / "run/summary.json").exists()
    assert finish(tmp_path) == unkilled("lora")


@pytest.mark.parametrize("name", METHODS)
def test_killed_many_times_at_file_operations(name: str, unkilled: Unkilled, tmp_path: Path) -> None:
    """Every write of a run is a moment to die at; a draw of them, one after another in one run."""
    write_config(tmp_path / "c.yaml", config(name))
    draw, start, died = random.Random(name), ("--out", "run"), 0
    for _ in range(5):
        end = fedtune(
            "run", "c.yaml", *start, "--quiet", cwd=tmp_path, die_at=draw.randint(8, 60), watched="run/"
        )
        if end.status == 0:
            break
        assert end.status == -signal.SIGKILL, end.err
        start, died = ("--resume", "run"), died + 1
    assert died >= 2
    assert finish(tmp_path) == unkilled(name)


def test_killed_at_random_times_by_a_real_command(unkilled: Unkilled, tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", config("lora"))
    program = Path(sys.executable).with_name("fedtune")
    process = subprocess.Popen([program, "run", "c.yaml", "--out", "run", "--quiet"], cwd=tmp_path)
    while process.poll() is None and not _size(tmp_path / "run/checkpoints/round-0001.replies"):
        pass
    process.kill()
    assert process.wait() == -signal.SIGKILL
    draw = random.Random(0)
    for _ in range(3):
        command = Command("run", "c.yaml", "--resume", "run", "--quiet", cwd=tmp_path)
        end = time.monotonic() + draw.uniform(0.1, 0.9)
        command.when(lambda end=end: time.monotonic() > end, signal.SIGKILL)  # type: ignore[misc]
    assert finish(tmp_path) == unkilled("lora")


@pytest.mark.parametrize("operation", [1, 3])
def test_killed_before_its_folder_was_there_it_begins_anew(
    operation: int, unkilled: Unkilled, tmp_path: Path
) -> None:
    write_config(tmp_path / "c.yaml", config("lora"))
    died = fedtune(
        "run", "c.yaml", "--out", "run", "--quiet", cwd=tmp_path, die_at=operation, watched=".run.tmp"
    )
    assert died.status == -signal.SIGKILL
    assert not (tmp_path / "run").exists()
    assert finish(tmp_path) == unkilled("lora")


def test_interrupted_it_says_so_keeps_its_checkpoint_and_goes_on(unkilled: Unkilled, tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", config("lora"))
    run = tmp_path / "run"
    stopped = fedtune(
        "run", "c.yaml", "--out", "run", "--quiet",
        cwd=tmp_path, die_at=2, watched="round-0002.replies", die_by=signal.SIGINT,
    )  # fmt: skip
    assert stopped.status == 130
    assert "Traceback" not in stopped.err
    assert "--resume" in stopped.err
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert (run / "checkpoints/round-0001/state.safetensors").is_file()
    assert finish(tmp_path) == unkilled("lora")


def test_kept_replies_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One-shot has one long round: what came in before the kill is not computed twice."""
    from fedtune.config.file import parse_config
    from fedtune.core.client import ClientRunner
    from fedtune.federation import run as federation
    from fedtune.federation.progress import Silent

    settings = parse_config(config("one-shot"), "test")
    handle, asked = ClientRunner.handle, []

    def dying(self: ClientRunner, client: int, frame: bytes) -> bytes:
        asked.append(client)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return handle(self, client, frame)

    monkeypatch.setattr(ClientRunner, "handle", dying)
    with pytest.raises(KeyboardInterrupt):
        federation.run(settings, tmp_path / "run", Silent())
    federation.run(settings, tmp_path / "run", Silent(), resume=True)
    assert asked[3:] == asked[2:3]


def test_a_finished_run_is_not_run_again(unkilled: Unkilled, tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", config("lora"))
    first = fedtune("run", "c.yaml", "--out", "run", "--quiet", "--json", cwd=tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    again = fedtune("run", "c.yaml", "--resume", "run", "--quiet", "--json", cwd=tmp_path)
    assert again.json() == first.json()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_without_its_newest_checkpoint_a_run_goes_on_from_the_one_before(
    unkilled: Unkilled, tmp_path: Path
) -> None:
    write_config(tmp_path / "c.yaml", config("lora"))
    run = tmp_path / "run"
    fedtune("run", "c.yaml", "--out", "run", "--quiet", cwd=tmp_path, die_at=1, watched=".final.tmp")
    shutil.rmtree(run / "checkpoints/round-0002")
    assert finish(tmp_path) == unkilled("lora")


class Fixed:
    """A transport that pulls orders ahead in the given steps and answers the oldest one first."""

    def __init__(self, ahead: list[int]) -> None:
        self.ahead, self.states, self.trained = ahead, dict[int, Payload](), list[int]()

    def exchange(
        self, round: int, frames: Iterable[tuple[int, bytes]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        frames, held = iter(frames), []
        for ahead in [*self.ahead, *[1] * 20]:
            for _ in range(ahead):
                held += [client for client, _ in [next(frames, (None, b""))] if client is not None]
            if not held:
                return
            client = held.pop(0)
            self.trained.append(client)
            self.states[client] = Payload(scalars={"rounds": round})
            reply = Content(Payload({"w": torch.tensor([float(client)])}), {"client": client})
            yield Arrival(client, encode(reply)) if client != 2 else Arrival(2, fault="it dropped out")


def _exchange(folder: Path, ahead: list[int], stop: int) -> tuple[list[Any], list[int], dict[int, Payload]]:
    """Events of a round of six clients, stopped after `stop` arrivals; clients trained; states kept."""
    transport, events = Fixed(ahead), list[Any]()

    def orders() -> Iterator[tuple[int, bytes]]:
        for client in range(6):
            events.append(("sent", client))
            yield client, b"order"

    journal = Journal(transport, folder, transport.states)
    for number, arrival in enumerate(journal.exchange(1, orders(), in_plan_order=False), start=1):
        events.append(arrival)
        if number == stop:
            break
    return events, transport.trained, transport.states


@settings(max_examples=60)
@given(
    ahead=st.lists(st.integers(1, 3), max_size=4),
    stop=st.integers(1, 6),
    cut=st.integers(0, 400),
    junk=st.binary(max_size=80),
)
def test_a_journal_cut_anywhere_gives_the_round_again(
    ahead: list[int], stop: int, cut: int, junk: bytes
) -> None:
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as killed:
        events, trained, states = _exchange(Path(whole), ahead, stop=99)
        assert trained == list(range(6))
        _exchange(Path(killed), ahead, stop)
        journal = Path(killed) / "round-0001.replies"
        full = journal.read_bytes()
        journal.write_bytes(full[: max(0, len(full) - cut)] + junk)
        again, trained_again, states_again = _exchange(Path(killed), [*ahead, 6], stop=99)
        kept = 6 - len(trained_again)
        assert kept <= stop
        if cut == 0:
            assert kept == stop
        # the order in which the rest is pulled is the transport's; what is kept comes as it came
        arrivals = [event for event in events if isinstance(event, Arrival)]
        assert [event for event in again if isinstance(event, Arrival)] == arrivals
        position = events.index(arrivals[kept - 1]) + 1 if kept else 0
        assert again[:position] == events[:position]
        assert states_again == states
        assert len(journal.read_bytes()) == len((Path(whole) / "round-0001.replies").read_bytes())


def test_logs_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", config("lora"))
    run = tmp_path / "run"
    fedtune("run", "c.yaml", "--out", "run", "--quiet", cwd=tmp_path, die_at=2, watched="round-0002.replies")
    with (run / "wire.jsonl").open("a") as log:
        log.write('{"round": 2, "cli')  # a line that the kill cut
    finish(tmp_path)
    entries = lines(run / "wire.jsonl")
    assert [(e["round"], e["client"], e["direction"]) for e in entries] == [
        (round, client, way) for round in (1, 2) for client in range(3) for way in ("down", "up")
    ]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
