"""What commands share: JSON on stdout, progress on stderr, a free name for a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _load_plugins(files: list[Path] | None) -> list[Path] | None:
    from fedtune.registry import load_plugin

    for file in files or []:
        load_plugin(file)
    return files


# The files are imported while the command line is read, so that a command finds their parts like any other.
Plugin = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        callback=_load_plugins,
        help="Python file with parts of your own (docs/plugins.md); can be repeated.",
    ),
]


def print_json(document: Any) -> None:
    """Prints one JSON document."""
    from fedtune.federation.files import dumps

    print(dumps(document, indent=2))


def progress_on(quiet: bool) -> Any:
    """A context with the progress of a run on stderr, or with none."""
    from contextlib import nullcontext

    from fedtune.federation.progress import Silent
    from fedtune.report.display import Display

    return nullcontext(Silent()) if quiet else Display()


def free_name(path: Path) -> Path:
    """`path`, or with the first number behind it that is not taken."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate
