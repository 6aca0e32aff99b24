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

    return LINK.sub(turned, markdown)
