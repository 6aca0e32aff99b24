"""The errors a user can meet, and the exit status that each one ends the command with."""

from __future__ import annotations

import difflib
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
