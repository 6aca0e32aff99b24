"""Trackers: what reaches them, that a run is the same with them, and that none can end or change it."""

from __future__ import annotations

import json
import signal
import sqlite3
import struct
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from command import fedtune as command
from command import write_config

import fedtune
from fedtune.config.file import parse_config
from fedtune.config.tracking import require_trackers
from fedtune.errors import InputError
from fedtune.federation import tracking
from fedtune.federation.tracking import told_settings, told_values

NAMES = ("tensorboard", "wandb", "mlflow", "trackio")
LORA: dict[str, Any] = {
    "data": {"train": "bundled", "clients": 2, "max_examples": 8, "max_length": 64},
    "method": {"name": "fedavg", "rounds": 3, "batch_size": 4, "lr": 3e-3, "lora": {"rank": 2}},
    "evaluation": {"tasks": ["loss"], "max_examples": 8},
}

# A package of a tracker's name that writes down what it is called with, or does what BEHAVIOUR says.
RECORDS = """
import json, os, sys, time, pathlib
behaviour = os.environ.get("BEHAVIOUR", "")
def note(*what):
    with open("THE NOTES", "a") as file:
        file.write(json.dumps(what, default=str) + "\\n")
if behaviour == "no import":
    raise ImportError("a library is missing")
class Run:
    summary = {}
    def define_metric(self, *a, **k): note("define_metric", a, k)
    def log(self, values, step=None):
        print("{")  # not on the run's standard output
        if behaviour == "raises" and values.get("round") == 1: raise RuntimeError("\\x1b[31mno more room")
        if behaviour == "exits" and values.get("round") == 1: sys.exit(7)
        if behaviour == "dies" and values.get("round") == 1: os._exit(9)
        if behaviour == "hangs" and values.get("round") == 1: time.sleep(1e6)
        note("log", values, step)
    def finish(self, exit_code=None): note("finish", exit_code, dict(self.summary))
"""
WANDB = (
    RECORDS
    + """
class errors:
    class UsageError(Exception): pass
def login(verify): raise errors.UsageError("no key")
def Settings(**k): return k
def init(**k):
    note("init", {name: value for name, value in k.items()})
    return Run()
"""
)
TRACKIO = RECORDS + "\ndef init(project, **k):\n    note('init', project, k)\n    return Run()\n"


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which stand-ins of wandb and trackio write down how they are called."""
    for name, text in (("wandb", WANDB), ("trackio", TRACKIO)):
        (tmp_path / "stand-ins" / name).mkdir(parents=True)
        text = text.replace("THE NOTES", str(tmp_path / "notes"))  # commands have another environment
        (tmp_path / "stand-ins" / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "stand-ins"))
    for name in ("wandb", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "notes"


def notes(file: Path) -> list[list[Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def logged(file: Path) -> list[Mapping[str, Any]]:
    return [note[1] for note in notes(file) if note[0] == "log"]


def bits(run: Path) -> dict[str, Any]:
    """All that a run computed: its weights, and its logs without the clock and measured memory."""
    found: dict[str, Any] = {
        str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*.safetensors")
    }
    for log in ("rounds.jsonl", "wire.jsonl"):
        rows = [json.loads(line) for line in (run / log).read_text().splitlines()]
        found[log] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return found


def test_a_tracker_gets_each_round_once_and_changes_nothing(
    recorded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = fedtune.run(LORA, out=tmp_path / "plain", progress=False)
    run = fedtune.run(LORA | {"tracking": ["wandb"]}, out=tmp_path / "run", progress=False)
    said = capfd.readouterr()
    assert said.out == "" and "wandb" not in said.err
    assert bits(run.path) == bits(plain.path)
    rows = logged(recorded)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    for row, entry in zip(rows, run.rounds, strict=True):
        assert row["loss.loss"] == entry["eval"]["loss"]["loss"]
        assert row.get("train_loss") == entry["train_loss"]
        upto = [message for message in run.messages if message["round"] <= entry["round"]]
        for kind in ("payload_bytes", "framed_bytes"):
            for way in ("down", "up"):
                assert row[f"{kind}.{way}"] == sum(m[kind] for m in upto if m["direction"] == way)
    assert rows[-1]["peak_memory_bytes.client"] == run.summary["peak_memory_bytes"]["client"]
    (begun,) = [note[1] for note in notes(recorded) if note[0] == "init"]
    assert (begun["mode"], begun["project"], begun["name"]) == ("offline", "fedtune", "run")
    off = begun["settings"]
    assert off["console"] == "off" and off["disable_git"] and off["x_disable_meta"] and off["x_disable_stats"]
    assert notes(recorded)[-1] == ["finish", 0, {"status": "done"}]
    told = json.loads((run.path / tracking.TRACKING).read_text())
    assert told == {"id": begun["id"], "told": {"wandb": 3}}


def test_nothing_leaves_but_numbers_and_words_of_ours(tmp_path: Path) -> None:
    """Every text that somebody may have written carries a mark, and none of it is in what is told."""
    (tmp_path / "MARK.jsonl").write_text("{}")
    config = parse_config(
        {
            "model": {"name": str(tmp_path / "MARK"), "task": "classification", "device": "auto"},
            "data": {
                "train": str(tmp_path / "MARK.jsonl"),
                "fields": {"output": "MARK"},
                "labels": ["MARK", "other MARK"],
                "split": "MARK",
                "partition": {"name": "dirichlet", "alpha": 0.5, "by": "output"},
                "holdout": {"source": "MARK"},
            },
            "method": {"name": "fedavg", "lora": {"rank": 4, "targets": ["MARK"]}},
            "evaluation": {"tasks": ["loss"], "data_folder": "MARK", "files": {}},
        },
        "test",
    )
    told = told_settings(config)
    assert "MARK" not in json.dumps(told)
    assert told["method.lora.rank"] == 4 and told["method.name"] == "fedavg"
    assert told["data.partition.name"] == "dirichlet" and told["data.partition.alpha"] == 0.5
    assert told["evaluation.tasks"] == "loss" and told["model.task"] == "classification"
    entry = {
        "round": 1,
        "clients": [3, 5],
        "left_out": {"7": "MARK"},
        "train_loss": float("nan"),
        "eval": {"loss": {"loss": 1.5, "tokens": float("inf")}},
        "privacy": {"epsilon": 2.0, "note": "MARK"},
        "updates": {"3": {"norm": 1.0}},
        "seconds": 4.0,
    }
    assert told_values(entry, [1, 2, 3, 4], {"client": 9}) == {
        "clients": 2,
        "left_out": 1,
        "seconds": 4.0,
        "loss.loss": 1.5,
        "privacy.epsilon": 2.0,
        "payload_bytes.down": 1,
        "payload_bytes.up": 2,
        "framed_bytes.down": 3,
        "framed_bytes.up": 4,
        "peak_memory_bytes.client": 9,
    }


@pytest.mark.parametrize("behaviour", ["no import", "raises", "exits", "dies", "hangs"])
def test_one_that_fails_is_said_once_and_the_run_ends_as_without_it(
    behaviour: str,
    recorded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BEHAVIOUR", behaviour)
    monkeypatch.setattr(tracking, "WAIT_S", 20.0 if behaviour != "hangs" else 3.0)
    run = fedtune.run(LORA | {"tracking": ["wandb"]}, out=tmp_path / "run", progress=False)
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("tracking: wandb failed") == 1 and "\x1b" not in said.err
    assert run.status == "done" and len(run.rounds) == 4
    assert json.loads((run.path / "tracking.json").read_text())["told"]["wandb"] <= 0
    monkeypatch.delenv("BEHAVIOUR")
    plain = fedtune.run(LORA, out=tmp_path / "plain", progress=False)
    assert bits(run.path) == bits(plain.path)


def test_a_killed_run_goes_on_in_the_same_run_of_its_tracker(recorded: Path, tmp_path: Path) -> None:
    """Killed before it could tell of a round whose checkpoint was written, and after it has."""
    write_config(tmp_path / "lora.yaml", LORA | {"tracking": ["wandb", "trackio"]})
    for at in (2, 3):
        recorded.unlink(missing_ok=True)
        run = tmp_path / f"run-{at}"
        ended = command(
            "run", "lora.yaml", "--out", run, "--quiet", cwd=tmp_path, die_at=at, watched="rounds.csv"
        )
        assert ended.status == -signal.SIGKILL
        resumed = command("run", "--resume", run, "--quiet", cwd=tmp_path)
        assert resumed.status == 0 and "tracking" not in resumed.err, resumed.err
        both = [note for note in notes(recorded) if note[0] == "init"]
        wandb = [note[1] for note in both if len(note) == 2]
        trackio = [note[2] for note in both if len(note) == 3]
        assert len({begun["id"] for begun in wandb}) == 1 and len({begun["name"] for begun in trackio}) == 1
        assert all(begun["resume"] == "allow" for begun in [*wandb, *trackio])
        rounds = {row["round"]: row["loss.loss"] for row in logged(recorded) if "round" in row}
        want = {entry["round"]: entry["eval"]["loss"]["loss"] for entry in fedtune.open(run).rounds}
        assert rounds == want
        steps = {note[2] for note in notes(recorded) if note[0] == "log" and note[2] is not None}
        assert steps == set(want)


def test_a_missing_package_is_refused_with_what_to_install(tmp_path: Path) -> None:
    missing = [name for name in NAMES if find_spec(name) is None]
    if not missing:
        pytest.skip("all trackers are installed")
    config = parse_config(LORA | {"tracking": missing}, "test")
    with pytest.raises(InputError, match=rf"pip install {' '.join(missing)}"):
        require_trackers(config.tracking)
    with pytest.raises(InputError, match="not installed"):
        fedtune.run(config, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    path = write_config(tmp_path / "one.yaml", LORA | {"tracking": missing[:1]})
    refused = command("validate", path, cwd=tmp_path)
    assert refused.status == 2 and f"pip install {missing[0]}" in refused.err


@pytest.mark.parametrize("given", ["wandb", ["neptune"], ["wandb", "wandb"]])
def test_what_is_no_list_of_trackers_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="tracking"):
        parse_config(LORA | {"tracking": given}, "test")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_real_package_keeps_it_offline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after two rounds and gone on with; what its own files hold is what the run wrote."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_DIR", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tracking, "WAIT_S", 300.0)

    class Stops:
        def on_round(self, round: int, scores: Any, state: Any) -> None:
            if round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedtune.run(LORA | {"tracking": [name]}, out=tmp_path / "run", callbacks=[Stops()], progress=False)
    run = fedtune.open(tmp_path / "run").resume(progress=False)
    assert json.loads((run.path / "tracking.json").read_text())["told"] == {name: 3}
    folder = run.path / "tracking" / name
    want = [entry["eval"]["loss"]["loss"] for entry in run.rounds]
    assert READ[name](folder) == pytest.approx(want, abs=0 if name != "tensorboard" else 1e-6)
    kept = b"".join(
        file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "log.txt"
    )
    assert str(Path.home()).encode() not in kept.replace(str(folder).encode(), b"")


def read_tensorboard(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars("loss.loss")]


def records(data: bytes) -> Iterator[bytes]:
    """Those of a .wandb file: LevelDB's log format after seven bytes; here no record is in several parts."""
    assert data[:4] == b":W&B" and len(data) < 32768  # one block
    at = 7
    while at < len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        assert kind == 1
        yield data[at + 7 : at + 7 + length]
        at += 7 + length


