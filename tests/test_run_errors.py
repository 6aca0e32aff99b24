"""What is wrong ends in one clear message and its exit status; nothing is written, or nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Result, fedtune, lines, outcome, write_config
from model_families import edit_json, save_folder
from safetensors import SafetensorError
from safetensors.torch import save_file

from fedtune.config.file import parse_config
from fedtune.core.client import ClientRunner
from fedtune.core.cohort import QuorumError
from fedtune.core.types import ClientError
from fedtune.errors import FederationError
from fedtune.federation import run as federation
from fedtune.federation.files import disk_errors
from fedtune.federation.progress import Silent

ROW = {"instruction": "w5 w6", "output": "w7", "category": "a"}


def base() -> dict[str, Any]:
    return {
        "data": {"clients": 3, "max_examples": 12, "max_length": 64},
        "method": {"name": "fedavg", "rounds": 2, "batch_size": 4, "lora": {"rank": 2}},
        "evaluation": {"tasks": ["loss"], "max_examples": 8},
    }


def own_data(folder: Path, rows: list[Any], **data: Any) -> dict[str, Any]:
    (folder / "d.jsonl").write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    block = {"train": "d.jsonl", "template": "plain", "clients": 2, "max_length": 64, **data}
    return {**base(), "data": block}


def run(folder: Path, document: dict[str, Any], *arguments: str, **limits: Any) -> Result:
    write_config(folder / "c.yaml", document)
    return fedtune("run", "c.yaml", *(arguments or ("--out", "run")), "--quiet", cwd=folder, **limits)


def refused(result: Result, folder: Path, *parts: str, status: int = 2) -> None:
    assert result.status == status, result.err
    assert result.out == ""
    assert result.err.startswith("fedtune: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err
    assert not (folder / "run").exists()
    assert list(folder.glob(".run*")) == []


GOOD = [ROW] * 4
DATA: dict[str, tuple[list[Any], dict[str, Any], list[str]]] = {
    "malformed line": ([ROW, ROW, '{"instruction": \n'], {}, ["d.jsonl:3", "not valid JSON"]),
    "not an object": ([ROW, "[1]\n"], {}, ["d.jsonl:2", "JSON object"]),
    "missing key": ([ROW, {"instruction": "w5"}], {}, ["d.jsonl:2", '"output"', "instruction"]),
    "not text": ([ROW, {**ROW, "output": {"a": 1}}], {}, ["d.jsonl:2", '"output"', "an object"]),
    "empty file": ([], {}, ["d.jsonl", "no examples"]),
    "missing file": (GOOD, {"train": "e.jsonl"}, ["e.jsonl", "no such file"]),
    "missing held-out file": (GOOD, {"holdout": {"source": "e.jsonl"}}, ["e.jsonl", "no such file"]),
    "key not there": (GOOD, {"fields": {"input": "context"}}, ["d.jsonl:1", '"context"']),
    "conversation": (
        [{"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]}],
        {"fields": {"instruction": "messages.0.content", "output": "messages.1.content"}},
        ["d.jsonl:1", '"messages.0.content" for instruction', "A conversation is read whole"],
    ),
    "category is the answer": (
        GOOD,
        {"fields": {"output": "category"}, "partition": {"name": "by-field"}},
        ["no example has a category; set data.fields.category"],
    ),
    "no category to hold out": (
        GOOD,
        {"fields": {"category": None}, "holdout": {"category": "last"}},
        ["no example has a category; set data.fields.category"],
    ),
    "more clients than examples": (GOOD, {"clients": 5}, ["5", "clients", "examples"]),
    "an empty client": (
        GOOD * 3,
        {"clients": 3, "partition": {"name": "quantity", "fractions": [0.5, 0.5, 0.0]}},
        ["fractions"],
    ),
    "impossible minimum": (GOOD, {"partition": {"name": "dirichlet", "minimum": 3}}, ["minimum", "3"]),
    "unknown category": (GOOD, {"holdout": {"category": "b"}}, ['"b"']),
    "everything held out": (GOOD, {"holdout": {"category": "a"}}, ["train"]),
    "unlike fractions": (
        GOOD * 3,
        {"partition": {"name": "quantity", "fractions": [0.2, 0.3, 0.5]}},
        ["3", "2"],
    ),
}


@pytest.mark.parametrize("fault", DATA)
def test_data_that_cannot_be_used(fault: str, tmp_path: Path) -> None:
    rows, data, parts = DATA[fault]
    refused(run(tmp_path, own_data(tmp_path, rows, **data)), tmp_path, *parts)


SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "unknown method": (["method.name=fedavgg"], ["'fedavgg'", 'mean "fedavg"']),
    "unknown field": (["method.rank=4"], ["method.rank is not a known setting"]),
    "unknown task": (["evaluation.tasks=[los]"], ["'los'", 'mean "loss"']),
    "unknown partition": (["data.partition.name=iidd"], ["'iidd'", 'mean "iid"']),
    "no instruction": (["data.fields.instruction=null"], ["data.fields: instruction is null, but every"]),
    "no output": (
        ["data.public={source: bundled, fields: {output: null}}"],
        ["data.public.fields: output is null, but every", "name the key that holds it"],
    ),
    "unknown override": (["methd.lr=1"], ["methd", 'mean "method"']),
    "no override": (["lr"], ["'lr' is not an override"]),
    "foreign LoRA target": (["method.lora.targets=[k_prj]"], ["k_prj", "self_attn.k_proj"]),
    "too many asked": (["federation.clients_per_round=4"], ["clients_per_round is 4", "3 clients"]),
    "quorum out of reach": (["federation.quorum=4"], ["quorum is 4", "3 clients"]),
    "quorum beyond the cohort": (["federation.quorum=2", "federation.clients_per_round=0.3"], ["asks 1 "]),
    "no model": (["model.name=./nowhere"], ["nowhere"]),
}


@pytest.mark.parametrize("fault", SETTINGS)
def test_settings_that_cannot_be_used(fault: str, tmp_path: Path) -> None:
    overrides, parts = SETTINGS[fault]
    refused(run(tmp_path, base(), *overrides, "--out", "run"), tmp_path, *parts)


def test_a_cuda_device_that_is_not_there(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    refused(run(tmp_path, base(), "model.device=cuda", "--out", "run"), tmp_path, "model.device")


def test_a_model_folder_without_weights(tmp_path: Path) -> None:
    (save_folder(tmp_path / "m") / "model.safetensors").unlink()
    document = {**own_data(tmp_path, GOOD), "model": {"name": "m"}}
    refused(run(tmp_path, document), tmp_path, "m: no weights in ", "model.safetensors")
    assert run(tmp_path, {**document, "model": {"name": "m", "initial": "scratch"}}).status == 0


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_out_is_not_touched(kind: str, tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine.txt").write_text("mine")
    else:
        (tmp_path / "run").write_text("mine")
    result = run(tmp_path, base())
    assert result.status == 2
    assert "run exists already" in result.err
    kept = tmp_path / "run" / "mine.txt" if kind == "folder" else tmp_path / "run"
    assert kept.read_text() == "mine"
    assert [p.name for p in (tmp_path / "run").glob("*")] == (["mine.txt"] if kind == "folder" else [])


def test_an_empty_out_is_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert run(tmp_path, base()).status == 0
    assert (tmp_path / "run" / "summary.json").is_file()


def test_out_and_resume_together(tmp_path: Path) -> None:
    refused(run(tmp_path, base(), "--out", "run", "--resume", "run"), tmp_path, "--resume")


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The folder of a run with two whole checkpoints out of three, and a model and data of its own."""
    save_folder(tmp_path / "m")
    document = own_data(tmp_path, [ROW, {**ROW, "output": "w9"}] * 6, holdout={"fraction": 0.2})
    document |= {"model": {"name": "m"}, "method": {**document["method"], "rounds": 3}}
    document["checkpoints"] = {"journal": "always"}
    killed = run(tmp_path, document, die_at=2, watched="round-0003.replies")
    assert killed.status == -signal.SIGKILL
    return tmp_path


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def resume(folder: Path, *overrides: str, **limits: Any) -> Result:
    return fedtune("run", "c.yaml", *overrides, "--resume", "run", "--quiet", cwd=folder, **limits)


