"""Which robust means FedAvg's forms have, and why not the others."""

from __future__ import annotations

from functools import partial

from fedtune.core.robust import MeanName, Updates
from fedtune.methods.fedavg import lora_aggregation as lora
from fedtune.methods.tuning import Lora

_ALONE = "arrival: asynchronous takes each reply in alone, as it comes; take arrival: synchronous"
FINE_TUNE = "method.fine_tune has a round in which nothing is sent, of which there is no other mean"
_SECOND = "control_variates are a second update beside the first, on another scale"


def mean_refusal(
    mean: MeanName,
    *,
    asynchronous: bool,
    stacked: bool,
    factored: str,
    unlike_ranks: bool,
    control: bool,
) -> str | None:
    """Why another mean makes no sense: it needs all replies, and numbers that mean the same for all clients.

    Args:
        mean: Which.
        asynchronous: Whether replies are folded in one by one.
        stacked: Whether clients send LoRA factors of their own.
        factored: The aggregation that makes new factors of each client's product; "" for others.
        unlike_ranks: Whether clients have LoRA of unlike ranks.
        control: Whether there are control variates.
    """
    if mean == "weighted":
        return None
    if asynchronous:
        return _ALONE
    if stacked and mean != "krum":
        return (
            "aggregation: stack has every client draw factors of its own, so that no number of A or B means "
            "the same for two of them; take krum, or aggregation: mean or freeze-a"
        )
    if factored and mean != "krum":
        return (
            f"aggregation: {factored} is of each client's B A, and a {mean} of A and of B is nobody's "
            "product; take krum, or aggregation: mean or freeze-a"
        )
    if unlike_ranks and not stacked:
        return (
            "with lora.client_ranks those of a low rank send nothing for the higher ones and would count as "
            "0 there; leave client_ranks out, or bound norms"
        )
    if control and mean == "krum":
        return f"{_SECOND}; take median or trimmed-mean"
    return None


def bound_refusal(*, quantile: bool, asynchronous: bool, control: bool) -> str | None:
    """Why norms cannot be bounded; the arguments are those of `mean_refusal`."""
    if quantile and asynchronous:
        return _ALONE
    if not quantile and control:
        return f"{_SECOND}; take norm_quantile, which each of them has its own bound with"
    return None


def updates(factors: Lora | None, *, stacked: bool, control: str) -> Updates:
    """The changes of the weights, and apart from them of the control variates; of stacked factors, B A.

    Args:
        factors: Where clients send LoRA factors.
        stacked: Whether to stack them.
        control: What the control variates' names start with.
    """
    if factors is not None and stacked:
        scale = factors.scale
        return Updates(
            inner=partial(lora.inner, scale=scale),
            scaled=lora.scaled,
            vector=partial(lora.products, scale=scale),
        )
    return Updates(
        lambda name: "control" if name.startswith(control) else "weights",
        vector=partial(lora.padded, rank=factors.rank) if factors is not None else None,
    )
