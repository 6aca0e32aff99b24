"""`fedtune status`, the health route and logs as JSON: of runs under way, finished, stopped and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from command import fedtune as command
from command import write_config

import fedtune
from fedtune.deploy.health import answering
from fedtune.errors import InputError
from fedtune.federation.claim import claimed, is_claimed
from fedtune.federation.progress import Silent
from fedtune.federation.standing import Standing
from fedtune.report.status import status_lines

LORA: dict[str, Any] = {
    "data": {"train": "bundled", "clients": 3, "max_examples": 12, "max_length": 64},
    "method": {"name": "fedavg", "rounds": 3, "batch_size": 4, "lr": 3e-3, "lora": {"rank": 2}},
    "federation": {"quorum": 1, "simulate": {"dropout": 0.4}},
    "evaluation": {"tasks": ["loss"], "max_examples": 8},
}
PROGRAM = Path(sys.executable).with_name("fedtune")


class Looks:
    """What `fedtune.status` says in the middle of a run."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, list[dict[str, Any]]()

    def on_round(self, round: int, scores: Any, state: Any) -> None:
        end = time.monotonic() + 60
        while round and time.monotonic() < end:  # the file follows by a second
            found = fedtune.status(self.path)
            now = found["now"]
            if now and (now["round"], now["answered"], now["faults"]) == (round, now["asked"], {}):
                self.found.append(found)
                return
            time.sleep(0.05)


def test_a_run_under_way_and_the_same_one_finished(tmp_path: Path) -> None:
    looks = Looks(tmp_path / "run")
    run = fedtune.run(LORA, out=tmp_path / "run", callbacks=[looks], progress=False)
    assert [(found["state"], found["round"]) for found in looks.found] == [
        ("under way", round) for round in (1, 2, 3)
    ]
    for found, entry in zip(looks.found, run.rounds[1:], strict=True):
        upto = [message for message in run.messages if message["round"] <= entry["round"]]
        for kind in ("payload_bytes", "framed_bytes"):
            for way in ("down", "up"):
                assert found[kind][way] == sum(m[kind] for m in upto if m["direction"] == way)
        now = found["now"]
        assert (now["rounds"], now["asked"], now["pid"]) == (3, 3, os.getpid())
        assert now["answered"] == len(entry["clients"]) + len(entry["left_out"])
        assert found["evaluation"] == entry["eval"]
    done = fedtune.status(tmp_path / "run")
    assert (done["state"], done["round"], done["now"]) == ("done", 3, None)
    assert not (tmp_path / "run" / "status.json").exists()
    faults = 0
    for row in done["clients"]:
        client = row["client"]
        out = [entry["round"] for entry in run.rounds[1:] if str(client) in entry["left_out"]]
        assert row["left_out"] == len(out) and row["rounds"] == 3 - len(out)
        assert row["fault"] == (f"round {out[-1]}: it dropped out" if out else "")
        assert "here" not in row  # nobody is anywhere else
        faults += len(out)
    assert faults  # the seed has some


def test_of_a_killed_run_it_says_how_far_it_came(tmp_path: Path) -> None:
    write_config(tmp_path / "lora.yaml", LORA)
    ended = command(
        "run", "lora.yaml", "--out", "run", "--quiet", cwd=tmp_path, die_at=3, watched="rounds.csv"
    )
    assert ended.status == -signal.SIGKILL
    found = fedtune.status(tmp_path / "run")
    assert (found["state"], found["round"]) == ("killed", 1)
    assert "it goes on with --resume" in "\n".join(status_lines(found))
    shown = command("status", "run", cwd=tmp_path)
    assert shown.status == 0 and "run: killed, fedavg on bundled" in shown.out and "Clients" in shown.out
    document = json.loads(command("status", "run", "--json", cwd=tmp_path).out)
    assert document == {**found, "run": "run"}
    assert command("run", "--resume", "run", "--quiet", cwd=tmp_path).status == 0
    assert fedtune.status(tmp_path / "run")["state"] == "done"


def test_a_run_of_another_machine_is_under_way_as_long_as_it_writes(tmp_path: Path) -> None:
    """There is no lock of it here: its file alone tells, and how old that is."""
    fedtune.run(LORA, out=tmp_path / "run", progress=False)
    standing = Standing(tmp_path / "run", Silent())
    for seconds, state in ((30, "under way"), (90, "killed")):
        document = standing.document()
        document["updated"] = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()
        (tmp_path / "run" / "status.json").write_text(json.dumps(document))
        assert fedtune.status(tmp_path / "run")["state"] == state


