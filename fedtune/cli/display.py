"""What commands share: JSON on stdout, progress on stderr, a free name for a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
