"""Who may read what a run writes: whoever the umask says, whichever library wrote it."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path


def as_the_umask_says(files: Iterable[Path], folder: Path) -> None:
    """Gives files the permissions that a new file in `folder` has. safetensors makes its own with 0600.

    The umask is not asked for: to read it is to change it, for every thread of the process.
    """
    mode = _mode(folder)
    for file in files:
        if not file.is_symlink():
            file.chmod(mode)


def _mode(folder: Path) -> int:
    """Of a new file: of one without a name where the system has such, so that a kill leaves none behind."""
    try:
        opened = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError):
        with tempfile.TemporaryDirectory() as other:
            opened = os.open(Path(other) / "mode", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(opened).st_mode)
    finally:
        os.close(opened)
