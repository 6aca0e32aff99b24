"""`fedtune replay`: an earlier round's model, bit for bit, from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import InputError
from fedtune.run.config_file import parse_config
from fedtune.run.federation import run
from fedtune.run.progress import Silent
from fedtune.run.results import replay

METHODS = {
    "lora": {"name": "fedavg", "local_steps": 1, "lora": {"rank": 2}},
    "full": {"name": "fedavg", "local_steps": 1, "trainable": "full"},
    "stack": {"name": "fedavg", "local_steps": 1, "lora": {"rank": 2}, "aggregation": "stack"},
}


def federate(path: Path, method: dict, rounds: int, keep: int | None) -> Path:
    document = {
        "data": {"max_examples": 12, "max_length": 64, "clients": 3},
        "method": {**method, "rounds": rounds},
        "evaluation": {"tasks": ["loss"], "every": 0, "max_examples": 4},
        "checkpoints": {"keep": keep},
    }
    run(parse_config(document, "test"), path, Silent())
    return path


@pytest.mark.parametrize("name", METHODS)
def test_each_round_is_what_a_shorter_run_ends_with(name: str, tmp_path: Path) -> None:
    long = federate(tmp_path / "long", METHODS[name], rounds=3, keep=None)
    for rounds in (1, 3):
        short = federate(tmp_path / f"short-{rounds}", METHODS[name], rounds, keep=1)
        [replayed] = replay(long, rounds, tmp_path / f"replayed-{rounds}")
        weights = sorted(path.name for path in (short / "final").glob("*.safetensors"))
        assert weights and all(
            (replayed / file).read_bytes() == (short / "final" / file).read_bytes() for file in weights
        )


def test_what_cannot_be_replayed(tmp_path: Path) -> None:
    path = federate(tmp_path / "run", METHODS["lora"], rounds=3, keep=2)
    with pytest.raises(InputError, match=r"checkpoints of rounds 2, 3, not of 1; set checkpoints\.keep=null"):
        replay(path, 1, tmp_path / "out")
    with pytest.raises(InputError, match="not a run folder"):
        replay(tmp_path, 1, tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        replay(path, 3, path)
    assert not (tmp_path / "out").exists()
