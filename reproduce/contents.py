"""The page that lists what is here, from the heads of all files.

Table:   all tables and figures; docs/reproduce.md, whole file
Command: python reproduce/contents.py contents
Time:    seconds
Needs:   nothing
Result:  a line a table, with its command; a test holds the page to the heads
"""

from __future__ import annotations

import ast
from pathlib import Path

from common import ROOT, Entry, Head, heads, main

INTRO = """\
# Tables and figures

<!-- Made by reproduce/contents.py from the heads of the files in reproduce/. Do not edit. -->

Every table and figure of README.md and of these pages is made by a command, from the project's folder; no
number is typed. There is a file a paper, and files for what is no paper's. Runs that are done, in
`runs/results`, are taken over; remove one to make it anew.

    python reproduce/fedkseed.py seeds             # makes the runs, then the table, and puts it into its page
    python reproduce/fedkseed.py seeds --print     # prints the table instead
    python reproduce/fedkseed.py all --dry-run     # shows the commands of all its tables and runs none
    python reproduce/fedkseed.py --list            # also says what came out, in one sentence each

Times are of two shared cores. `../shared` is a folder beside the project's with real data sets and small
pre-trained models, which is not part of it: without it, what needs it is left out with a line that says so.
"""


def story(file: Path) -> str:
    """A file's docstring."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def files() -> dict[Path, dict[str, Head]]:
    """The files that make tables, with their heads."""
    found = {file: heads(story(file)) for file in sorted((ROOT / "reproduce").glob("*.py"))}
    return {file: some for file, some in found.items() if some}


def link(page: str, block: str) -> str:
    """A place, as the reader of docs/ sees it."""
    name = page.removeprefix("docs/")
    return f"[{name}]({name if name != page else f'../{name}'})" + (f", `{block}`" if block else "")


def page() -> str:
    """The whole page."""
    parts = [INTRO]
    for file, some in files().items():
        lines = [f"## `{file.name}`\n", f"{story(file).partition(chr(10))[0]}\n"]
        lines += ["| entry | table | where | time | needs |", "| --- | --- | --- | --- | --- |"]
        for name, head in some.items():
            places = ", ".join(link(*place) for place in head.places)
            what = head.table[: head.table.index(head.places[0][0])].rstrip("; ")
            lines.append(f"| `{name}` | {what} | {places} | {head.time} | {head.needs} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


ENTRIES = {"contents": Entry(page)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
