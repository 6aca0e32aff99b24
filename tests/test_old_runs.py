"""Run folders of earlier versions go on, and end as they would have with the version that began them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fedtune

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(
    ("name", "result"), [("lora", "adapter_model.safetensors"), ("kseed", "model.safetensors")]
)
def test_a_run_of_version_0_1_0_before_the_move_is_resumed(tmp_path: Path, name: str, result: str) -> None:
    """Begun, and cut after round 1 of 3, by the code of before its folders were moved.

    Weights, scores and payloads are those of that code to the end. Two things are not, from the rounds on
    that this version trains: `train_loss` is a mean over trained tokens and no longer over examples, and a
    reply's frame also says how many tokens those were, and of how many that were computed.
    """
    old = DATA / f"run-0.1.0-{name}"
    path = tmp_path / "run"
    shutil.copytree(old, path, ignore=shutil.ignore_patterns("expected*"))
    (path / "checkpoints").mkdir(exist_ok=True)
    begun = fedtune.open(path)
    assert [entry["round"] for entry in begun.rounds] == [0, 1, 2, 3]  # the logs go on beyond the checkpoint
    run = begun.resume(progress=False)
    expected = json.loads((old / "expected.json").read_text(encoding="utf-8"))
    wire, before = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (path / "wire.jsonl", old / "expected_wire.jsonl")
    )
    frames = [
        (now.pop("framed_bytes"), then.pop("framed_bytes")) for now, then in zip(wire, before, strict=True)
    ]
    assert wire == before
    for entry, (now, then) in zip(wire, frames, strict=True):
        if (
            entry["round"] > 1 and entry["direction"] == "up"
        ):  # with three counts of tokens, in a deflated manifest
            # the training loss is there too, whose last digits are the processor's
            assert 0 < now - then < len('"trained_tokens":1234,"computed_tokens":1234,"padding_tokens":123,')
        else:
            assert now == then
    weights = path / "final" / result
    norms = {key: float(value.double().norm()) for key, value in load_file(weights).items()}
    assert norms == pytest.approx(expected["norms"], rel=1e-5)
    losses = [entry["eval"]["loss"]["loss"] for entry in run.rounds]
    assert losses == pytest.approx(expected["loss"], rel=1e-4)
    assert losses[:2] == expected["loss"][:2]  # those that were recorded before it was cut
    trained = [entry["train_loss"] for entry in run.rounds]
    assert trained[:2] == expected["train_loss"][:2]
    assert trained[2:] == pytest.approx(expected["train_loss_by_tokens"][2:], rel=1e-4)
    assert run.summary["train_loss"] == trained[-1]
    # and where sums are rounded in the same order, every bit
    here = (torch.backends.cpu.get_cpu_capability(), torch.__version__, torch.get_num_threads())
    if here == (expected["cpu"], expected["torch"], 1):
        assert losses == expected["loss"]
        assert trained == expected["train_loss_by_tokens"]
        assert hashlib.sha256(weights.read_bytes()).hexdigest() == expected["sha256"]
    else:
        pytest.skip(f"bits are those of another processor or PyTorch, here {here}; all else held")


def test_a_checkpoint_outlives_a_setting_that_a_later_version_adds(tmp_path: Path) -> None:
    """It names the configuration as it was written when the run began, not as this version fills it in."""
    path = tmp_path / "run"
    shutil.copytree(DATA / "run-0.1.0-lora", path, ignore=shutil.ignore_patterns("expected*"))
    document = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    assert document["evaluation"].pop("top_p") == 1.0  # as of a version that does not know this setting
    (path / "config.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    about = json.loads((path / "checkpoints/round-0001/checkpoint.json").read_text(encoding="utf-8"))
    about["config_sha256"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (path / "checkpoints/round-0001/checkpoint.json").write_text(json.dumps(about), encoding="utf-8")
    assert fedtune.open(path).resume(progress=False).summary["status"] == "done"
    fedtune.open(path).replay(1, tmp_path / "earlier")

    document["method"]["lr"] = 0.5  # a setting that is another one is still refused
    (path / "config.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(fedtune.InputError, match="belongs to another configuration"):
        fedtune.open(path).replay(1, tmp_path / "other")
