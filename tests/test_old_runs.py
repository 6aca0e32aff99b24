"""Run folders of earlier versions go on, and end as they would have with the version that began them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fedtune

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(
    ("name", "result"), [("lora", "adapter_model.safetensors"), ("kseed", "model.safetensors")]
)
def test_a_run_of_version_0_1_0_before_the_move_is_resumed(tmp_path: Path, name: str, result: str) -> None:
    """Begun, and cut after round 1 of 3, by the code of before its folders were moved."""
    old = DATA / f"run-0.1.0-{name}"
    path = tmp_path / "run"
    shutil.copytree(old, path, ignore=shutil.ignore_patterns("expected*"))
    (path / "checkpoints").mkdir(exist_ok=True)
    begun = fedtune.open(path)
    assert [entry["round"] for entry in begun.rounds] == [0, 1, 2, 3]  # the logs go on beyond the checkpoint
    run = begun.resume(progress=False)
    expected = json.loads((old / "expected.json").read_text(encoding="utf-8"))
    wire, before = (
        file.read_text(encoding="utf-8") for file in (path / "wire.jsonl", old / "expected_wire.jsonl")
    )
    # a frame also holds the training loss, whose last digits are the processor's
    assert [json.loads(line)["payload_bytes"] for line in wire.splitlines()] == [
        json.loads(line)["payload_bytes"] for line in before.splitlines()
    ]
    weights = path / "final" / result
    norms = {key: float(value.double().norm()) for key, value in load_file(weights).items()}
    assert norms == pytest.approx(expected["norms"], rel=1e-5)
    losses = [entry["eval"]["loss"]["loss"] for entry in run.rounds]
    assert losses == pytest.approx(expected["loss"], rel=1e-4)
    assert losses[:2] == expected["loss"][:2]  # those that were recorded before it was cut
    # and where sums are rounded in the same order, every bit
    here = (torch.backends.cpu.get_cpu_capability(), torch.__version__, torch.get_num_threads())
    if here == (expected["cpu"], expected["torch"], 1):
        assert wire == before
        assert losses == expected["loss"]
        assert [entry["train_loss"] for entry in run.rounds] == expected["train_loss"]
        assert hashlib.sha256(weights.read_bytes()).hexdigest() == expected["sha256"]
    else:
        pytest.skip(f"bits are those of another processor or PyTorch, here {here}; all else held")