def test_looking_takes_no_lock(tmp_path: Path) -> None:
    assert is_claimed(tmp_path) is None
    with claimed(tmp_path, tmp_path):
        assert is_claimed(tmp_path) is True
        with pytest.raises(InputError, match="being written"), claimed(tmp_path, tmp_path):
            pass
    assert is_claimed(tmp_path) is None


@pytest.mark.parametrize("there", ["nothing", "a folder", "a damaged run"])
def test_what_is_no_run_is_refused(there: str, tmp_path: Path) -> None:
    if there != "nothing":
        (tmp_path / "run").mkdir()
    if there == "a damaged run":
        (tmp_path / "run" / "config.yaml").write_text("method: {name: fedavg}\nmodel: {name: bundled}\n")
    found = command("status", "run", cwd=tmp_path)
    assert found.status == 2 and found.out == "" and "run" in found.err and "Traceback" not in found.err


@pytest.fixture
def asked() -> Iterator[Any]:
    standing = dict[str, Any]()
    with answering(0, lambda: standing) as url:

        def ask(route: str, **change: Any) -> Any:
            standing.update(change)
            with urllib.request.urlopen(url + route, timeout=30) as answer:
                return json.loads(answer.read())

        yield ask


def test_the_health_route_says_how_a_run_stands(asked: Any) -> None:
    assert asked("/health") == {"status": "ok"}
    about: dict[str, Any] = {
        "stage": "round 2",
        "round": 2,
        "rounds": 5,
        "updated": "now",
        "clients": {"0": {}},
    }
    assert asked("/health", **about) == {
        "status": "ok",
        **{key: value for key, value in about.items() if key != "clients"},
    }
    assert asked("/status") == {"status": "ok", **about}
    with pytest.raises(urllib.error.HTTPError) as refused:
        asked("/")
    assert refused.value.code == 404


def test_clients_elsewhere_are_in_the_document_with_when_they_were_seen(tmp_path: Path) -> None:
    there = {
        1: {"name": "south", "here": False, "seen": None},
        0: {"name": "north", "here": True, "seen": "t"},
    }
    document = Standing(tmp_path, Silent(), lambda: there).document()
    assert document["clients"] == {"0": there[0], "1": there[1]} and list(document["clients"]) == ["0", "1"]


def test_logs_as_json_are_one_object_a_line_whatever_happens(tmp_path: Path) -> None:
    write_config(tmp_path / "lora.yaml", LORA)
    done = command("run", "lora.yaml", "--out", "run", "--log-format", "json", "--json", cwd=tmp_path)
    assert done.status == 0 and json.loads(done.out)["status"] == "done"
    lines = [json.loads(line) for line in done.err.splitlines()]
    assert all(datetime.fromisoformat(line["time"]).tzinfo for line in lines)
    assert [line["round"] for line in lines if line["event"] == "round"] == [1, 2, 3]
    assert [line["round"] for line in lines if line["event"] == "scores"] == [0, 1, 2, 3]
    assert any(line["event"] == "warning" and "is left out" in line["text"] for line in lines)
    for arguments in (("run", "nothing.yaml"), ("run", "lora.yaml", "method.lr=-1")):
        refused = command(*arguments, "--log-format", "json", cwd=tmp_path)
        (line,) = map(json.loads, refused.err.splitlines())
        assert refused.status == 2 and line["event"] == "error" and line["text"].startswith("fedtune: ")
    both = command("run", "lora.yaml", "--log-format", "json", "--quiet", cwd=tmp_path)
    assert both.status == 2 and "--quiet" in both.err


def test_progress_takes_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="progress must be"):
        fedtune.run(LORA, out=tmp_path / "run", progress="yaml")  # type: ignore[arg-type]


def test_a_stopped_run_says_so(tmp_path: Path) -> None:
    write_config(tmp_path / "lora.yaml", LORA | {"method": LORA["method"] | {"rounds": 500}})
    process = subprocess.Popen(
        [PROGRAM, "run", "lora.yaml", "--out", "run", "--quiet"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 300
        while not (tmp_path / "run" / "rounds.csv").exists() and time.monotonic() < end:
            time.sleep(0.1)
        assert fedtune.status(tmp_path / "run")["state"] == "under way"
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        process.kill()
    assert fedtune.status(tmp_path / "run")["state"] == "interrupted"
