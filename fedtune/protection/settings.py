"""What `federation.secure_aggregation` and `federation.privacy` ask for, and which methods they go with.

Both change what a round is: the server's step gets the weighted sum of the clients' updates and no reply
of its own. A method goes with them if such a sum is all that its server needs (`SumMethod`).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Field

from fedtune.core.cohort import quorum_of
from fedtune.core.settings import Settings
from fedtune.core.types import SumMethod
from fedtune.errors import InputError

LARGEST_DEVIATIONS = 9.0  # no noise is further out: 53-bit uniform numbers give at most 8.6

Threshold = Annotated[int, Field(ge=2)] | Annotated[float, Field(gt=0.5, le=1)]


class SecureAggregation(Settings):
    """Clients mask what they send, so that the server learns their sum alone; see privacy.md."""

    threshold: Threshold = 0.6  # clients that must stay to a round's end: a count, or a fraction of the asked
    bits: Literal[40, 48, 56, 64] = 64  # of a masked number; less is smaller, and so is the range of a sum


class Privacy(Settings):
    """Differential privacy of whole clients: updates are clipped, and their sum has Gaussian noise."""

    clip: float = Field(gt=0)  # largest L2 norm of a client's update; a longer one is scaled down to it
    noise_multiplier: float = Field(ge=0)  # standard deviation of the sum's noise, in clips; 0: no noise
    delta: float = Field(1e-5, gt=0, lt=1)  # δ that ε is given for; it must be below 1 / clients


def refusal(method: Any, *, privacy: bool) -> str | None:
    """Why a method cannot work with a sum alone (a noisy one, with `privacy`), or None if it can."""
    if not method.uses_wire:
        return "its clients send nothing"
    if method.arrival == "in-turn":
        return "its clients come one after another, and each goes on from the result of the one before"
    if method.arrival == "one-by-one":
        return "its server takes each reply in alone, as it comes"
    if not isinstance(method, SumMethod):
        return "its server needs more of each reply than a weighted sum"
    return method.sum_refusal(privacy=privacy)


def check_scale(privacy: Privacy, unit: float) -> None:
    """Raises ValueError if a clipped sum with its noise does not fit the integers that it is made of.

    Noise beyond them would stop at the largest one, and ε would promise what is not there.

    Args:
        privacy: Clip and noise.
        unit: What 1 in a summand stands for.
    """
    largest = 2.0**62 * unit / (1 + LARGEST_DEVIATIONS * privacy.noise_multiplier)
    if privacy.clip >= largest:
        raise ValueError(
            f"federation.privacy: a clip of {privacy.clip:g} with a noise_multiplier of "
            f"{privacy.noise_multiplier:g} makes noise that the sum's 64-bit numbers do not hold; the clip "
            f"must be below {largest:.4g}. A norm of an update that is not far above the usual one does"
        )


def require_packages(secure: SecureAggregation | None, privacy: Privacy | None) -> None:
    """Raises InputError if what one of the two needs is not installed."""
    needed = {"cryptography": secure or privacy, "Crypto": secure, "dp_accounting": privacy}
    missing = [name for name, wanted in needed.items() if wanted and find_spec(name) is None]
    if missing:
        raise InputError(
            f"federation.{'secure_aggregation' if secure else 'privacy'} needs packages that are not "
            f"installed ({', '.join(missing)}); pip install 'fedtune[privacy]'"
        )


def threshold_of(settings: SecureAggregation, cohort: int) -> int:
    """Clients of a cohort that must stay to the end of a round.

    Raises:
        InputError: The cohort has fewer, or the threshold is not above one half of it: with half or fewer
            a server could ask two halves for different shares and see through a mask.
    """
    threshold = max(2, quorum_of(cohort, settings.threshold))
    if threshold > cohort:
        raise InputError(
            f"federation.secure_aggregation.threshold is {settings.threshold}, which is {threshold} clients, "
            f"but a round asks {cohort}; no round could reach it. The sum of a single client hides nothing: "
            "ask at least two"
        )
    if 2 * threshold <= cohort:
        raise InputError(
            f"federation.secure_aggregation.threshold is {settings.threshold}, but a round asks {cohort} "
            f"clients; it must be above one half of them, {cohort // 2 + 1} or more"
        )
    return threshold
