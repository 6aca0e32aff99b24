"""A fault that any client would have ends the run and is named; a client's own leaves that client out."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Result, fedtune, lines, outcome, write_config

from fedtune.config.file import parse_config
from fedtune.errors import ProgramError
from fedtune.federation import run as federation
from fedtune.federation import scoring
from fedtune.federation.progress import Silent
from fedtune.methods.fedbiot import method as fedbiot
from fedtune.methods.fedkseed.method import FedKSeed

PLUGIN = Path(__file__).with_name("planted_faults.py")
LORA = {"local_steps": 2, "batch_size": 2, "lora": {"rank": 2}}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg", **LORA},
    "fedkseed": {"name": "fedkseed", "local_steps": 2, "batch_size": 2, "seeds": 8},
    "fedbiot": {
        "name": "fedbiot",
        **LORA,
        "adapter_layers": 1,
        "alignment": {"steps_before": 1, "steps": 1, "batch_size": 2},
    },
    "fedcybgd": {"name": "fedcybgd", "local_steps": 2, "batch_size": 2, "gradient_checkpointing": False},
}
KINDS = {
    "device memory": [
        "training of client 1 in round 2: out of memory (CUDA out of memory.",
        "method.batch_size",
    ],
    "memory": [
        "training of client 1 in round 2: out of memory",
        "2 examples x ",
        "lower method.batch_size or data.max_length, or set method.gradient_checkpointing=full",
    ],
    "allocator": ["out of memory ([enforce fail at alloc_cpu.cpp", "model.dtype=bfloat16"],
    "program": [
        "training of client 1 in round 2: a fault of the program",
        "'no_such_tensor'",
        "planted_faults.py",
    ],
    "package": ["round 2: the package no_such_package is missing"],
    "disk": [
        "a fault of this machine",
        "Too many open files: held/x. Raise the limit of open files (ulimit -n).",
    ],
    "exit": ["a fault of the program or the model, not of a client: SystemExit: 7."],
}
CASES = [(method, "device memory") for method in METHODS] + [("fedavg", kind) for kind in list(KINDS)[1:]]


def document(method: str, **more: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"clients": 3, "max_examples": 12, "max_length": 64}
    if method == "fedbiot":
        data["public"] = {"source": "bundled", "max_examples": 4}
    return {
        "data": data,
        "method": {"rounds": 3, **METHODS[method]},
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "every": 0},
        "federation": {"quorum": 1},
        **more,
    }


def run(folder: Path, *arguments: str) -> Result:
    return fedtune("run", "c.yaml", *arguments, "--plugin", PLUGIN, "--quiet", cwd=folder)


def plant(folder: Path, kind: str, client: int = 1, round: int | None = 2) -> None:
    (folder / "fault.json").write_text(json.dumps({"kind": kind, "client": client, "round": round}))


def stopped(folder: Path, result: Result, parts: list[str], rounds: int = 1) -> None:
    assert result.status == 3, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    message = result.err.splitlines()[-1]
    for part in parts:
        assert part in message
    assert "--resume run goes on" in message
    assert message.endswith("--debug shows the traceback.")
    summary = json.loads((folder / "run/summary.json").read_text())
    assert (summary["status"], summary["rounds"], summary["left_out"]) == ("stopped", rounds, {})
    assert (folder / f"run/checkpoints/round-{rounds:04d}/state.safetensors").is_file()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The outcome of each method's run that nothing broke."""
    known: dict[str, dict[str, Any]] = {}

    def of(method: str) -> dict[str, Any]:
        if method not in known:
            folder = tmp_path_factory.mktemp(method)
            write_config(folder / "c.yaml", document(method))
            assert run(folder, "--out", "run").status == 0
            known[method] = outcome(folder / "run")
        return known[method]

    return of


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_what_any_client_would_meet_stops_the_run_and_is_resumed(
    method: str, kind: str, tmp_path: Path, whole: Callable[[str], dict[str, Any]]
) -> None:
    write_config(tmp_path / "c.yaml", document(method))
    plant(tmp_path, kind)
    stopped(tmp_path, run(tmp_path, "--out", "run"), KINDS[kind])
    if kind == "program":
        again = run(tmp_path, "--resume", "run", "--debug")
        assert again.status == 3
        assert "Traceback" in again.err and "planted_faults.py" in again.err
        assert again.err.splitlines()[-1].startswith("fedtune: training of client 1 in round 2")
    (tmp_path / "fault.json").unlink()
    assert run(tmp_path, "--resume", "run").status == 0
    assert outcome(tmp_path / "run") == whole(method)


