"""Comparisons: rows as the runs' summaries have them, means and spreads by hand, one split for all."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from command import fedtune, write_config
from model_families import save_folder

from fedtune.config.file import parse_config
from fedtune.errors import InputError
from fedtune.federation.compare import Candidate, compare, reference_candidates, table
from fedtune.federation.progress import Silent
from fedtune.report.tables import compare_rows


def base(**method: Any) -> dict[str, Any]:
    return {
        "data": {"clients": 2, "max_examples": 8, "max_length": 64},
        "method": {"name": "fedavg", "rounds": 2, "batch_size": 4, "lora": {"rank": 2}, **method},
        "evaluation": {"tasks": ["loss"], "max_examples": 8},
    }


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_config(folder / "three.yaml", base(lr=0.01))
    write_config(folder / "one.yaml", base(rounds=1, local_epochs=2, lr=0.01))
    return folder


@pytest.fixture(scope="module")
def document(compared: Path) -> dict[str, Any]:
    result = fedtune(
        "compare",
        "three.yaml",
        "one.yaml",
        "--seeds",
        "0,1",
        "--out",
        "out",
        "--json",
        "--quiet",
        cwd=compared,
    )
    assert result.status == 0, result.err
    assert result.err == ""
    assert result.json() == json.loads((compared / "out/compare.json").read_text())
    loaded: dict[str, Any] = result.json()
    return loaded


ROWS = ["three", "one", "standalone", "centralized", "zero-shot"]


def test_rows_are_the_summaries_of_the_runs(compared: Path, document: dict[str, Any]) -> None:
    rows = {(row["config"], row["seed"]): row for row in document["rows"]}
    assert len(rows) == len(document["rows"]) == 10
    assert {label for label, _ in rows} == set(ROWS)
    for (label, seed), row in rows.items():
        if label != "zero-shot":
            summary = json.loads((compared / f"out/{label}-seed{seed}/summary.json").read_text())
            assert row == {"config": label, **summary}
            rounds = (compared / f"out/{label}-seed{seed}/rounds.jsonl").read_text().splitlines()
            assert summary["train_loss"] == json.loads(rounds[-1])["train_loss"] > 0
    assert rows["three", 0]["evaluation"] != rows["three", 1]["evaluation"]
    assert [rows[label, 0]["method"] for label in ROWS] == ["fedavg", "fedavg", *ROWS[2:]]


def test_reference_rows_send_nothing_and_stand_on_the_same_model_and_data(document: dict[str, Any]) -> None:
    rows = {(row["config"], row["seed"]): row for row in document["rows"]}
    for seed in (0, 1):
        for label in ROWS[2:]:
            assert rows[label, seed]["payload_bytes"] == {"down": 0, "up": 0}
            assert rows[label, seed]["zero_shot"] == rows["three", seed]["zero_shot"]
        assert rows["zero-shot", seed]["evaluation"] == rows["three", seed]["zero_shot"]
        assert rows["zero-shot", seed]["trainable_parameters"] == 0
        assert rows["zero-shot", seed]["train_loss"] is None
        assert rows["centralized", seed]["clients"] == 1
        assert rows["standalone", seed]["clients"] == 2
        m, size = 2, 4 * rows["three", seed]["trainable_parameters"]
        assert rows["three", seed]["payload_bytes"] == {"down": m * 2 * size, "up": m * 2 * size}
        assert rows["one", seed]["payload_bytes"] == {"down": m * size, "up": m * size}


def test_the_table_by_hand(document: dict[str, Any]) -> None:
    losses = {
        label: [
            next(r for r in document["rows"] if (r["config"], r["seed"]) == (label, seed))["evaluation"][
                "loss"
            ]
            for seed in (0, 1)
        ]
        for label in ROWS
    }
    assert [entry["config"] for entry in document["table"]] == ROWS
    for entry in document["table"]:
        a, b = (scores["loss"] for scores in losses[entry["config"]])
        first = [scores["loss"] for scores in losses["three"]]
        cell = entry["metrics"]["loss.loss"]
        assert cell["mean"] == pytest.approx((a + b) / 2)
        assert cell["sd"] == pytest.approx(abs(a - b) / math.sqrt(2))
        assert cell["difference"] == pytest.approx(((a - first[0]) + (b - first[1])) / 2)
        assert cell["difference_sd"] == pytest.approx(abs((a - first[0]) - (b - first[1])) / math.sqrt(2))
        assert entry["seeds"] == [0, 1]
        assert set(entry["metrics"]) == {"loss.loss", "loss.perplexity", "loss.tokens"}


def test_a_second_call_takes_over_what_is_done(compared: Path, document: dict[str, Any]) -> None:
    files = [p for p in (compared / "out").glob("*-seed*/**/*") if p.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = fedtune(
        "compare", "three.yaml", "one.yaml", "--seeds", "0,1", "--out", "out", "--json", cwd=compared
    )
    assert again.json() == document
    assert {path: path.stat().st_mtime_ns for path in files} == before
    more = fedtune(
        "compare", "three.yaml", "one.yaml", "--seeds", "0,1,2", "--out", "out", "--no-references", "--quiet",
        cwd=compared,
    )  # fmt: skip
    assert more.status == 0, more.err
    assert "Mean ± standard deviation over 3 seeds" in more.out
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert sorted(p.name for p in (compared / "out").glob("*seed2")) == ["one-seed2", "three-seed2"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"data": {"clients": 3, "max_examples": 8, "max_length": 64}},
            "other.yaml|other has other partition",
        ),
        (
            {"data": {"clients": 2, "max_examples": 9, "max_length": 64}},
            "other has other examples than three",
        ),
        ({"evaluation": {"tasks": ["loss"], "max_examples": 7}}, "other has other examples than three"),
    ],
)
def test_unlike_splits_are_refused(
    other: dict[str, Any], message: str, compared: Path, tmp_path: Path
) -> None:
    write_config(tmp_path / "other.yaml", {**base(), **other})
    result = fedtune("compare", compared / "three.yaml", "other.yaml", "--out", "out", cwd=tmp_path)
    assert result.status == 2
    assert any(part in result.err for part in message.split("|"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seeds", ["0,0", "-1", "x", "1,,2", "1.5"])
def test_seeds_that_are_none(seeds: str, compared: Path, tmp_path: Path) -> None:
    result = fedtune(
        "compare", compared / "three.yaml", f"--seeds={seeds}", "--out", tmp_path / "out", cwd=compared
    )
    assert result.status == 2
    assert "seeds must be different whole numbers" in result.err
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_name(compared: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "three.yaml", base())
    result = fedtune("compare", compared / "three.yaml", "three.yaml", "--out", "out", cwd=tmp_path)
    assert result.status == 2
    assert "need different names, got three, three" in result.err


def test_settings_for_all(compared: Path, tmp_path: Path) -> None:
    result = fedtune(
        "compare", compared / "three.yaml", compared / "one.yaml", "--set", "method.rounds=1", "--set",
        "method.local_steps=1", "--set", "method.local_epochs=null", "--no-references", "--json", "--quiet",
        "--out", "out", cwd=tmp_path,
    )  # fmt: skip
    rows = result.json()["rows"]
    assert [row["rounds"] for row in rows] == [1, 1]
    assert rows[0]["evaluation"] == rows[1]["evaluation"]


def candidate(label: str, **settings: Any) -> Candidate:
    return Candidate(label, parse_config({**base(), **settings}, label))


def test_references_train_as_long_as_the_first_of_each_model(tmp_path: Path) -> None:
    save_folder(tmp_path / "tiny")
    candidates = [
        candidate("a", method={"name": "fedavg", "rounds": 3, "local_epochs": 2, "lr": 0.5}),
        candidate("b", method={"name": "fedavg", "rounds": 9}),
        candidate("c", model={"name": str(tmp_path / "tiny")}, method={"name": "fedavg", "local_steps": 5}),
        candidate("own", method={"name": "standalone", "lr": 0.1}),
    ]
    added = reference_candidates(candidates)
    assert [c.label for c in added] == ["centralized-a", "standalone-c", "centralized-c"]
    settings = [c.config.resolved()["method"] for c in added]
    assert [(s["local_epochs"], s["local_steps"], s["lr"]) for s in settings] == [
        (6, None, 0.5),
        (None, 15, 3e-4),
        (None, 15, 3e-4),
    ]
    assert added[1].config.model == candidates[2].config.model


def _row(config: str, seed: int, evaluation: dict[str, Any]) -> dict[str, Any]:
    return {
        "config": config,
        "seed": seed,
        "method": "m",
        "evaluation": evaluation,
        "payload_bytes": {"down": 10 * seed, "up": 5},
        "peak_memory_bytes": {"client": 100 + seed, "server": 1},
        "seconds": {"total": float(seed)},
    }


def test_a_table_by_hand() -> None:
    entries = table(
        [
            _row("a", 1, {"accuracy": {"accuracy": 0.5, "accuracy/x": 1.0}}),
            _row("a", 2, {"accuracy": {"accuracy": 0.7, "accuracy/y": 0.0}}),  # no example of x in this seed
            _row("b", 1, {"accuracy": {"accuracy": 0.6, "accuracy/x": 0.5}, "loss": {"loss": 2.0}}),
            _row("b", 2, {"accuracy": {"accuracy": 0.9, "accuracy/y": 0.5}, "loss": {"loss": None}}),
        ]
    )
    a, b = (entry["metrics"] for entry in entries)
    assert a["accuracy.accuracy"]["mean"] == pytest.approx(0.6)
    assert a["accuracy.accuracy"]["sd"] == pytest.approx(math.sqrt(0.02))
    assert b["accuracy.accuracy"]["difference"] == pytest.approx(0.15)
    assert b["accuracy.accuracy"]["difference_sd"] == pytest.approx(statistics.stdev([0.1, 0.2]))
    assert a["accuracy.accuracy/x"] == {"mean": 1.0, "sd": None, "difference": 0.0, "difference_sd": None}
    assert b["accuracy.accuracy/y"]["difference"] == 0.5
    assert b["loss.loss"]["difference"] is None  # the first configuration has no such score
    assert math.isnan(b["loss.loss"]["mean"])  # not finite for one seed, so no mean
    assert entries[0]["payload_bytes"] == {"down": 15.0, "up": 5.0}
    assert entries[0]["client_peak_memory_bytes"] == 102
    assert entries[0]["seconds"] == 1.5


def test_reference_rows_with_a_quorum_that_is_a_count(tmp_path: Path) -> None:
    """Centralised training has one client; a quorum of two is meant for the methods beside it."""
    rows = compare(
        [candidate("a", federation={"quorum": 2, "clients_per_round": 2})], [0], tmp_path / "out", Silent()
    )["rows"]
    assert [row["config"] for row in rows] == ["a", "standalone", "centralized", "zero-shot"]
    assert {row["status"] for row in rows} == {"done"}


def test_a_comparison_of_another_folder_is_refused(tmp_path: Path) -> None:
    compare([candidate("a")], [0], tmp_path / "out", Silent(), references=False)
    other = candidate("a", method={"name": "fedavg", "lr": 0.5})
    with pytest.raises(InputError, match="started with another configuration"):
        compare([other], [0], tmp_path / "out", Silent(), references=False)


def _interval(seed: int, low: float | None, high: float | None, worst: float | None) -> dict[str, Any]:
    row = _row("a", seed, {"accuracy": {"accuracy": 0.5, "accuracy_low": low, "accuracy_high": high}})
    return row | {
        "per_client": {"accuracy": {"accuracy": {"worst": worst, "sd": 0.1 * seed, "worst_client": 3}}}
    }


def test_an_end_that_is_not_a_number_leaves_none_and_is_not_read_as_zero() -> None:
    (entry,) = table([_interval(1, 0.2, 0.6, 0.4), _interval(2, 0.4, None, 0.2)])
    found = entry["metrics"]["accuracy.accuracy"]
    assert found["low"] == pytest.approx(0.3) and math.isnan(found["high"])
    assert found["worst"] == pytest.approx(0.3) and found["client_sd"] == pytest.approx(0.15)
    document = {"table": [entry], "rows": []}
    header, ((_, score, ends, worst, against, *_),) = compare_rows(document, ["accuracy.accuracy"])
    assert header[:5] == [
        "configuration",
        "accuracy",
        "95 % over examples",
        "worst client",
        "against the first",
    ]
    assert (score, ends, worst, against) == ("0.5000 ± 0.0000", "0.3000 to -", "0.3000", "")
    (entry,) = table([_interval(1, None, None, None)])
    _, ((_, score, ends, worst, *_),) = compare_rows({"table": [entry], "rows": []}, ["accuracy.accuracy"])
    assert (score, ends, worst) == ("0.5000", "- to -", "-")


def test_a_row_without_intervals_has_none_beside_rows_that_have_them() -> None:
    entries = table([_interval(1, 0.2, 0.6, 0.4), _row("b", 1, {"accuracy": {"accuracy": 0.7}})])
    assert set(entries[1]["metrics"]["accuracy.accuracy"]) == {"mean", "sd", "difference", "difference_sd"}
    _, rows = compare_rows({"table": entries, "rows": []}, ["accuracy.accuracy"])
    assert rows[1][1:5] == ["0.7000", "", "", "+0.2000"]
