"""`fedtune status`: how a run stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fedtune
from fedtune.cli.display import Json, print_json


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    as_json: Json = False,
) -> None:
    """Say who is there, how far the run is, bytes and faults; of one that is under way, finished or killed.

    Reads the run's folder alone, and changes nothing in it.

    Example: fedtune status runs/first
    """
    found = fedtune.status(run)
    if as_json:
        print_json(found)
        return
    from fedtune.report.status import status_lines, status_table
    from fedtune.report.tables import print_whole

    for line in status_lines(found):
        print(line)
    print_whole([status_table(found)])
