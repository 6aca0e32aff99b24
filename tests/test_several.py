"""Comparisons and sweeps in several processes: the results of one, faults told, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import fedtune as command
from command import write_config

import fedtune
from fedtune.errors import InputError
from fedtune.registry import load_plugin

PROGRAM = Path(sys.executable).with_name("fedtune")


def lora(**method: Any) -> dict[str, Any]:
    return {
        "data": {"train": "bundled", "clients": 2, "max_examples": 8, "max_length": 64},
        "method": {"name": "fedavg", "rounds": 2, "batch_size": 4, "lora": {"rank": 2}, "lr": 1e-2, **method},
        "evaluation": {"tasks": ["loss"], "max_examples": 8},
    }


def untimed(found: Any) -> Any:
    """Without what a clock or a meter of memory says."""
    if isinstance(found, dict):
        clocks = ("seconds", "peak_memory_bytes", "client_peak_memory_bytes")
        return {key: untimed(value) for key, value in found.items() if key not in clocks}
    return [untimed(value) for value in found] if isinstance(found, list) else found


def bits(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("final/*.safetensors")
    }
    for file in folder.rglob("rounds.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found[str(file.relative_to(folder))] = [untimed(row) for row in rows]
    return found


def test_a_sweep_in_two_processes_is_that_of_one(tmp_path: Path) -> None:
    grid = ["method.lr=1e-2,1e-3", "method.lora.rank=1,2"]
    one = fedtune.sweep(lora(), grid, out=tmp_path / "one", progress=False)
    two = fedtune.sweep(lora(), grid, out=tmp_path / "two", progress=False, workers=2)
    assert untimed(two.document) == untimed(one.document)
    assert bits(two.path) == bits(one.path) and len(bits(one.path)) == 8
    assert str(two.best) == str(one.best)
    best = [(each.path / "best.yaml").read_text() for each in (one, two)]
    assert best[0] == best[1]


def test_a_comparison_in_three_processes_with_examples_from_python(tmp_path: Path) -> None:
    rows = [{"instruction": f"say {i}", "output": str(i % 3), "category": "ab"[i % 2]} for i in range(24)]
    document = lora()
    document["data"] = {"clients": 2, "max_length": 32, "holdout": {"fraction": 0.25}}
    both = {"long": document, "short": document | {"method": document["method"] | {"rounds": 1}}}
    one = fedtune.compare(both, data=rows, out=tmp_path / "one", progress=False)
    three = fedtune.compare(both, data=rows, out=tmp_path / "three", progress=False, workers=3)
    assert untimed(three.document) == untimed(one.document)
    assert [row["config"] for row in three.document["rows"]] == [
        *("long", "short", "standalone", "centralized", "zero-shot")
    ]
    assert bits(three.path) == bits(one.path)


def test_a_point_that_cannot_finish_is_told_and_wrong_input_ends_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = lora() | {"federation": {"quorum": 2, "simulate": {"dropout": 0.5}}}
    found = fedtune.sweep(document, ["federation.quorum=1,2"], out=tmp_path / "s", progress=False, workers=2)
    good, bad = found.document["points"]
    assert "error" not in good and bad["error"].startswith("seed 0: round ") and "quorum is 2" in bad["error"]
    assert "quorum=2, seed 0: round " in capsys.readouterr().err
    with pytest.raises(InputError, match="nothing-here"):
        fedtune.sweep(
            lora(), ["model.name=nothing-here,bundled"], out=tmp_path / "t", progress=False, workers=2
        )


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "two"])
def test_a_number_that_is_none_is_refused(workers: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="workers must be a whole number from 1 up"):
        fedtune.sweep(lora(), ["method.lr=1e-2"], out=tmp_path / "s", progress=False, workers=workers)
    with pytest.raises(InputError, match="workers must be a whole number from 1 up"):
        fedtune.compare([lora()], out=tmp_path / "s", progress=False, workers=workers)
    assert not (tmp_path / "s").exists()


def test_a_part_of_this_process_alone_is_refused_and_one_of_a_file_goes(tmp_path: Path) -> None:
    fedtune.register_metric("only-here-in-several", summary="one")(lambda answer, reference: 1.0)
    document = lora() | {"evaluation": {"tasks": ["only-here-in-several"], "max_examples": 4}}
    with pytest.raises(InputError, match="registered in this process alone"):
        fedtune.sweep(document, ["method.lr=1e-2,1e-3"], out=tmp_path / "s", progress=False, workers=2)
    (tmp_path / "part.py").write_text(
        "import fedtune\n\n"
        "@fedtune.register_metric('of-a-file-in-several')\n"
        "def one(answer, reference):\n    '''One.'''\n    return 1.0\n"
    )
    load_plugin(tmp_path / "part.py")
    document = lora() | {"evaluation": {"tasks": ["of-a-file-in-several"], "max_examples": 4}}
    found = fedtune.sweep(document, ["method.lr=1e-2,1e-3"], out=tmp_path / "t", progress=False, workers=2)
    scores = [
        row["evaluation"]["of-a-file-in-several"]["of_a_file_in_several"] for row in found.document["rows"]
    ]
    assert scores == [1.0, 1.0]


def test_killed_it_leaves_nobody_behind_and_goes_on(tmp_path: Path) -> None:
    write_config(tmp_path / "lora.yaml", lora(rounds=40))
    arguments = ["sweep", "lora.yaml", "method.lr=1e-2,1e-3", "--out", "s", "--workers", "2", "--quiet"]
    process = subprocess.Popen([PROGRAM, *arguments], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 300
        while len(list(tmp_path.glob("s/*/rounds.csv"))) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        states = [fedtune.status(run)["state"] for run in sorted(tmp_path.glob("s/*-seed0"))]
        assert states == ["under way", "under way"]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    end = time.monotonic() + 60
    while any(fedtune.status(run)["state"] == "under way" for run in tmp_path.glob("s/*-seed0")):
        assert time.monotonic() < end, "its processes did not end with it"
        time.sleep(0.1)
    assert command(*arguments, cwd=tmp_path).status == 0
    whole = fedtune.sweep(lora(rounds=40), ["method.lr=1e-2,1e-3"], out=tmp_path / "whole", progress=False)
    document = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert untimed(document["points"]) == untimed(whole.document["points"])
    assert bits(tmp_path / "s") == bits(tmp_path / "whole")
    assert os.path.exists(tmp_path / "s" / "best.yaml")
