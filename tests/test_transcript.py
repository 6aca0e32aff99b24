"""The transcript of docs/using.md: its commands, from a built wheel alone, print what the page shows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from reproduced import load

from fedtune.federation.publishing import CARD

PAGE = Path(__file__).parents[1] / "docs" / "using.md"
CHANGING = re.compile(r"seconds|peak memory|^\W*What it cost|^[┌└─┐┘]")  # of a machine, and a table's width


def steady(text: str) -> list[str]:
    """A text's lines without what each machine and each request has of its own."""
    text = re.sub(r"chatcmpl-[0-9a-f]+", "ID", re.sub(r'"created": \d+', "CREATED", text))
    return [re.sub(r"  +", " ", line).rstrip() for line in text.splitlines() if not CHANGING.search(line)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_an_installed_package_prints_what_the_page_shows(tmp_path: Path) -> None:
    block = PAGE.read_text().partition("<!-- transcript -->")[2].partition("<!-- end transcript -->")[0]
    shown = block.strip().removeprefix("```text\n").removesuffix("\n```")
    found = [f"$ {command}\n{printed}" for command, printed in load("transcript").said(tmp_path)]
    assert steady("".join(found)) == steady(shown)
    card = (tmp_path / "work" / "mine-model" / CARD).read_text()
    assert "| rounds | 2 |" in card and "More Information Needed" not in card
    assert str(tmp_path) not in card
