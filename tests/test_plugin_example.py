"""The package of docs/examples as its user has it: installed in a folder, and run by real command lines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fedtune, lines, outcome, write_config
from safetensors.torch import load_file

PROJECT = Path(__file__).resolve().parents[1]
EXAMPLE = PROJECT / "docs/examples/clip_mean"
DOCUMENT: dict[str, Any] = {
    "data": {"clients": 3, "max_examples": 24, "max_length": 64},
    "method": {"name": "clip-mean", "rounds": 2, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}},
    "evaluation": {"tasks": ["loss"], "max_examples": 8},
    "checkpoints": {"journal": "always"},
}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Real commands in a folder with c.yaml, where the example is installed as pip would install it."""
    site = tmp_path / "site"
    site.mkdir()
    shutil.copy(EXAMPLE / "clip_mean.py", site)
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    about = site / f"clip_mean-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (about / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    write_config(tmp_path / "c.yaml", DOCUMENT)
    monkeypatch.syspath_prepend(site)  # for `fedtune` of command.py, whose processes can be killed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(PROJECT)])}
    environment |= {"OMP_NUM_THREADS": "1"}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedtune.cli.main", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return command


@pytest.mark.slow
def test_the_example_as_a_user_runs_it(run: Run, tmp_path: Path) -> None:
    assert run("validate", "c.yaml").stdout == "c.yaml: clip-mean on bundled\n"
    listed = {row["name"]: row for row in json.loads(run("ls", "methods", "--json").stdout)}
    assert listed["clip-mean"]["origin"] == "clip-mean 1.0"
    assert listed["clip-mean"]["summary"].startswith("The mean of updates that are clipped by norm")
    planned = json.loads(run("plan", "c.yaml", "--json").stdout)
    done = run("run", "c.yaml", "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["method"] == "clip-mean" and summary["status"] == "done"
    payload = {"down": planned["payload_bytes"]["down"], "up": planned["payload_bytes"]["up"]}
    assert summary["payload_bytes"] == payload
    assert planned["payload_bytes"]["exact"] and payload["down"] > 0
    assert summary["trainable_parameters"] == planned["trainable_parameters"]
    assert json.loads((tmp_path / "run/environment.json").read_text())["parts"] == {
        "method clip-mean": "clip-mean 1.0"
    }
    killed = fedtune(
        *("run", "c.yaml", "--out", "killed", "--quiet"),
        cwd=tmp_path,
        die_at=2,
        watched="round-0002.replies",
    )
    assert killed.status == -9, killed.err
    resumed = run("run", "c.yaml", "--resume", "killed", "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "run")


def test_the_norm_clips(run: Run, tmp_path: Path) -> None:
    """A norm that nobody reaches is FedAvg to the bit; a small one bounds the step of the global model."""

    def trained(name: str, *settings: str) -> dict[str, torch.Tensor]:
        command = ("run", "c.yaml", "method.rounds=1", "--quiet", "--out", name, *settings)
        done = fedtune(*command, cwd=tmp_path)
        assert done.status == 0, done.err
        return load_file(tmp_path / name / "final/adapter_model.safetensors")

    wide, fedavg = trained("wide", "method.norm=1000.0"), trained("fedavg", "method.name=fedavg")
    assert all(torch.equal(wide[name], fedavg[name]) for name in fedavg)
    narrow = trained("narrow", "method.norm=0.001")
    moved = [w for name, w in narrow.items() if "lora_B" in name]  # from zero
    length = float(sum(w.double().square().sum() for w in moved)) ** 0.5
    assert 0 < length <= 0.001 * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("as_plugin", [False, True], ids=["package", "plugin"])
def test_the_same_bits_in_flowers_simulation(as_plugin: bool, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    plugin: tuple[str, ...] = ()
    if as_plugin:
        (tmp_path / "site/clip_mean.py").rename(tmp_path / "mine.py")
        shutil.rmtree(tmp_path / "site")
        plugin = ("--plugin", "mine.py")
    for name, transport in (("here", "in-process"), ("there", "flower-simulation")):
        done = run("run", "c.yaml", f"transport.name={transport}", "--quiet", "--out", name, *plugin)
        assert done.returncode == 0, done.stderr
    here, there = outcome(tmp_path / "here"), outcome(tmp_path / "there")
    assert there["final"] == here["final"]
    assert there["rounds"] == here["rounds"]
    assert sorted(map(str, there["wire"])) == sorted(map(str, here["wire"]))
    assert lines(tmp_path / "there/memory.jsonl") == lines(tmp_path / "here/memory.jsonl")
