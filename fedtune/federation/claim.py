"""One process a folder: what writes a run holds its folder's lock, and a name is free until someone has it.

The lock is a file in the system's folder for temporary files, named by the folder's path, and locked by the
operating system: it is free again however its process ended. It holds on one machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from fedtune.core.temporary import PREFIX, sweep
from fedtune.errors import InputError

log = logging.getLogger("fedtune")


@contextmanager
def claimed(out: Path | None, base: Path) -> Iterator[Path]:
    """A folder that no other process of this machine writes as long as the context lasts.

    Args:
        out: The folder; None: the first of `base`, `base`-2, `base`-3 that is neither there nor claimed.
        base: The folder that a new one is named after.

    Raises:
        InputError: Another process writes `out`; names it.
    """
    sweep(tempfile.gettempdir())
    if out is not None:
        held = _lock(out)
        if isinstance(held, str):
            raise InputError(
                f"{out} is being written by process {held}; wait until that has ended, or give another --out"
            )
        path = out
    else:
        for number in count(1):
            path = base if number == 1 else base.with_name(f"{base.name}-{number}")
            if path.exists() or isinstance(held := _lock(path), str):
                continue
            if not path.exists():  # it may have come, and its process gone, since it was looked for
                break
            _unlock(held)
    try:
        yield path
    finally:
        _unlock(held)


def is_claimed(path: Path) -> bool | None:
    """Whether a process of this machine writes a folder; None where no lock of it is to be seen here."""
    try:
        opened = os.open(_file(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(opened)
    return False


Held = tuple[int, Path] | None  # the open file and its path; None where there are no locks


def _file(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"{PREFIX}{name}.lock"


def _lock(path: Path) -> Held | str:
    """The lock of a folder; or, as text, the process that holds it."""
    file = _file(path)
    while True:
        try:
            opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            log.warning("%s cannot be locked (%s); do not start two runs in it", path, error.strerror)
            return None
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(opened, 32).decode("ascii", "replace")
            os.close(opened)
            return holder or "of this machine"
        try:
            if os.path.samestat(os.fstat(opened), os.stat(file)):
                os.truncate(opened, 0)
                os.write(opened, str(os.getpid()).encode())
                return opened, file
        except FileNotFoundError:
            pass
        os.close(opened)  # who held it has just taken the file away: with the next one


def _unlock(held: Held | str) -> None:
    if isinstance(held, tuple):
        opened, file = held
        file.unlink(missing_ok=True)  # first: whoever opens the path from now on gets a file of its own
        os.close(opened)
