"""The boundary around what builds a model: what a library raises there becomes one sentence with its cause.

transformers, PEFT, safetensors and tokenizers check little of a model's files, and tell by errors of every
kind: a ZeroDivisionError for a model without attention heads, an ImportError for a quantised one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedtune.errors import FedtuneError, InputError
from fedtune.measure.memory import out_of_memory

_TELLING = (OSError, ValueError, RuntimeError, ImportError)  # their text is a sentence; others' a bare word


@contextmanager
def usable(what: str) -> Iterator[None]:
    """Inside, and in a function decorated with it, errors of libraries say that `what` and why.

    Args:
        what: As in "model m: the weights in m/ cannot be loaded".

    Raises:
        InputError: Anything went wrong but that memory ran out, which is no fault of the files.
    """
    try:
        yield
    except FedtuneError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{what}: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """What a library's error says, in one line, as a sentence; with its kind where it says little."""
    said = first_line(error)
    return said if isinstance(error, _TELLING) and " " in said else f"{type(error).__name__}: {said}"


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, with the next where it announces that, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0]
    for line in lines[1:]:
        if not text.endswith(":"):
            break
        text = f"{text} {line}"
    return text if text.endswith(".") else f"{text}."
