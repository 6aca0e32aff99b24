"""How a score is spread over the clients: who is served worst, and how far apart they are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedtune.evaluation.registry import TASKS
from fedtune.evaluation.types import Outcome, Scored

CLIENT = "client-"  # what the name of one client's model begins with, before its number


def spread(
    outcomes: Mapping[str, Mapping[str, Outcome]], owners: Sequence[int]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Each client's value of each metric, where clients differ.

    A client is scored with its own model if it has one, else with the global one; on its own held-out
    examples if it has some and the task scores held-out examples, else on all.

    Args:
        outcomes: By the model's name, `global` or `client-NNNN`, and task.
        owners: Whose each held-out example is; empty where they are nobody's.

    Returns:
        `{task: {metric: {mean, sd, worst, worst_client, clients: {client: value}}}}` with `mean` and `sd`
        over the clients, each alike (`sd` None for one); empty where every client has the same model and
        the same examples.
    """
    models = {
        int(name.removeprefix(CLIENT)): found for name, found in outcomes.items() if name.startswith(CLIENT)
    }
    shared = outcomes.get("global")
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for task in next(iter(outcomes.values())):
        own = bool(owners) and task in TASKS and TASKS[task].examples
        clients = sorted(set(owners) if own else models)
        metrics = {name: one for found in outcomes.values() for name, one in found[task].metrics.items()}
        for metric, first in metrics.items():
            values = {}
            for client in clients:
                found = models.get(client, shared)
                if found is None:  # examples of a client whose model was lost
                    continue
                scored = found[task].metrics.get(metric)
                if scored is None:  # none of this model's answers could be scored
                    continue
                part = _of(scored, client, owners) if own else scored
                if part.weights is not None and not any(part.weights):
                    continue  # none of its tokens carries loss
                values[client] = part.value
            if values:
                spread = spread_of(values, lower_is_better=first.lower_is_better)
                result.setdefault(task, {})[metric] = spread
    return result


def spread_of(values: Mapping[int, float], *, lower_is_better: bool) -> dict[str, Any]:
    """What `spread` has of a metric: mean and sd of clients' values, each alike, the worst, and all."""
    worst = (max if lower_is_better else min)(values, key=values.__getitem__)
    return {
        "mean": statistics.fmean(values.values()),
        "sd": statistics.stdev(values.values()) if len(values) > 1 else None,
        "worst": values[worst],
        "worst_client": worst,
        "clients": {str(client): value for client, value in values.items()},
    }


def _of(scored: Scored, client: int, owners: Sequence[int]) -> Scored:
    """The part of a metric that is one client's examples."""
    places = [place for place, owner in enumerate(owners) if owner == client]
    weights = scored.weights
    return replace(
        scored,
        items=[scored.items[place] for place in places],
        weights=None if weights is None else [weights[place] for place in places],
        exact=None,
    )
