"""Whole runs of FedCyBGD: killed in mid-cycle, clients that disappear, and what is thrown away on the way."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from command import Result, fedtune, lines, outcome, write_config

CLIENTS = 4


def config(**changes: Any) -> dict[str, Any]:
    return {
        "data": {"clients": CLIENTS, "max_examples": 16, "max_length": 64},
        "method": {"name": "fedcybgd", "rounds": 2, "batch_size": 4, "lr": 0.01, "compression": "hybrid"},
        "evaluation": {"tasks": ["loss"], "max_examples": 8, "every": 0},
        "checkpoints": {"journal": "always"},
        **changes,
    }


def start(folder: Path, *arguments: str, **limits: Any) -> Result:
    return fedtune("run", "c.yaml", *arguments, "--quiet", cwd=folder, **limits)


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unkilled")
    write_config(folder / "c.yaml", config())
    done = start(folder, "--out", "run")
    assert done.status == 0, done.err
    return folder / "run"


@pytest.mark.parametrize(
    ("watched", "operation"),
    [("round-0001.replies", 3), ("run/held", 7), ("round-0002.replies", 2), ("run/wire.jsonl", 11)],
)
def test_killed_in_mid_cycle_a_run_ends_with_the_same_bits(
    unkilled: Path, tmp_path: Path, watched: str, operation: int
) -> None:
    write_config(tmp_path / "c.yaml", config())
    killed = start(tmp_path, "--out", "run", die_at=operation, watched=watched)
    assert killed.status == -signal.SIGKILL, killed.err
    assert not (tmp_path / "run/summary.json").exists()
    again = start(tmp_path, "--resume", "run")
    assert again.status == 0, again.err
    assert outcome(tmp_path / "run") == outcome(unkilled)


def test_clients_that_disappear_are_named_and_their_blocks_keep_their_values(tmp_path: Path) -> None:
    dropout = {"quorum": 1, "simulate": {"dropout": 0.4}}
    write_config(tmp_path / "c.yaml", config(federation=dropout, seed=1))
    done = start(tmp_path, "--out", "run")
    assert done.status == 0, done.err
    rounds = lines(tmp_path / "run/rounds.jsonl")[1:]
    lost = [client for entry in rounds for client in entry["left_out"]]
    assert lost and all(len(entry["clients"]) + len(entry["left_out"]) == CLIENTS for entry in rounds)
    assert done.err.count("keeps its value") == len(lost)
    for client in lost:
        assert f"client {client} is left out: it dropped out" in done.err


def test_what_no_checkpoint_names_any_more_is_thrown_away(tmp_path: Path) -> None:
    """A client keeps the newest version of a part; of a run of five cycles two checkpoints are left."""
    five = {**config()["method"], "rounds": 5, "compression": "none"}
    write_config(tmp_path / "c.yaml", config(method=five))
    assert start(tmp_path, "--out", "run").status == 0
    run = tmp_path / "run"
    named: set[str] = set()
    for checkpoint in ("round-0004", "round-0005"):
        text = (run / "checkpoints" / checkpoint / "clients.json").read_text()
        named |= {str(value).split()[1] for value in json.loads(text).values()}
    assert {path.stem for path in (run / "held").glob("*.safetensors")} == named
    versions = CLIENTS * 5  # changes of a block in all
    assert len(named) < versions
