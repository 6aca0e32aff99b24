"""What a user's machine has and the other tests do not: PyTorch with more than one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from threaded import SETTINGS, main

from fedtune.methods import registry

SCRIPT = Path(main.__code__.co_filename)


@cache
def found(threads: int, folder: str) -> dict[str, dict[str, Any]]:
    """What every method made in one process with so many threads."""
    return {entry["method"]: entry for entry in started(threads, Path(folder), list(SETTINGS))}


def started(threads: int, folder: Path, names: list[str]) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(SCRIPT), str(threads), str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("threads")


def test_every_method_is_tried() -> None:
    assert sorted(SETTINGS) == sorted(registry.METHODS)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_threads_plan_and_run_every_method_to_the_bits_of_one(name: str, folder: Path) -> None:
    """On a model of the bundled one's sizes, where no sum is shared out among threads."""
    one, two = (found(threads, str(folder / str(threads)))[name] for threads in (1, 2))
    assert two == one
    assert two["summary"]["status"] == "done"


def test_two_threads_run_the_benchmarks(tmp_path: Path) -> None:
    rows = started(2, tmp_path, ["bench"])[0]
    assert rows.keys() > {"memory", "client-steps", "zo-step", "emulator", "rebuild", "synchronize"}
    assert min(rows.values()) > 1
