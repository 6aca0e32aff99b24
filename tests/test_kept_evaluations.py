"""`fedtune eval`: scores of a run are kept in its folder, and adapters from elsewhere are scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.errors import InputError

LORA: dict[str, Any] = {
    "data": {"train": "bundled", "clients": 2, "max_examples": 8, "max_length": 64},
    "method": {"name": "fedavg", "rounds": 1, "batch_size": 4, "lr": 0.05, "lora": {"rank": 2}},
    "evaluation": {"tasks": ["loss"], "max_examples": 8},
}
SAME = ["data.train=bundled", "data.max_length=64", "evaluation.max_examples=8", "data.template=plain"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> fedtune.Run:
    return fedtune.run(LORA, out=tmp_path_factory.mktemp("eval") / "mine", progress=False)


def kept(run: Path) -> list[dict[str, Any]]:
    file = run / "evaluations.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_each_evaluation_of_a_run_is_a_line_that_the_report_shows(lora: fedtune.Run, tmp_path: Path) -> None:
    copied = shutil.copytree(lora.path, tmp_path / "mine")
    assert kept(copied) == []
    first = fedtune.evaluate(copied, ["loss"])
    second = fedtune.evaluate(fedtune.open(copied), ["accuracy"], "evaluation.max_examples=4")
    lines = kept(copied)
    assert [line["scores"] for line in lines] == [first["scores"], second["scores"]]
    assert [line["settings"] for line in lines] == [[], ["evaluation.max_examples=4"]]
    assert [line["examples"] for line in lines] == [8, 4]
    assert lines[0]["scores"]["global"]["loss"]["loss"] == lora.scores["loss"]["loss"]
    assert lines[0]["version"] == fedtune.__version__ and lines[0]["time"].endswith("+00:00")
    with pytest.raises(InputError):
        fedtune.evaluate(copied, ["no-such-task"])
    assert kept(copied) == lines
    page = fedtune.report_page([copied], tmp_path / "page.html").read_text()
    assert "Evaluated since" in page and "evaluation.max_examples=4" in page and lines[1]["time"] in page
    assert "Evaluated since" not in fedtune.report_page([lora], tmp_path / "other.html").read_text()
    assert fedtune.open(copied).resume().summary == lora.summary  # a run goes on beside it
    assert kept(copied) == lines


def test_scores_that_cannot_be_kept_are_given(
    lora: fedtune.Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied = shutil.copytree(lora.path, tmp_path / "mine")
    (copied / "evaluations.jsonl").mkdir()
    assert (
        fedtune.evaluate(copied, ["loss"])["scores"]["global"]["loss"]["loss"] == lora.scores["loss"]["loss"]
    )
    assert "the scores are not kept" in caplog.text


@pytest.mark.parametrize("named", [[], ["model.name=bundled"]])
def test_an_adapter_from_elsewhere_has_the_scores_of_its_run(
    lora: fedtune.Run, tmp_path: Path, named: list[str]
) -> None:
    lora.export(tmp_path / "adapter")
    if named:  # a base that is not where the adapter says
        file = tmp_path / "adapter" / "adapter_config.json"
        about = json.loads(file.read_text()) | {"base_model_name_or_path": "/nowhere/base"}
        file.write_text(json.dumps(about))
        with pytest.raises(InputError, match="/nowhere/base"):
            fedtune.evaluate(tmp_path / "adapter", ["loss"], *SAME)
    found = fedtune.evaluate(tmp_path / "adapter", ["loss"], *SAME, *named)
    assert found["scores"]["model"]["loss"]["loss"] == lora.scores["loss"]["loss"]
    assert found["target"] == str(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "evaluations.jsonl").exists()


def test_an_adapter_that_names_no_base_is_a_sentence(lora: fedtune.Run, tmp_path: Path) -> None:
    lora.export(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="does not name its base model"):
        fedtune.evaluate(tmp_path / "adapter", ["loss"], *SAME)