def _other_weights(folder: Path) -> None:
    weights = folder / "m" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def _other_data(folder: Path) -> None:
    (folder / "d.jsonl").write_text((folder / "d.jsonl").read_text().replace("w9", "w8", 1))


def _flip(name: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        file = folder / "run/checkpoints/round-0002" / name
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)

    return flip


def _cut(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        file = folder / "run/checkpoints/round-0002" / name
        file.write_bytes(file.read_bytes()[:50])

    return cut


def _of_another(folder: Path) -> None:
    edit_json(folder / "run/checkpoints/round-0002/checkpoint.json", config_sha256="0" * 64)


CHANGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "weights": (_other_weights, ["began with another model", "m now has"]),
    "data": (_other_data, ["began with another data", "d.jsonl now has"]),
    "a flipped bit of a weight": (_flip("state.safetensors"), ["round-0002 is damaged", "was altered"]),
    "weights cut short": (_cut("state.safetensors"), ["round-0002 is damaged", "Remove that folder"]),
    "scalars altered": (_flip("state.json"), ["round-0002 is damaged"]),
    "index cut short": (_cut("checkpoint.json"), ["round-0002 is damaged"]),
    "weights missing": (
        lambda folder: (folder / "run/checkpoints/round-0002/state.safetensors").unlink(),
        ["round-0002 is damaged"],
    ),
    "checkpoint of another run": (_of_another, ["round-0002 belongs to another configuration"]),
    "saved settings": (
        lambda folder: (folder / "run/config.yaml").write_text("seed: [0"),
        ["config.yaml: not valid YAML"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_refuses_what_has_changed_and_touches_nothing(change: str, killed: Path) -> None:
    alter, parts = CHANGES[change]
    alter(killed)
    before = state_of(killed / "run")
    result = resume(killed)
    assert result.status == 2, result.err
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err
    assert state_of(killed / "run") == before


def test_a_damaged_checkpoint_removed_the_run_goes_on_from_the_one_before(killed: Path) -> None:
    shutil.copytree(killed / "run", killed / "copy")
    assert resume(killed).status == 0
    whole = outcome(killed / "run")
    shutil.rmtree(killed / "run")
    (killed / "copy").rename(killed / "run")
    _flip("state.safetensors")(killed)
    assert resume(killed).status == 2
    shutil.rmtree(killed / "run/checkpoints/round-0002")
    assert resume(killed).status == 0
    assert outcome(killed / "run") == whole


def test_resume_with_other_settings(killed: Path) -> None:
    before = state_of(killed / "run")
    result = resume(killed, "method.lr=0.5", "seed=1")
    assert result.status == 2
    assert "another configuration; different: seed, method" in result.err
    assert state_of(killed / "run") == before


def test_resume_of_something_else(killed: Path) -> None:
    shutil.rmtree(killed / "run")
    (killed / "run").mkdir()
    (killed / "run" / "notes.txt").write_text("mine")
    result = resume(killed)
    assert result.status == 2
    assert "not a run folder" in result.err
    assert [p.name for p in (killed / "run").iterdir()] == ["notes.txt"]


ADAM = {"server_optimizer": {"name": "adam", "lr": 0.01}}  # its checkpoint is three times a reply
STACK = {"aggregation": "stack", "lora": {"rank": 1}}  # its checkpoint grows from round to round


@pytest.mark.parametrize(
    ("method", "kilobytes", "what", "done"),
    [
        (ADAM, 30, "checkpoint round-0001", 0),
        (STACK, 45, "checkpoint round-0002", 1),
        (STACK, 70, "checkpoint round-0003", 2),
        (STACK, 100, "the result", 3),
    ],
)
def test_a_disk_that_is_full_when_a_checkpoint_is_written(
    method: dict[str, Any], kilobytes: int, what: str, done: int, tmp_path: Path
) -> None:
    document = base()
    document["method"] |= {"rounds": 3, **method}
    document["federation"] = {"clients_per_round": 1 if method is ADAM else 3}
    document["checkpoints"] = {"keep": None}
    write_config(tmp_path / "c.yaml", document)
    stopped = run(tmp_path, document, file_bytes=kilobytes * 1000)
    assert stopped.status == 3, stopped.err
    assert "Traceback" not in stopped.err
    assert f"{what} could not be written" in stopped.err
    assert "--resume" in stopped.err
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "stopped"
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("*round-*[0-9]"))
    assert names == [f"round-{n:04d}" for n in range(1, done + 1)]
    assert fedtune("run", "c.yaml", "--resume", "run", "--quiet", cwd=tmp_path).status == 0
    assert run(tmp_path, document, "--out", "whole").status == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("kilobytes", [10, 20])  # a reply has 17
def test_a_disk_that_is_full_when_a_reply_is_kept(kilobytes: int, tmp_path: Path) -> None:
    stopped = run(tmp_path, base(), file_bytes=kilobytes * 1000)
    assert stopped.status == 3, stopped.err
    assert "the reply of client" in stopped.err
    assert "Traceback" not in stopped.err
    assert fedtune("run", "c.yaml", "--resume", "run", "--quiet", cwd=tmp_path).status == 0
    assert run(tmp_path, base(), "--out", "whole").status == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_round_under_its_quorum_stops_the_run(tmp_path: Path) -> None:
    document = base()
    document["federation"] = {"quorum": 3, "simulate": {"dropout": 0.3}}
    document["method"]["rounds"] = 9
    stopped = run(tmp_path, document)
    assert stopped.status == 3
    assert "Traceback" not in stopped.err
    message = stopped.err.splitlines()[-1]
    assert "2 of 3 clients" in message or "1 of 3 clients" in message
    assert "the quorum is 3" in message
    assert "it dropped out" in message
    rounds = lines(tmp_path / "run/rounds.jsonl")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["rounds"] == rounds[-1]["round"]
    assert f"round {rounds[-1]['round'] + 1}: " in message
    again = fedtune("run", "c.yaml", "--resume", "run", "--quiet", cwd=tmp_path)
    assert again.err.splitlines()[-1] == message  # simulated drop-outs are the same each time


def test_a_run_under_its_quorum_goes_on_once_the_clients_are_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = parse_config({**base(), "federation": {"quorum": 3}}, "test")
    whole = federation.run(settings, tmp_path / "whole", Silent())
    handle = ClientRunner.handle
    gone = True

    def handle_or_fail(self: ClientRunner, client: int, frame: bytes) -> bytes:
        if gone and client == 1 and (tmp_path / "run/checkpoints/round-0001").exists():
            raise ClientError("its disk is gone")
        return handle(self, client, frame)

    monkeypatch.setattr(ClientRunner, "handle", handle_or_fail)
    with pytest.raises(QuorumError, match=r"round 2: 2 of 3 .*client 1: .*its disk is gone"):
        federation.run(settings, tmp_path / "run", Silent())
    stopped = json.loads((tmp_path / "run/summary.json").read_text())
    assert (stopped["status"], stopped["rounds"]) == ("stopped", 1)
    assert (tmp_path / "run/checkpoints/round-0001/state.safetensors").is_file()
    gone = False
    done = federation.run(settings, tmp_path / "run", Silent(), resume=True)
    assert done["status"] == "done"
    assert done["evaluation"] == whole["evaluation"]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_reference_rows_are_not_held_to_what_is_simulated_for_the_methods(tmp_path: Path) -> None:
    for name in ("standalone", "centralized"):
        document = base()
        document["method"] = {"name": name, "batch_size": 4, "lora": {"rank": 2}}
        document["federation"] = {
            "quorum": 3,
            "clients_per_round": 3,
            "deadline_s": 0.1,
            "simulate": {"dropout": 0.9, "delay_s": 5.0},
        }
        summary = federation.run(parse_config(document, name), tmp_path / name, Silent())
        assert summary["status"] == "done"
        assert summary["payload_bytes"] == {"down": 0, "up": 0}
        assert lines(tmp_path / name / "rounds.jsonl")[-1]["left_out"] == {}


SYSTEM = {
    errno.ENOSPC: "No space left on device: f. Free some space.",
    errno.EDQUOT: "quota",
    errno.EACCES: "Permission denied: f. Give this user the right to write there.",
    errno.EROFS: "Read-only file system: f. It is mounted to be read alone; use another folder.",
    errno.EMFILE: "Too many open files: f. Raise the limit of open files (ulimit -n).",
    errno.ENAMETOOLONG: "File name too long: f. Use a shorter name",
    errno.ENOTDIR: "Not a directory: f. A file stands where a folder is needed",
    errno.EISDIR: "Is a directory: f. A folder stands where a file is needed",
    errno.EIO: "Input/output error: f. The disk or the network drive fails",
    errno.EFBIG: "File too large: f. Have the largest size of a file raised",
    errno.EXDEV: "link: f. What was complete before",  # no remedy of its own
}


@pytest.mark.parametrize("number", SYSTEM)
def test_what_the_system_says_of_a_write_is_what_is_told(number: int) -> None:
    with pytest.raises(FederationError) as told, disk_errors("checkpoint round-0002"):
        raise OSError(number, os.strerror(number), "f")
    said = str(told.value)
    assert said.startswith("checkpoint round-0002 could not be written: ")
    assert SYSTEM[number] in said
    assert said.endswith(" What was complete before is still there: continue with --resume.")
    assert ("ree some space" in said) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_a_systems_error_in_a_librarys_words(tmp_path: Path) -> None:
    refused = r"Permission denied.*Give this user the right"
    with pytest.raises(FederationError, match=refused), disk_errors("the result"):
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")
    (tmp_path / "file").write_text("")
    refused = "A file stands where a folder is needed"
    with pytest.raises(FederationError, match=refused), disk_errors("the result"):
        save_file({"a": torch.zeros(1)}, tmp_path / "file" / "a.safetensors")
