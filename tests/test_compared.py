"""The page beside other tools: every cell filled, our links alive, a place for what is said of others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
PAGE = (HOME / "docs" / "compared.md").read_text(encoding="utf-8")
WORDS = {"yes", "partly", "elsewhere", "not found"}
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def part(text: str, heading: str) -> str:
    """What stands between a heading and the next one of its level or a higher one."""
    level = len(heading) - len(heading.lstrip("#"))
    _, found, rest = f"\n{text}".partition(f"\n{heading}\n")
    assert found, heading
    return re.split(rf"\n#{{1,{level}}} ", rest)[0]


def table(text: str) -> list[list[str]]:
    """The cells of a table, its head first and without the line under that."""
    rows = [line.strip("|\n").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in (*rows[:1], *rows[2:])]


def anchors(text: str) -> set[str]:
    """What a link's part after `#` can be on a page."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def dead(text: str) -> list[str]:
    """The links of a page in docs/ to files, pages and parts of pages that are not there."""
    found = []
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        there = HOME / "docs" / path
        if link.startswith("https://"):
            continue
        if not there.is_file() or (anchor and anchor not in anchors(there.read_text(encoding="utf-8"))):
            found.append(link)
    return found


def faults(rows: list[list[str]]) -> list[str]:
    """The features with a cell that is missing, empty, or none of the words, or with no link of ours."""
    width = len(rows[0])
    return [
        row[0]
        for row in rows[1:]
        if len(row) != width
        or not all(row)
        or set(row[2:]) - WORDS
        or not re.match("(yes|partly|no)[,:]", row[1])
        or not LINK.search(row[1])
    ]


ROWS = table(part(PAGE, "## The table"))
TOOLS = ROWS[0][2:]


def test_every_column_of_every_row_is_filled() -> None:
    assert TOOLS == ["FlowerTune", "OpenFedLLM", "FederatedScope-LLM", "NVFlare", "LLaMA-Factory", "axolotl"]
    assert len(ROWS) > 25 and len({row[0] for row in ROWS}) == len(ROWS)
    assert faults(ROWS) == []


def test_every_link_on_our_side_leads_somewhere() -> None:
    assert dead(PAGE) == []


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_said_of_a_tool_has_a_place_and_nothing_else_has(tool: str) -> None:
    seen = table(part(PAGE, f"### {tool}"))[1:]
    column = ROWS[0].index(tool)
    assert [row[0] for row in seen] == [row[0] for row in ROWS[1:] if row[column] != "not found"]
    for feature, place in seen:
        assert re.search(r"`/[\w./-]+`", place) or "the branch " in place, feature


def test_each_tool_has_a_commit_and_dates() -> None:
    looked = table(part(PAGE, "## What was looked at"))[1:]
    assert [row[0] for row in looked] == TOOLS
    for _, where, commit, of, first, _ in looked:
        (link,) = LINK.findall(commit)
        assert re.fullmatch(rf"https://github\.com/{where.split(',')[0]}/tree/[0-9a-f]{{40}}", link)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", first) and first < of < "2026-11-30"


@pytest.mark.parametrize(
    "link", ["nowhere.md", "../configs/nowhere.yaml", "fedavg.md#nowhere", "planning.md#What-it-says"]
)
def test_a_dead_link_is_found(link: str) -> None:
    assert dead(f"[a](fedavg.md#preferences), [b]({link}), [c](https://example.org/nowhere)") == [link]


@pytest.mark.parametrize(
    "row",
    ["yes: [a](b.md) | | yes", "yes: [a](b.md) | yes", "yes: [a](b.md) | no | yes", "yes: a | yes | yes"],
)
def test_a_cell_that_is_not_filled_is_found(row: str) -> None:
    head = "| feature | fedtune | one | two |\n| --- | --- | --- | --- |\n"
    text = f"{head}| good | no: [a](b.md) | not found | yes |\n| bad | {row} |\n"
    assert faults(table(text)) == ["bad"]
