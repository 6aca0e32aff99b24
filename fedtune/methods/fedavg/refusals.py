"""With which masks, noise, means and compression the forms of FedAvg do not go, and why."""

from __future__ import annotations

from fedtune.core.robust import MeanName
from fedtune.methods.fedavg import robust
from fedtune.methods.fedavg.settings import FACTORED, FROM_FACTORS, Config


def of_sums(config: Config, *, privacy: bool) -> str | None:
    """Stacking needs each client's own factors; SCAFFOLD's two updates have no common norm to clip."""
    if config.aggregation in FROM_FACTORS:
        return f"aggregation: {config.aggregation} needs each client's factors"
    if config.aggregation == "alternate":
        return "aggregation: alternate has another sum in odd rounds than in even ones; take freeze-a"
    if config.buffer:
        return "buffer weighs each update by how old it is; leave it out"
    if config.regions:
        return "regions sum their own clients, and masks and noise are of one sum of all; leave regions out"
    if config.fine_tune:
        return "fine_tune has a round in which nothing is sent, and so nothing summed; take ditto"
    if privacy and config.control_variates:
        return "control_variates are a second update beside the first, on another scale"
    return None


def of_means(config: Config, mean: MeanName) -> str | None:
    """See robust.py."""
    if config.fine_tune and mean != "weighted":
        return robust.FINE_TUNE
    if config.buffer and mean != "weighted":
        return "buffer holds updates of unlike age, which are not compared; leave it out"
    if config.regions and mean != "weighted":
        return "regions begin with unlike weights, so that updates are not compared; leave regions out"
    return robust.mean_refusal(
        mean,
        asynchronous=config.arrival == "asynchronous",
        stacked=config.aggregation == "stack",
        factored=config.aggregation if config.aggregation in FACTORED else "",
        unlike_ranks=bool(config.lora and config.lora.client_ranks),
        control=config.control_variates,
    )


def of_bounds(config: Config, *, quantile: bool) -> str | None:
    """See robust.py."""
    if config.fine_tune:
        return robust.FINE_TUNE
    asynchronous, control = config.arrival == "asynchronous", config.control_variates
    return robust.bound_refusal(quantile=quantile, asynchronous=asynchronous, control=control)


def of_compression(config: Config, *, sparse: bool, feedback: bool) -> str | None:
    """Factors that a client draws anew are no change of what was there: all of them count, once."""
    if config.prune:
        return "prune tells of ranks that went by numbers that are exactly 0; leave one of the two out"
    if config.aggregation == "stack" and (sparse or feedback):
        return (
            f"aggregation: stack has clients send factors of their own, whole; leave out "
            f"{'top_k' if sparse else 'error_feedback'}, or take aggregation: mean or freeze-a"
        )
    return None
