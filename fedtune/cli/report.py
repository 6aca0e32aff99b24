"""`fedtune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.display import Plugin


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    out: Annotated[Path, typer.Option(help="HTML file to write; must not exist.")] = Path("report.html"),
    plugin: Plugin = None,
) -> None:
    """Write one self-contained HTML page of runs: scores, curves against rounds and bytes, memory.

    Example: fedtune report runs/demo runs/mine --out report.html
    """
    from fedtune.errors import InputError
    from fedtune.federation.files import disk_errors, write_text
    from fedtune.report.page import read_runs
    from fedtune.report.page import report as page

    if out.exists():
        raise InputError(f"{out} exists already; give another --out, or move it away")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    text = page(read_runs(runs))
    with disk_errors(str(out)):
        write_text(out, text)
    print(out)