@pytest.mark.parametrize(
    "transport",
    [
        pytest.param(
            {"name": "flower-simulation", "workers": 1},
            marks=pytest.mark.skipif(
                find_spec("flwr") is None, reason="Flower is not installed (the extra `flower`)"
            ),
        ),
        {"workers": 2},
    ],
    ids=["flower", "processes"],
)
def test_the_same_in_processes_of_their_own(
    transport: dict[str, Any], tmp_path: Path, whole: Callable[[str], dict[str, Any]]
) -> None:
    kept = {"journal": "always"}  # so that client 1 is alone in the process that is killed
    write_config(tmp_path / "c.yaml", document("fedavg", transport=transport, checkpoints=kept))
    plant(tmp_path, "device memory")
    shown = run(tmp_path, "--out", "run", "--debug")
    assert shown.status == 3
    assert "planted_faults.py" in shown.err  # the traceback of the other process
    for part in KINDS["device memory"]:
        assert part in shown.err.splitlines()[-1]
    plant(tmp_path, "killed")  # as the system does when memory is short
    parts = ["training of client 1 in round 2", "its process of the simulation ended", "transport.workers"]
    stopped(tmp_path, run(tmp_path, "--resume", "run"), parts)
    (tmp_path / "fault.json").unlink()
    assert run(tmp_path, "--resume", "run").status == 0
    assert outcome(tmp_path / "run")["final"] == whole("fedavg")["final"]


def test_a_client_whose_data_are_of_no_use_is_left_out_named_and_counted(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", document("fedavg"))
    plant(tmp_path, "data", client=2, round=None)
    done = run(tmp_path, "--out", "run")
    assert done.status == 0, done.err
    assert done.err.splitlines()[-1] == (
        "fedtune: the result is without 1 of 3 clients, which were left out of every round that asked them. "
        "client 2: the loss became nan at step 1; lower method.lr"
    )
    assert "client 2 of 3 of 3" in done.out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    why = "the loss became nan at step 1; lower method.lr"
    assert summary["left_out"] == {"2": {"asked": 3, "rounds": [1, 2, 3], "why": why}}
    assert summary["status"] == "done"
    assert [entry["clients"] for entry in lines(tmp_path / "run/rounds.jsonl")][1:] == [[0, 1]] * 3


def test_one_left_out_of_some_rounds_is_said_too(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", document("fedavg"))
    plant(tmp_path, "data")
    done = run(tmp_path, "--out", "run")
    assert done.status == 0, done.err
    last = done.err.splitlines()[-1]
    assert last == "fedtune: left out of some rounds: client 1 of 1 of 3; rounds.jsonl says why"


def no_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")


PARTS: dict[str, tuple[str, Any, str, list[str]]] = {
    "fedavg": (
        "zero-shot evaluation: out of memory (CUDA out of memory. Tried to allocate 9 GiB.) Its batches have "
        "up to 64 examples x 64 tokens, fewer where that is more than about 2GB: lower evaluation.memory, "
        "evaluation.batch_size, data.max_length or evaluation.max_new_tokens, or set model.dtype=bfloat16.",
        scoring,
        "evaluate",
        ["evaluation.memory"],
    ),
    "fedbiot": (
        "alignment before round 1: out of memory (CUDA out of memory. Tried to allocate 9 GiB.) Its batches "
        "have up to 2 public examples x",
        fedbiot,
        "align",
        ["method.alignment.batch_size", "method.alignment.keep_mb"],
    ),
    "fedkseed": ("aggregation of round 1: out of memory", FedKSeed, "server_step", ["fedtune plan"]),
}


@pytest.mark.parametrize("method", PARTS)
def test_memory_that_runs_out_elsewhere_names_that_part_and_its_settings(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, where, name, parts = PARTS[method]
    monkeypatch.setattr(where, name, no_memory)
    with pytest.raises(ProgramError) as ended:
        federation.run(parse_config(document(method), "test"), tmp_path / "run", Silent())
    assert said in str(ended.value)
    for part in parts:
        assert part in str(ended.value)
    assert (tmp_path / "run").exists() == (method != "fedavg")  # before the rounds nothing is written
