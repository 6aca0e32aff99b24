"""Who may read what a run writes: whoever the umask says, whichever library wrote it.

Over a network a run's folder holds what clients sent one by one, and a client's folder its secrets: there it
is the user alone, whatever the umask says.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fedtune.core.temporary import temporary_folder
from fedtune.errors import InputError, system_error

OTHERS = 0o077  # the bits of a mode that are not the owner's


def as_the_umask_says(files: Iterable[Path], folder: Path) -> None:
    """Gives files the permissions that a new file in `folder` has. safetensors makes its own with 0600.

    The umask is not asked for: to read it is to change it, for every thread of the process.
    """
    mode = _mode(folder)
    for file in files:
        if not file.is_symlink():
            file.chmod(mode)


@contextmanager
def private() -> Iterator[None]:
    """Inside, what the process makes is for its user alone: folders 0700, files 0600. For every thread."""
    before = os.umask(OTHERS)
    try:
        yield
    finally:
        os.umask(before)


def make_private(folder: Path) -> None:
    """Takes a folder and everything in it, if it is there, from all but the user; links are not followed.

    Raises:
        InputError: Something in it is another user's, or the file system refuses.
    """
    if not folder.is_dir():
        return
    try:
        for path in (folder, *folder.rglob("*")):
            mode = 0 if path.is_symlink() else stat.S_IMODE(path.stat().st_mode)
            if mode & OTHERS:
                path.chmod(mode & ~OTHERS)
    except FileNotFoundError:  # something in it went away meanwhile: begin anew
        return make_private(folder)
    except OSError as error:
        raise InputError(
            f"{folder} holds what no other user may read, and cannot be closed to them: {system_error(error)}"
        ) from None


def append_private(path: Path) -> IO[bytes]:
    """A file to append to that only the user can read, one of an earlier version too."""
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")
    if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & OTHERS:
        with suppress(PermissionError):  # a file system that has one mode for all files
            os.fchmod(file.fileno(), 0o600)
    return file


def _mode(folder: Path) -> int:
    """Of a new file: of one without a name where the system has such, so that a kill leaves none behind."""
    try:
        opened = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError):
        with temporary_folder() as other:
            opened = os.open(other / "mode", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(opened).st_mode)
    finally:
        os.close(opened)
