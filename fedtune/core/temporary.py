"""Temporary folders that a killed process does not leave behind for good.

Each is locked by the operating system for as long as its process lives, however that ends. The next process
of the same user that starts a run or needs such a folder takes away those that nobody holds any more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

PREFIX = f"fedtune-{os.getuid()}-"  # of every name of this user's in the system's folder for temporary files


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder that this user alone can enter (mode 0700); gone with all that is in it at the end."""
    sweep(tempfile.gettempdir())
    while True:
        with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
            held = _hold(Path(name))
            if held is None:
                continue  # another process took it for left behind, between its making and its lock
            try:
                yield Path(name)
            finally:
                os.close(held)
            return


@cache
def sweep(folder: str) -> None:
    """Removes what killed processes of this user left in `folder`; once a process."""
    for path in Path(folder).glob(f"{PREFIX}*"):
        held = _hold(path)
        if held is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(held)


def _hold(path: Path) -> int | None:
    """The open and locked folder; None if another process has it, or it is no folder of this user's."""
    try:
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(held)
        if found.st_uid == os.getuid() and os.path.samestat(found, os.stat(path, follow_symlinks=False)):
            return held
    except OSError:
        pass
    os.close(held)
    return None
