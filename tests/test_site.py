"""The documentation site: it builds, no link is dead, no other host is asked; its made pages are current."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command import fedtune as command
from reproduced import load

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?(?:https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="needs mkdocs-material")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (
        done.stderr + done.stdout
    )  # a dead link and a page that no menu has among them
    return folder


def test_every_page_is_there_and_asks_no_other_host(site: Path) -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        made = (site / f"{page.stem}.html").read_text(encoding="utf-8")
        assert not OUTSIDE.search(made), page.name
    assert "What it cost" in (site / "index.html").read_text(encoding="utf-8")  # README.md


def test_links_between_the_folders_are_turned(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="fedavg.html"' in start and 'href="SECURITY.html"' in start and "docs/fedavg" not in start
    assert 'href="index.html#what-is-in-a-run-folder"' in start or 'href="#what-is-in-a-run-folder"' in start
    made = (site / "plugins.html").read_text(encoding="utf-8")
    assert "examples/clip_mean" not in re.findall(r'href="([^"]*)"', made)  # a folder: its name alone


def test_what_belongs_to_an_item_of_a_list_stays_in_it(site: Path) -> None:
    made = (site / "deployment.html").read_text(encoding="utf-8")
    steps = made.partition("<ol>")[2].partition("</ol>")[0]
    assert steps.count("<li>") == 6 and "fedtune client --server" in steps and "<pre>" in steps


def test_search_finds_settings_and_commands(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "commands.html#fedtune-run" in index and "method.optimizer_in_backward" in index


def test_the_page_of_commands_is_that_of_the_help_texts() -> None:
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == load("commands").page()


@pytest.mark.parametrize("asked", [one.asked for one in load("questions").QUESTIONS if one.command])
def test_an_error_is_printed_as_the_page_of_questions_shows_it(asked: str, tmp_path: Path) -> None:
    made = load("questions")
    (question,) = (one for one in made.QUESTIONS if one.asked == asked)
    for name, content in question.files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    ended = command(*shlex.split(question.command), cwd=tmp_path)
    assert ended.status in (2, 3) and ended.out == ""
    said = ended.err.strip().replace(f"{tmp_path}/", "")
    assert made.section(question, said) in (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
