"""`fedtune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fedtune
from fedtune.cli.display import Plugin


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    out: Annotated[Path, typer.Option(help="HTML file to write; must not exist.")] = Path("report.html"),
    plugin: Plugin = None,
) -> None:
    """Write one self-contained HTML page of runs: scores, curves against rounds and bytes, memory.

    Example: fedtune report runs/demo runs/mine --out report.html
    """
    print(fedtune.report_page(runs, out))
