"""Figures with units, as people give them on the command line: 8GB, 5Mbps, 2TFLOPS."""

from __future__ import annotations

import math
import re

from fedtune.errors import InputError, nearest

_DECIMAL = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BYTES = (
    {"B": 1.0}
    | {f"{p}B": f for p, f in _DECIMAL.items()}
    | {f"{p}iB": 1024.0**i for i, p in enumerate("KMGT", 1)}
)
"""Of memory: decimal units as the papers print them, and binary ones."""
BITS_PER_SECOND = (
    {"bps": 1.0}
    | {f"{p}bps": f for p, f in _DECIMAL.items()}
    | {f"{p}B/s": 8 * f for p, f in _DECIMAL.items()}
)
"""Of a link: bits, or bytes with a capital B."""
FLOPS = {f"{p}FLOPS": f for p, f in _DECIMAL.items() if p != "k"} | {"PFLOPS": 1e15}
"""Of a processor: operations a second."""


def quantity(text: str, units: dict[str, float], option: str) -> float:
    """The figure in the smallest unit.

    Args:
        text: A number and a unit, a blank between them or not.
        units: How many of the smallest unit each is.
        option: Whose value it is, for the message.

    Raises:
        InputError: No unit, an unknown one, no number, or a number that is not above zero.
    """
    choices, text = ", ".join(units), str(text)  # in Python someone may give a bare number
    found = re.fullmatch(r"\s*([+-]?[0-9.eE+-]*[0-9.])\s*([A-Za-z/]*)\s*", text)
    try:
        value = float(found[1]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not math.isfinite(value):
        raise InputError(f"{option} must be a number with a unit ({choices}), got {text!r}")
    if not found[2]:
        raise InputError(f"{option} needs a unit, one of {choices}; got {text!r}")
    if found[2] not in units:
        raise InputError(
            f"{option}: unit {found[2]!r} is not known; known are {choices}.{nearest(found[2], units)}"
        )
    if value <= 0:
        raise InputError(f"{option} must be above zero, got {text!r}")
    return value * units[found[2]]
