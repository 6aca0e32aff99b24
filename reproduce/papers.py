"""Every table and figure of the four papers: where its full form is, where its small one, what came out.

The full forms that belong to no claim are here: `--full` runs them on a card with models and data of a hub,
`--full --dry-run` shows them. A file that no hub has in this form is named as it is to be written before.

Table:   one-shot, all tables and figures; docs/papers.md, block papers-one-shot
Command: python reproduce/papers.py papers-one-shot
Time:    seconds; reads the blocks of other pages
Needs:   nothing
Result:  12 tables and figures, 8 with commands at full size, 10 in small

Table:   FedKSeed, all tables and figures; docs/papers.md, block papers-fedkseed
Command: python reproduce/papers.py papers-fedkseed
Time:    seconds; reads the blocks of other pages
Needs:   nothing
Result:  8 tables and figures, 5 with commands at full size, 8 in small

Table:   FedBiOT, all tables and figures; docs/papers.md, block papers-fedbiot
Command: python reproduce/papers.py papers-fedbiot
Time:    seconds; reads the blocks of other pages
Needs:   nothing
Result:  7 tables and figures, 3 with commands at full size, 3 in small

Table:   FedCyBGD, all tables and figures; docs/papers.md, block papers-fedcybgd
Command: python reproduce/papers.py papers-fedcybgd
Time:    seconds; reads the blocks of other pages
Needs:   nothing
Result:  14 tables and figures, 8 with commands at full size, 8 in small
"""

from __future__ import annotations

from functools import partial

from claims import PAGE, decided
from common import Entry, Head, main, table
from contents import files, link
from paper_items import FEDKSEED, ONE_SHOT, Item
from paper_items_of_blocks import FEDBIOT, FEDCYBGD

PAPERS = {"one-shot": ONE_SHOT, "fedkseed": FEDKSEED, "fedbiot": FEDBIOT, "fedcybgd": FEDCYBGD}


def heads_by_name() -> dict[str, tuple[str, Head]]:
    """All entries of this folder: name -> file and head."""
    return {name: (file.name, head) for file, some in files().items() for name, head in some.items()}


def full_cell(paper: str, item: Item, known: dict[str, tuple[str, Head]]) -> str:
    """Where the full form is."""
    found = [f"`{known[name][0]} {name} --full`" for name in item.full_of]
    if item.full:
        count = f"{len(item.full)} command{'s' * (len(item.full) > 1)}"
        found.append(f"`papers.py papers-{paper} --full`, {count}")
    if item.no_full:
        found.append(item.no_full)
    return "; ".join(found)


def small_cell(item: Item, known: dict[str, tuple[str, Head]]) -> tuple[str, str]:
    """Where the small form is, and what came out."""
    found, verdicts = [], []
    for name in item.small:
        file, head = known[name]
        found.append(f"`{file} {name}`: {link(*head.places[0])}")
        if head.places[0][0] == PAGE:
            verdicts.append(f"{decided(name, head)[1].verdict} (`{name}`)")
    if item.no_small:
        found.append(item.no_small if item.small else f"no small form: {item.no_small}")
    shown = "shown, no rule" if item.small else "—"
    return "; ".join(found), "; ".join(verdicts) or shown


def listed(paper: str) -> str:
    """A line for each table and figure of a paper."""
    known, rows = heads_by_name(), []
    for item in PAPERS[paper]:
        small, came_out = small_cell(item, known)
        rows.append([item.where, item.shows, full_cell(paper, item, known), small, came_out])
    has_small = sum(bool(item.small) for item in PAPERS[paper])
    has_full = sum(bool(item.full or item.full_of) for item in PAPERS[paper])
    counts = f"{len(rows)} tables and figures: {has_full} with commands at full size, {has_small} in small."
    header = ["", "what", "full form", "small form", "came out"]
    return f"{counts}\n\n{table(header, rows, numbers=False)}"


ENTRIES = {
    f"papers-{paper}": Entry(
        partial(listed, paper), full=tuple(dict.fromkeys(step for item in items for step in item.full))
    )
    for paper, items in PAPERS.items()
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
