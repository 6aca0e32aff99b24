"""docs/families.md: each family does with one method what the page says; reproduce/families.py makes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from reproduced import load

from fedtune.methods.registry import METHODS

families = load("families")
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
BLOCK = PAGE.partition("<!-- families -->")[2].partition("<!-- end families -->")[0]
NAMES = list(families.FAMILIES)


def table() -> dict[str, list[str]]:
    """The page's cells by family."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in BLOCK.splitlines()
        if line.startswith("|")
    ]
    assert rows[0][1:] == list(METHODS)
    return {row[0].strip("`"): row[1:] for row in rows[2:]}


def sentences() -> dict[str, str]:
    """What the page says below, by number."""
    return dict(re.findall(r"(?m)^(\d+)\. (.+)$", BLOCK))


def test_the_page_has_every_family_and_every_method() -> None:
    cells = table()
    assert list(cells) == NAMES and len(NAMES) >= 25
    said = sentences()
    assert list(said) == [str(number + 1) for number in range(len(said))]
    found = [cell for row in cells.values() for cell in row]
    assert len(found) == len(NAMES) * len(list(METHODS))
    assert {cell for cell in found if cell != families.WORKS} == {f"[{number}]" for number in said}
    works = found.count(families.WORKS)
    assert f"{works} of {len(found)}" in families.__doc__


@pytest.mark.parametrize("place", range(len(NAMES)), ids=NAMES)
def test_a_family_does_what_the_page_says(place: int) -> None:
    """Families take turns with the methods, so that each method has some of every kind."""
    family, column = NAMES[place], place % len(list(METHODS))
    cell = table()[family][column]
    said = families.tried(family, list(METHODS)[column])
    expected = cell if cell == families.WORKS else sentences()[cell.strip("[]")]
    assert families.plain(said, family) == expected
