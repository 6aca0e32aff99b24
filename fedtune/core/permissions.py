"""Who may read what a run writes: whoever the umask says, whichever library wrote it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path


def as_the_umask_says(files: Iterable[Path], folder: Path) -> None:
    """Gives files the permissions that a new file in `folder` has. safetensors makes its own with 0600.

    The umask is not asked for: to read it is to change it, for every thread of the process.
    """
    probe = folder / f".{os.getpid()}.mode"
    with probe.open("x") as opened:
        mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
    probe.unlink()
    for file in files:
        if not file.is_symlink():
            file.chmod(mode)
