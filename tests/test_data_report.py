"""`fedtune data`: counts worked out by hand, what stands twice, and an example with its loss tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fedtune
from fedtune.cli.data import histogram, rendered
from fedtune.data.control import tokens
from fedtune.errors import InputError
from fedtune.models.load import load_tokenizer
from fedtune.planning import data_report as module

Rows = Sequence[tuple[str, str]]


def write(path: Path, rows: Rows) -> str:
    path.parent.mkdir(exist_ok=True)
    lines = (json.dumps({"instruction": asked, "output": answer}) for asked, answer in rows)
    path.write_text("\n".join(lines))
    return str(path)


def report(tmp_path: Path, sites: dict[str, Rows], held: Rows, *settings: str, **how: Any) -> dict[str, Any]:
    for name, rows in sites.items():
        write(tmp_path / "sites" / f"{name}.jsonl", rows)
    data = {
        "train": str(tmp_path / "sites"),
        "clients": "files",
        "holdout": {"source": write(tmp_path / "held.jsonl", held)},
    }
    return fedtune.data_report({"data": data, "method": {"name": "fedavg"}}, *settings, **how)


SITES: dict[str, Rows] = {
    "a": [("one", "1"), ("one", "1"), ("two", "2"), ("three", " ")],
    "b": [("two", "2"), ("two", "zwei"), ("four", "4")],
}
HELD: Rows = [("two", "2"), ("four", "vier"), ("five", "5")]


def test_what_stands_twice_is_counted(tmp_path: Path) -> None:
    found = report(tmp_path, SITES, HELD)
    assert found["examples"] == {"train": 7, "held_out": 3, "public": None}
    # "one" again; "two" of both; "two" is held out too, and "four" with another answer
    assert found["duplicates"] == {"within": 1, "between": 1, "held_out": 1, "held_out_questions": 1}
    assert [(c["name"], c["examples"], c["duplicates"], c["empty"]) for c in found["clients"]] == [
        ("a", 4, 1, 1),
        ("b", 3, 0, 0),
    ]
    texts = [check["text"] for check in found["checks"]]
    assert texts[0].startswith(
        "LEAK: 1 of 3 held-out examples are trained on word for word (the first: 'two')"
    )
    for words in (
        "1 of 3 held-out examples are trained on with another answer",
        "1 of 7 have an empty answer",
    ):
        assert words in texts
    assert {check["level"] for check in found["checks"]} == {"warning"}
    assert report(tmp_path, {"a": [("one", "1")], "b": [("six", "6")]}, [("five", "5")])["checks"] == []


def test_lengths_are_those_before_anything_is_cut(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bundled", Path("."))
    rows = [("x " * n, "y") for n in range(1, 41)]
    # begin, prompt, answer and end token, as the plain template has them
    wanted = sorted(
        2 + sum(map(len, tokens([f"{asked}\nAnswer:", f" {answer}"], tokenizer))) for asked, answer in rows
    )
    found = report(tmp_path, {"a": rows}, HELD, "data.max_length=24")
    lengths = found["lengths"]
    assert lengths["quantiles"]["1"] == wanted[-1] and sum(lengths["counts"]) == 40
    for start, end, count in zip(lengths["edges"], lengths["edges"][1:], lengths["counts"], strict=False):
        assert count == sum(start <= length < end for length in wanted)
    long = sum(length > 24 for length in wanted)
    assert 0 < long < 40 and found["encoded"]["train"]["cut"] == long == found["clients"][0]["cut"]
    assert "longer than the limit" in "\n".join(histogram(found))
    dropped = report(tmp_path, {"a": rows}, HELD, "data.max_length=24", "data.too_long=drop")
    assert dropped["encoded"]["train"] | {"duplicates": 0} == {
        **dict.fromkeys(("cut", "without_prompt", "without_eos", "empty", "duplicates"), 0),
        "examples": 40 - long,
        "dropped": long,
    }
    refused = report(tmp_path, {"a": rows}, HELD, "data.max_length=24", "data.too_long=error")["checks"][0]
    assert refused["level"] == "error" and refused["text"].startswith(f"{long} of 40 training examples are")


def test_a_conversation_that_loses_turns_has_the_length_that_it_had(tmp_path: Path) -> None:
    """What is left of it may be far shorter than the limit, and with `drop` nothing of it is."""

    def talk(exchanges: int) -> dict[str, Any]:
        turns = [{"role": "user", "content": "x " * 6}, {"role": "assistant", "content": "y"}]
        return {"messages": turns * exchanges}

    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps(talk(n)) for n in (1, 2, 3, 4)))
    document = {"data": {"train": str(path), "clients": 1, "holdout": {"source": str(path)}}}
    free = fedtune.data_report(document, "data.max_length=400")
    limit = int(free["clients"][0]["tokens"]["longest"]) // 2  # of two exchanges and not of three
    short = fedtune.data_report(document, f"data.max_length={limit}")
    assert short["encoded"]["train"]["cut"] == 2 and short["encoded"]["train"]["turns"] == 2 + 4
    for key in ("median", "longest"):
        assert short["clients"][0]["tokens"][key] == free["clients"][0]["tokens"][key], key
    dropped = fedtune.data_report(document, f"data.max_length={limit}", "data.too_long=drop")
    assert dropped["encoded"]["train"]["dropped"] == 2


def test_a_sample_is_said_and_texts_are_looked_at_whole(tmp_path: Path) -> None:
    rows = [(f"question {n % 30}", "y") for n in range(60)]
    found = report(tmp_path, {"a": rows[:40], "b": rows[40:]}, HELD, sample=12)
    assert found["sampled"] == 12 and [c["tokens"]["looked_at"] for c in found["clients"]] == [8, 4]
    assert found["duplicates"]["within"] == 10 and found["duplicates"]["between"] == 20
    assert report(tmp_path, {"a": rows[:40], "b": rows[40:]}, HELD)["sampled"] is None
    with pytest.raises(InputError, match="sample must be at least 1"):
        report(tmp_path, {"a": rows}, HELD, sample=0)


def test_an_example_is_shown_with_its_loss(tmp_path: Path) -> None:
    found = report(tmp_path, SITES, HELD, example=4)["example"]
    assert (found["index"], found["client"], found["label"]) == (4, 1, None)
    prompt, answer = found["pieces"]
    assert (prompt["loss"], answer["loss"]) == (False, True)
    assert prompt["text"].endswith("two\nAnswer:") and answer["text"].startswith(" 2")
    assert found["with_loss"] == answer["tokens"] and found["tokens"] == prompt["tokens"] + answer["tokens"]
    everything = report(tmp_path, SITES, HELD, "data.loss_on=all")["example"]["pieces"]
    assert [piece["loss"] for piece in everything] == [False, True] and everything[0]["tokens"] == 1
    plain = rendered(found, Console(no_color=True)).plain
    assert f"[[{answer['text']}]]" in plain and "between [[ and ]]" in plain
    styled = rendered(found, Console(force_terminal=True, color_system="standard"))
    assert "[[" not in styled.plain
    (span,) = styled.spans
    assert "underline" in str(span.style) and styled.plain[span.start : span.end] == answer["text"]
    evil = {**found, "pieces": [{"text": "a\x1b[31m\x07b\nc", "loss": True, "tokens": 1}]}
    assert "[[a\ufffd[31m\ufffdb\nc]]" in rendered(evil, Console(no_color=True)).plain
    with pytest.raises(InputError, match="example 7 is no training example; their indices go from 0 to 6"):
        report(tmp_path, SITES, HELD, example=7)


def test_a_classifier_has_labels_and_no_loss_tokens(tmp_path: Path) -> None:
    rows: Rows = [("good", "pos"), ("bad", "neg")]
    found = report(
        tmp_path,
        {"a": rows, "b": [("fine", "pos")]},
        rows[1:],
        "model.task=classification",
        "evaluation.tasks=[accuracy]",
    )
    assert [client["labels"] for client in found["clients"]] == [{"neg": 1, "pos": 1}, {"pos": 1}]
    assert found["example"]["label"] == "pos" and found["template"] is None
    assert "1 of 2 clients have examples of one class alone" in [check["text"] for check in found["checks"]]


def test_no_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **how: object) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("fedtune.models.load.load_model", refuse)
    monkeypatch.setattr("safetensors.safe_open", refuse)
    assert report(tmp_path, SITES, HELD)["model"] == "bundled"
    assert module.SAMPLE == 50_000


def test_the_commands(tmp_path: Path) -> None:
    write(tmp_path / "t.jsonl", [*SITES["a"], *SITES["b"]])
    write(tmp_path / "h.jsonl", HELD)
    (tmp_path / "c.yaml").write_text(
        "data: {train: t.jsonl, clients: 2, holdout: {source: h.jsonl}}\nmethod: {name: fedavg, rounds: 1}\n"
    )
    program = "from fedtune.cli.main import main; main()"

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True
        )

    done = call("data", "c.yaml")
    assert done.returncode == 0, done.stderr
    for words in (
        "data.train: 7 rows of JSON Lines from t.jsonl",
        "warning: LEAK: 1 of 3",
        "Tokens of an example",
    ):
        assert words in done.stdout
    checked = call("validate", "c.yaml", "data.max_length=400", "--data")
    assert checked.returncode == 0 and "  LEAK: 1 of 3 held-out examples" in checked.stdout
    lines = checked.stdout.splitlines()  # what the data's checks have is said once
    assert len(set(lines)) == len(lines) and any("sees 256 tokens" in line for line in lines), lines
    refused = call("validate", "c.yaml", "data.max_length=8", "data.too_long=error", "--data")
    assert refused.returncode == 2 and "no run begins" in refused.stderr and not refused.stdout
