"""rounds.csv: the lines of rounds.jsonl as one table, whole whatever ended the run."""

from __future__ import annotations

import csv
import io
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from command import fedtune as command
from command import write_config

import fedtune
from fedtune.federation.folder import RunFolder
from fedtune.federation.round_table import rows_of, table
from fedtune.federation.rows import flat

LORA: dict[str, Any] = {
    "data": {"train": "bundled", "clients": 3, "max_examples": 12, "max_length": 64},
    "method": {"name": "fedavg", "rounds": 3, "batch_size": 4, "lr": 3e-3, "lora": {"rank": 2}},
    "federation": {"clients_per_round": 2},
    "evaluation": {"tasks": ["loss"], "max_examples": 8, "every": 2},
}


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_cells_are_the_numbers_of_the_logs(tmp_path: Path) -> None:
    run = fedtune.run(LORA, out=tmp_path / "run", progress=False)
    rows = read((tmp_path / "run" / "rounds.csv").read_text())
    assert [row["round"] for row in rows] == ["0", "1", "2", "3"]
    assert list(rows[0])[:3] == ["round", "clients", "train_loss"]
    for row, entry in zip(rows, run.rounds, strict=True):
        for name, value in flat(entry).items():
            assert row[name] == ("" if value is None else json.dumps(value))
        for way in ("down", "up"):
            for kind in ("payload_bytes", "framed_bytes"):
                sent = [m for m in run.messages if m["round"] <= entry["round"] and m["direction"] == way]
                assert row[f"{kind}.{way}"] == str(sum(message[kind] for message in sent))
    assert rows[-1]["payload_bytes.up"] == str(run.summary["payload_bytes"]["up"])
    assert rows[1]["loss.loss"] == "" and rows[2]["loss.loss"] == repr(run.rounds[2]["eval"]["loss"]["loss"])
    assert rows[1]["clients"] == "2" and rows[0]["train_loss"] == ""


def test_it_is_that_of_the_logs_however_the_run_was_ended(tmp_path: Path) -> None:
    """Killed before an operation on it, gone on with, given more rounds, and taken back to a round."""
    write_config(tmp_path / "lora.yaml", LORA)
    for case, at in enumerate((1, 3, 5)):
        run = tmp_path / f"run-{case}"
        ended = command(
            "run", "lora.yaml", "--out", run, "--quiet", cwd=tmp_path, die_at=at, watched="rounds.csv"
        )
        assert ended.status == -signal.SIGKILL
        assert command("run", "--resume", run, "--quiet", cwd=tmp_path).status == 0
        assert (run / "rounds.csv").read_text() == table(rows_of(RunFolder(run)))
        assert [row["round"] for row in read((run / "rounds.csv").read_text())] == ["0", "1", "2", "3"]
        assert not (run / ".rounds.csv.tmp").exists()
    more = fedtune.open(run).resume(rounds=4, progress=False)
    assert (run / "rounds.csv").read_text() == table(rows_of(RunFolder(run)))
    assert len(more.rounds) == 5
    fedtune.open(run).rollback(3, progress=False)
    assert (run / "rounds.csv").read_text() == table(rows_of(RunFolder(run)))


def test_a_table_reads_back_whatever_stands_in_it() -> None:
    chance = random.Random(0)
    words = ["plain", "a,b", 'say "x"', "two\nlines", "ü", ""]
    for _ in range(200):
        rows: list[dict[str, Any]] = [
            {
                "round": place,
                **({"loss": chance.random() * 10 ** chance.randint(-9, 9)} if chance.random() < 0.5 else {}),
                **({"why": chance.choice(words)} if chance.random() < 0.5 else {}),
                **({"bad": chance.choice([None, float("nan"), True])} if chance.random() < 0.5 else {}),
            }
            for place in range(chance.randint(1, 5))
        ]
        found = read(table(rows))
        assert len(found) == len(rows)
        for row, cells in zip(rows, found, strict=True):
            assert cells["round"] == str(row["round"])
            assert cells.get("why", "") == row.get("why", "")
            if "loss" in row:
                assert float(cells["loss"]) == row["loss"]
            if "bad" in row:
                assert cells["bad"] == ("true" if row["bad"] is True else "")


def test_a_disk_that_cannot_take_it_stops_the_run_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtune.federation.round_table.write_text", full)
    with pytest.raises(fedtune.FederationError, match=r"rounds\.csv could not be written: No space left"):
        fedtune.run(LORA, out=tmp_path / "run", progress=False)
    monkeypatch.undo()
    assert fedtune.open(tmp_path / "run").resume(progress=False).status == "done"
    assert len(read((tmp_path / "run" / "rounds.csv").read_text())) == 4
