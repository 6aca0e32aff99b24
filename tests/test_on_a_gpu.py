"""scripts/on_a_gpu.sh on a machine without a GPU, and on a pretended one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.bench import gpu_checks
from fedtune.errors import ProgramError
from fedtune.methods import registry
from fedtune.zeroth import KINDS

HERE = Path(__file__).parent


def script(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    wrapper = folder / "fedtune"
    wrapper.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    wrapper.chmod(0o755)
    return subprocess.run(
        ["sh", HERE.parent / "scripts" / "on_a_gpu.sh", "--json"],
        env={**os.environ, "FEDTUNE": str(wrapper)},
        capture_output=True,
        text=True,
        check=False,
    )


def documents(text: str) -> list[dict[str, Any]]:
    found, at = [], 0
    while text[at:].strip():
        document, end = json.JSONDecoder().raw_decode(text[at:].lstrip())
        at += len(text[at:]) - len(text[at:].lstrip()) + end
        found.append(document)
    return found


@pytest.mark.slow
def test_on_a_pretended_gpu_all_is_as_on_the_cpu_and_everything_is_timed(tmp_path: Path) -> None:
    done = script(f"{sys.executable} {HERE / 'pretended_script.py'}", tmp_path)
    assert done.returncode == 0, done.stderr
    checks, speed = documents(done.stdout)
    assert (checks["bench"], speed["bench"]) == ("gpu-checks", "gpu-speed")
    noise = [row for row in checks["rows"] if "differing" in row]
    assert len(noise) == 3 * len(KINDS)
    assert all(row["differing"] == 0 and row["weights"] == 2_247_158 for row in noise)
    methods = {row["case"]: row for row in checks["rows"] if "loss" in row}
    assert methods.keys() == {f"method: {name}" for name in registry.METHODS}
    assert all(row["loss"] == pytest.approx(row["loss of the CPU"], rel=0.002) for row in methods.values())
    measured = {ratio.split(": ")[1]: value for ratio, value in checks["ratios"].items()}
    assert measured.keys() == {*registry.METHODS} - {"zero-shot"}
    cases = [row["case"] for row in speed["rows"]]
    assert [case for case in cases if case.startswith("noise")] == [
        f"noise over the weights, {kind}"
        for kind in ("hadamard4", *(kind for kind in KINDS if kind != "hadamard4"), "hadamard4")
    ]
    assert cases.count("FedKSeed step, hadamard4") == cases.count("two forward passes") == 2
    timed = "LoRA", "one block, FedCyBGD", "FedKSeed, hadamard4"
    assert cases[-3:] == [f"6 steps: {name}" for name in timed]
    assert all(row["seconds"] > 0 for row in speed["rows"])
    assert sum("two forward passes" in ratio for ratio in speed["ratios"]) == 8
    assert sum("a copy of the weights" in ratio for ratio in speed["ratios"]) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_nothing_is_measured(tmp_path: Path) -> None:
    done = script(f"{sys.executable} -c 'from fedtune.cli.main import main; main()'", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("PyTorch sees none here") == 1


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "the_gpu", lambda: torch.device("cpu"))
    told = gpu_checks.rebuild_

    def one_bit_off(w: torch.Tensor, w0: torch.Tensor, pool: Any, name: str, a: Any, **rest: Any) -> None:
        told(w, w0, pool, name, a, **rest)
        if w is not w0 and pool.noise == "gaussian" and w.dtype == torch.float16 and rest["first"] == 3:
            calls.append(1)
            w.view(torch.int16)[17] ^= len(calls) % 2

    calls: list[int] = []
    monkeypatch.setattr(gpu_checks, "rebuild_", one_bit_off)
    with pytest.raises(ProgramError, match=r"this GPU: noise: gaussian, float16: 1 weights differ$"):
        gpu_checks.measure(())
