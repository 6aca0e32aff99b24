"""reproduce/papers.py: every table and figure of the papers is listed, and what is said to be there is."""

from __future__ import annotations

from typing import Any

import pytest
from reproduced import load

papers, items, common, claims = load("papers"), load("paper_items"), load("common"), load("claims")
PRINTED = {  # tables and figures of each paper
    "one-shot": (6, 6),
    "fedkseed": (3, 5),
    "fedbiot": (5, 2),
    "fedcybgd": (10, 4),
}
ITEMS = [(paper, item) for paper, some in papers.PAPERS.items() for item in some]


@pytest.mark.parametrize("paper", PRINTED)
def test_all_tables_and_figures_are_listed_once(paper: str) -> None:
    tables, figures = PRINTED[paper]
    expected = [f"Table {i + 1}" for i in range(tables)] + [f"Figure {i + 1}" for i in range(figures)]
    assert sorted(item.where for item in papers.PAPERS[paper]) == sorted(expected)


@pytest.mark.parametrize(("paper", "item"), ITEMS, ids=[f"{paper} {item.where}" for paper, item in ITEMS])
def test_what_is_not_there_has_a_reason(paper: str, item: Any) -> None:
    known = papers.heads_by_name()
    assert item.full or item.full_of or item.no_full
    assert item.small or item.no_small
    for name in (*item.small, *item.full_of):
        assert name in known
    for name in item.full_of:
        entry = load(known[name][0].removesuffix(".py")).ENTRIES[name]
        assert entry.full, f"{name} has no full form"
    assert f"`papers.py papers-{paper} --full`" in papers.full_cell(paper, item, known) or not item.full


def test_every_claim_is_of_a_table() -> None:
    listed = {name for _, item in ITEMS for name in item.small}
    assert claims.claims().keys() <= listed


def test_table_1_has_all_its_cells() -> None:
    # four models, three data sets, one round and several, LoRA and all weights
    commands = [step.command for step in items.TABLES_1_2]
    assert len(commands) == 4 * 3 * 2 == len(set(commands))
    assert all(sum(word.endswith(("_lora.yaml", "_full.yaml")) for word in words) == 2 for words in commands)
    epochs = {}
    for model in items.MODELS:
        for data in items.SETS:
            several, one = items.both_schemes(model, data)
            found = [
                int(word.removeprefix("method.local_epochs="))
                for step in (several, one)
                for word in step.command
                if word.startswith("method.local_epochs=")
            ]
            assert found[1] == 3 * found[0]  # as many epochs in one round as in three
            epochs[model, data] = found[0]
    # the paper's Table 3
    assert [epochs[model, data] for model in items.MODELS for data in ("mmlu", "wizard", "both")] == [
        *(1, 2, 1),
        *(1, 2, 1),
        *(2, 1, 1),
        *(1, 1, 1),
    ]


def test_no_two_commands_write_to_one_folder() -> None:
    steps = [step for entry in papers.ENTRIES.values() for step in entry.full]
    folders = [step.command[-1] for step in steps if "compare" in step.command]
    assert len(folders) > 50 and len(set(folders)) == len(folders)


def test_the_page_is_current() -> None:
    page = (common.ROOT / "docs/papers.md").read_text(encoding="utf-8")
    for paper in papers.PAPERS:
        assert papers.listed(paper) in page, f"run reproduce/papers.py papers-{paper}"
