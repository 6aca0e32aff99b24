"""The errors a user can meet, and the exit status that each one ends the command with."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable


class FedtuneError(Exception):
    """Base of every error that the command line shows as one message, without a traceback."""

    exit_status = 1


class InputError(FedtuneError):
    """The command line, a configuration or an input file is wrong. Nothing was written."""

    exit_status = 2


class FederationError(FedtuneError):
    """The federation could not finish, for instance because fewer clients replied than the quorum."""

    exit_status = 3


class ProgramError(FederationError):
    """A fault of the program, the model or the machine, which any client would have: a run stops at once."""


_REMEDIES = {
    errno.ENOSPC: "Free some space.",
    errno.EDQUOT: "Free some space, or have the quota raised.",
    errno.EFBIG: "Have the largest size of a file raised (ulimit -f), or use another file system.",
    errno.EACCES: "Give this user the right to write there.",
    errno.EPERM: "Give this user the right to write there.",
    errno.EROFS: "It is mounted to be read alone; use another folder.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENFILE: "The whole machine has too many open files; end what holds them.",
    errno.ENAMETOOLONG: "Use a shorter name or another folder.",
    errno.ENOENT: "Somebody removed it or a folder above it; bring it back.",
    errno.ENOTDIR: "A file stands where a folder is needed; move it away.",
    errno.EISDIR: "A folder stands where a file is needed; move it away.",
    errno.EIO: "The disk or the network drive fails; look at the system's log.",
    errno.ESTALE: "The network drive was away; mount it again.",
    errno.ENOMEM: "Free some memory.",
}


def system_error(error: BaseException) -> str:
    """What the system said of a file, which file it was, and what to do, in sentences.

    Args:
        error: An OSError; or of a library that wraps one in its own words, with its number in the text.
    """
    code = getattr(error, "errno", None)
    if code is None and (found := re.search(r"os error (\d+)", str(error))):
        code = int(found[1])
    said = os.strerror(code) if isinstance(error, OSError) and code is not None else str(error)
    file = getattr(error, "filename", None)
    where = f": {os.fsdecode(file)}" if isinstance(file, str | bytes | os.PathLike) else ""
    return " ".join(filter(None, (f"{said.rstrip('.')}{where}.", _REMEDIES.get(code or 0))))


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean "x"?' for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def short(text: str, most: int = 200) -> str:
    """A text for a message, with its middle left out where it is longer than `most` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def foreign(text: str, most: int = 300) -> str:
    """What another party wrote, for a terminal, a log, a page or a file of a run.

    Cut to `most` characters, and each that does not print (control characters, which steer a terminal; those
    that turn the direction of writing; halves of surrogate pairs) is shown as U+FFFD.
    """
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 4] + " ..."
