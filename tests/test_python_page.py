"""The Python examples of the pages, run one after the other in a folder of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fedtune

PROJECT = Path(__file__).resolve().parents[1]


def examples(page: str) -> list[tuple[int, str]]:
    """The line at which each Python block of a page begins, and its text."""
    text = (PROJECT / page).read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start(1)), found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def run_examples(page: str) -> dict[str, Any]:
    """Runs a page's blocks in one namespace; a failure's traceback names the page and its line."""
    names: dict[str, Any] = {"__name__": "examples"}
    for lines, source in examples(page):
        exec(compile("\n" * lines + source, str(PROJECT / page), "exec"), names)
    return names


@pytest.mark.slow
def test_the_page_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_examples("docs/python.md")
    out = capsys.readouterr().out
    assert len(examples("docs/python.md")) > 10
    assert out.startswith("0.01 3\n")
    run = names["run"]
    assert {folder.name for folder in Path("runs").iterdir() if folder.name != ".encoded"} == {
        *("sums", "hospitals", "followed", "stopped", "compared")
    }
    assert f"done {run.scores['loss']['loss']}\n" in out
    own = {client["name"]: client["examples"] for client in names["own"].clients}
    assert list(own) == ["north", "south", "west"] and sum(own.values()) == 64 - 16
    assert f"{list(own.items())}\n" in out
    assert [up for up, _ in names["curve"].points] == [
        0,
        *(n * run.summary["payload_bytes"]["up"] // 2 for n in (1, 2)),
    ]
    assert names["stopped"].status == "done" and "interrupted done\n" in out
    assert names["scores"]["examples"] == 10 and " over 10 examples\n" in out
    assert "method.local_step is not a known setting" in out and 'Did you mean "local_steps"?' in out
    assert "| one-shot |" in out
    # what the page says of the folder
    settings = (run.path / "config.yaml").read_text(encoding="utf-8")
    assert "train: objects" in settings
    written = [file for file in run.path.rglob("*") if file.suffix in (".json", ".jsonl", ".yaml")]
    assert written and not [file for file in written if "Add 3 and 4." in file.read_text(encoding="utf-8")]
    assert not hasattr(fedtune, "os")


def test_the_pages_of_python_name_what_there_is() -> None:
    text = (PROJECT / "docs/python.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bfedtune\.([A-Za-z_]\w*)", text))
    assert named and sorted(named - set(fedtune.__all__)) == []
    of_run = set(re.findall(r"\brun\.([a-z]\w*)", text))
    assert sorted(name for name in of_run if not hasattr(fedtune.Run, name)) == ["config", "path"]
    links = re.findall(r"\]\(([\w./-]+)\)", text)
    assert len(links) > 6 and [link for link in links if not (PROJECT / "docs" / link).is_file()] == []


@pytest.mark.slow
def test_the_lines_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_examples("README.md")
    ((_, source),) = examples("README.md")
    assert len(source.splitlines()) <= 10
    assert names["run"].path == Path("runs/fedavg") and names["run"].status == "done"
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    assert "[3 rows x " in capsys.readouterr().out  # the untrained model and two rounds
