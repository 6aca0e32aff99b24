"""Whose fault it is: what one client lacks leaves that client out, what every client would meet ends the run.

A client that is away, late, whose data are of no use (`ClientError`) or whose frame is not what was asked
(`FrameError`) is left out of a round. Anything else that breaks is of the program, the model or the machine:
asking the others, or the same client again, would end in the same way. It becomes a `ProgramError` here.
"""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.core.types import ClientError
from fedtune.core.wire import FrameError
from fedtune.errors import FedtuneError, ProgramError, system_error
from fedtune.measure.memory import out_of_memory

LEFT_OUT = (ClientError, FrameError)
_OTHERS = tuple({str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")})
_NO_ORDER = "does not have a deterministic implementation"  # of a RuntimeError of PyTorch
_OWN = str(Path(__file__).resolve().parents[1])


@contextmanager
def faults(
    part: str, memory: Callable[[], str] | None = None, *, passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Inside, whatever is not foreseen becomes a ProgramError that says in which part of the run it was.

    Args:
        part: As in "training of client 3 in round 2".
        memory: What to say when memory ran out: the batch, and what to lower; None where nothing reduces it.
        passing: Errors that pass as they are, beside fedtune's own: what leaves a client out, where it works.

    Raises:
        ProgramError: Something broke that is not foreseen.
    """
    foreseen: tuple[type[Exception], ...] = (FedtuneError, *passing)
    try:
        yield
    except foreseen:
        raise
    except (Exception, SystemExit) as error:  # SystemExit: of a library, or of somebody's own part
        raise ProgramError(_said(error, part, memory)) from error


def whole_traceback(error: BaseException) -> str:
    """An error with those that it came from, as Python shows them."""
    return "".join(traceback.format_exception(error)).rstrip()


def _said(error: BaseException, part: str, memory: Callable[[], str] | None) -> str:
    if out_of_memory(error):
        how = memory() if memory else "It needs a machine with more; fedtune plan says what a run needs."
        return f"{part}: out of memory ({_text(error)}) {how}"
    if _NO_ORDER in str(error):
        return (
            f"{part}: {str(error).partition(' ')[0]} has no form that gives the same bits each time, and "
            f"run.deterministic is strict; set run.deterministic=fast.{_at(error)}"
        )
    if isinstance(error, ImportError) and error.name:
        package = error.name.partition(".")[0]
        return (
            f"{part}: the package {package} is missing or cannot be loaded ({_text(error)}) Install it into "
            "this environment."
        )
    whose, said = "the program or the model", f"{type(error).__name__}: {_text(error)}"
    if isinstance(error, OSError):
        whose, said = "this machine", system_error(error)
    return f"{part}: a fault of {whose}, not of a client: {said}{_at(error)}"


def _text(error: BaseException) -> str:
    """The first line of what an error says, as a sentence."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "it says nothing more")
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _at(error: BaseException) -> str:
    """The file to look at: the innermost that is neither Python's nor a library's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    for frame in reversed(frames):
        file = str(Path(frame.filename).resolve())
        own = file.startswith(_OWN + os.sep)
        if (own or not file.startswith(_OTHERS)) and os.path.isfile(file):
            shown = os.path.join("fedtune", os.path.relpath(file, _OWN)) if own else file
            return f" It came out of {shown}, line {frame.lineno}."
    return ""
