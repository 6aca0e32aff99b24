"""The documentation site's pages that are not in docs/: README.md and others of the project's folder.

mkdocs calls `on_files` and `on_page_markdown`. The same pages are read in the repository and on the site: a
link from one folder to the other is turned, and one to what the site does not have becomes its text.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LOG.md", "SECURITY.md")
ITEM = re.compile(r"(?:\d+\.|[*-]) ")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the project's folder."""
    for name in BESIDE:
        content = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns the page's links to what they lead to here."""
    here = "" if page.file.src_uri in BESIDE else "docs/"

    def turned(link: re.Match[str]) -> str:
        text, path, part = link.groups()
        there = normpath(here + path)
        name = there.removeprefix("docs/")
        known = (there in BESIDE or there.startswith("docs/")) and files.get_file_from_path(name) is not None
        return f"[{text}]({name}{part or ''})" if known else text

    return widened(LINK.sub(turned, markdown))


def widened(markdown: str) -> str:
    """What belongs to an item of a list, four columns in: the site's Markdown takes no less."""
    lines, width = list[str](), 0  # of the item's mark; 0 outside of lists
    for line in markdown.splitlines():
        mark, text = ITEM.match(line), line.lstrip(" ")
        if mark:
            width = len(mark.group())
        elif text and not line.startswith(" "):
            width = 0
        elif text and width and len(line) - len(text) >= width:
            line = " " * (4 - width) + line
        lines.append(line)
    return "\n".join(lines)
