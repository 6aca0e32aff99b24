"""Puts what a command printed into a page, between `<!-- NAME -->` and `<!-- end NAME -->`.

    python scripts/insert_result.py PAGE NAME < output

No number in README.md or docs/ is typed by hand; scripts/results.sh makes them all with this.
"""

from __future__ import annotations

import sys
from pathlib import Path


def insert(page: str, name: str, text: str) -> str:
    """The page with the block's content replaced. Raises ValueError if the page has no such block."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page needs the lines {begin} and {end}")
    return f"{before}{begin}\n{text.strip(chr(10))}\n{end}{after}"


if __name__ == "__main__":
    path, name = Path(sys.argv[1]), sys.argv[2]
    path.write_text(insert(path.read_text(encoding="utf-8"), name, sys.stdin.read()), encoding="utf-8")