def read_wandb(folder: Path) -> list[float]:
    from wandb.proto import wandb_internal_pb2

    found: dict[int, float] = {}
    files = sorted(folder.rglob("*.wandb"))
    assert len({file.name for file in files}) == 1 and len(files) == 2  # one run, in two parts
    for file in files:
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
            if "round" in row:
                assert row["round"] not in found
                found[row["round"]] = row["loss.loss"]
    return [found[round] for round in sorted(found)]


def read_mlflow(folder: Path) -> list[float]:
    with sqlite3.connect(folder / "mlflow.db") as database:
        (run,) = database.execute("select run_uuid, status, user_id from runs").fetchall()
        assert run[1:] == ("FINISHED", "unknown")
        tags = dict(database.execute("select key, value from tags"))
        assert tags.keys() == {"fedtune", "mlflow.runName", "status"}
        rows = database.execute("select value from metrics where key = 'loss.loss' order by step").fetchall()
    return [value for (value,) in rows]


def read_trackio(folder: Path) -> list[float]:
    with sqlite3.connect(folder / "fedtune.db") as database:
        rows = database.execute("select run_name, metrics from metrics order by step").fetchall()
    assert len({name for name, _ in rows}) == 1
    return [json.loads(metrics)["loss.loss"] for _, metrics in rows]


READ = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}
