"""Several processes at one folder, or at one name: each run has its own folder, each folder one writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from command import Command, fedtune, write_config

from fedtune.errors import InputError
from fedtune.federation.claim import claimed

TINY = {
    "data": {"clients": 2, "max_examples": 24, "max_length": 64},
    "method": {"name": "fedavg", "rounds": 2, "local_steps": 2, "lora": {"rank": 2}},
    "evaluation": {"tasks": ["loss"], "max_examples": 4, "bootstrap": 0},
}

HOLDER = """
import sys, time
from pathlib import Path
from fedtune.federation.claim import claimed
with claimed(Path(sys.argv[1]), Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """A process that has claimed a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True, cwd=path.parent
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_runs_started_side_by_side_have_folders_of_their_own(tmp_path: Path) -> None:
    write_config(tmp_path / "t.yaml", TINY)
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "fedtune.cli.main", "run", "t.yaml", f"seed={seed}", "--json", "--quiet"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    seeds = [json.loads(run.communicate(timeout=300)[0])["seed"] for run in runs]
    assert seeds == [0, 1, 2] and [run.returncode for run in runs] == [0, 0, 0]
    made = sorted(path for path in (tmp_path / "runs").iterdir() if path.name != ".encoded")
    assert [path.name for path in made] == ["t", "t-2", "t-3"]
    for path in made:  # what stands in one folder is of one run
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        assert f"seed: {summary['seed']}\n" in (path / "config.yaml").read_text(encoding="utf-8")
        lines = (path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["round"] for line in lines] == [0, 1, 2]


def test_a_folder_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path / "t.yaml", TINY)
    process = holder(tmp_path / "run")
    try:
        for arguments in (("--out", "run"), ("--resume", "run")):
            refused = fedtune("run", "t.yaml", *arguments, cwd=tmp_path)
            assert refused.status == 2
            assert f"run is being written by process {process.pid}; wait until that has ended" in refused.err
        assert not (tmp_path / "run").exists()
    finally:
        process.kill()
        process.wait()
    assert (
        fedtune("run", "t.yaml", "--out", "run", cwd=tmp_path).status == 0
    )  # the lock went with its process


def test_two_that_resume_one_run_write_its_rounds_once(tmp_path: Path) -> None:
    write_config(tmp_path / "t.yaml", TINY)
    assert fedtune("run", "t.yaml", "--out", "whole", "--quiet", cwd=tmp_path).status == 0
    first = Command("run", "t.yaml", "--out", "run", "--quiet", cwd=tmp_path)
    log = tmp_path / "run" / "rounds.jsonl"
    first.when(lambda: log.exists() and log.stat().st_size > 0, signal.SIGKILL)
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "fedtune.cli.main", "run", "t.yaml", "--resume", "run", "--quiet"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    codes = [process.returncode for process in both]
    assert codes in ([0, 2], [2, 0], [0, 0])  # the second may come when the first has ended
    for code, error in zip(codes, errors, strict=True):
        assert code == 0 or "is being written by process" in error
    for name in ("final/adapter_model.safetensors", "wire.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [json.loads(line)["round"] for line in log.read_text(encoding="utf-8").splitlines()] == [0, 1, 2]


def test_a_name_is_free_again_and_nothing_stays(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("locks")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with claimed(None, tmp_path / "a") as first, claimed(None, tmp_path / "a") as second:
        assert (first.name, second.name) == ("a", "a-2")
        with (
            pytest.raises(InputError, match=f"being written by process {os.getpid()}"),
            claimed(first, first),
        ):
            pass
        assert len(list(folder.iterdir())) == 2
    with claimed(None, tmp_path / "a") as again:
        assert again.name == "a"
    assert list(folder.iterdir()) == list(tmp_path.iterdir()) == []


def test_one_folder_has_one_lock_by_whatever_path(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with (
        claimed(tmp_path / "real" / "run", tmp_path),
        pytest.raises(InputError, match="being written"),
        claimed(tmp_path / "link" / ".." / "link" / "run", tmp_path),
    ):
        pass


def test_without_locks_a_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with claimed(tmp_path / "run", tmp_path) as path:
        assert path == tmp_path / "run"
    assert "cannot be locked (No such file or directory); do not start two runs in it" in caplog.text
