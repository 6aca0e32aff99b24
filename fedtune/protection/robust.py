"""What `federation.robust` and `federation.weights` ask for, and with what they go; see core/robust.py.

A method goes with them if its server takes a mean of tensors (`MeanMethod`). Under secure aggregation the
server sees no single update, so all that is left is a fixed bound on norms, which clients keep to themselves.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fedtune.core.cohort import most_byzantine, trimmed
from fedtune.core.settings import Settings
from fedtune.errors import InputError

Weights = Literal["examples", "equal", "capped"]


class Robust(Settings):
    """Means that a few bad clients cannot move as far as they like; see robustness.md."""

    mean: Literal["weighted", "median", "trimmed-mean", "krum"] = "weighted"  # of the clients' updates
    trim: float = Field(0.2, gt=0, lt=0.5)  # trimmed-mean: share of the replies left out at each end
    byzantine: int | None = Field(None, ge=0)  # krum: bad clients; null: as many as n ≥ 2f + 3 replies allow
    keep: int = Field(1, ge=1)  # krum: updates whose mean is taken; above 1 it is Multi-Krum
    max_norm: float | None = Field(None, gt=0)  # a longer update is scaled down to this L2 norm
    norm_quantile: float | None = Field(None, gt=0, le=1)  # or to what this share of the norms is within

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        belongs = {"trim": "trimmed-mean", "byzantine": "krum", "keep": "krum"}
        for name, mean in belongs.items():
            if self.mean != mean and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with mean: {self.mean}; it belongs to {mean}")
        if self.max_norm is not None and self.norm_quantile is not None:
            raise ValueError("max_norm and norm_quantile are both set; a norm has one bound")
        if self.mean == "weighted" and self.max_norm is None and self.norm_quantile is None:
            raise ValueError(
                "nothing is asked for: set a mean other than weighted, or max_norm or norm_quantile"
            )
        return self

    @property
    def gathers(self) -> bool:
        """Whether the server needs all replies of a round at once."""
        return self.mean != "weighted" or self.norm_quantile is not None


def robust_refusal(robust: Robust, method: Any, *, secure: bool, privacy: bool) -> str | None:
    """Why the settings do not go with a method, or with masks or noise; None if they do."""
    from fedtune.core.robust import MeanMethod  # here, so that settings are read without torch

    if privacy:
        return (
            "federation.privacy clips each update, and its noise is made for a sum of these; "
            "set federation.privacy.clip"
        )
    if secure and robust.gathers:
        which = "norm_quantile" if robust.mean == "weighted" else f"mean: {robust.mean}"
        return (
            f"federation.secure_aggregation shows the server no single update, and {which} compares them; "
            "max_norm works there, for clients keep to it themselves"
        )
    name = method.config.name
    if not method.uses_wire:
        return f"the clients of {name} send nothing"
    if not isinstance(method, MeanMethod):
        return f"the server of {name} takes no mean of its clients' tensors"
    reason = method.mean_refusal(robust.mean)
    if reason is None and robust.max_norm is not None:
        reason = method.bound_refusal(quantile=False)
    if reason is None and robust.norm_quantile is not None:
        reason = method.bound_refusal(quantile=True)
    return reason and f"{name}: {reason}"


def weights_refusal(weights: Weights, most: int | None, *, secure: bool, privacy: bool) -> str | None:
    """Why what a client weighs cannot be set so; None if it can."""
    if privacy and (weights != "examples" or most is not None):
        return (
            "with federation.privacy all clients weigh the same already; leave weights and max_examples out"
        )
    if weights == "equal" and most is not None:
        return "max_examples has no effect with weights: equal; leave one of them out"
    if secure and weights == "capped":
        return (
            "with federation.secure_aggregation each client checks what it weighs, and the median of what "
            "others registered it does not know; set max_examples, or weights: equal"
        )
    return None


def check_replies(robust: Robust, quorum: int) -> None:
    """Raises InputError if a round with as few replies as the quorum allows has too few for the mean.

    Args:
        robust: The settings.
        quorum: Replies that a round has at least.
    """
    few = f"federation.quorum allows a round of {quorum} replies"
    more = "ask more clients, or raise federation.quorum"
    if robust.mean == "trimmed-mean" and trimmed(robust.trim, quorum) == 0:
        enough = f"set trim to {1 / quorum:.3g} or more, take mean: median, or" if quorum > 2 else "so"
        raise InputError(
            f"federation.robust.trim is {robust.trim:g}, and {few}: that leaves nobody out; {enough} {more}"
        )
    if robust.mean != "krum":
        return
    byzantine = most_byzantine(quorum) if robust.byzantine is None else robust.byzantine
    if quorum < 2 * byzantine + 3:
        raise InputError(
            f"federation.robust.mean is krum, which needs {2 * byzantine + 3} replies for {byzantine} bad "
            f"clients (2f + 3), and {few}; {more}"
        )
    if robust.keep > quorum - byzantine:
        raise InputError(
            f"federation.robust.keep is {robust.keep}, and {few}, of which {byzantine} may be bad: at most "
            f"{quorum - byzantine} can be kept"
        )
