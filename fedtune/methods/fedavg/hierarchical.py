"""Hierarchical means: clients send to the server of their region, and regions to the server.

Liu, Zhang, Song and Letaief, "Client-Edge-Cloud Hierarchical Federated Learning" (2020), Algorithm 1. Between
two means of all, each region r takes κ rounds of its own, from w_r = w:

    w_r ← w_r + Σ n_i Δ_i / n_r, over the clients of the region                              `advanced`
    w   ← server(w, Σ n_r (w_r − w) / n), after κ rounds, over the regions

A round here is one of the regions; κ of them make one of the server. With κ = 1 a region sends on the sum
that it has, as integers, and the server's mean is that of a federation without regions, to the bit. With more
it sends its update, float32. Regions are simulated: their servers are in the run's own state, and what they
would send and get is in the ledger as it would cross the wire (`relayed`).

Deviation: n_r counts what a region's clients trained on in the κ rounds, so that one who was away in some of
them counts less (in the paper all take part in every round, which comes to the same).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedtune.core.aggregate import WeightedSum
from fedtune.core.cohort import Cohort
from fedtune.core.relaying import Relayed
from fedtune.core.types import Payload, Reply
from fedtune.methods.fedavg.lora_aggregation import pad
from fedtune.methods.fedavg.settings import Regions
from fedtune.methods.fedavg.state import State


def region_of(client: int, regions: Regions) -> int:
    """The region of a client."""
    return regions.of[client % len(regions.of)]


def advanced(
    state: State,
    replies: Iterable[Reply],
    regions: Regions,
    advance: Callable[[State, WeightedSum], State],
) -> State:
    """The state after a round of the regions, and of the server's where κ are over.

    Memory: one sum of 8 bytes a parameter for each region, and with κ > 1 its weights.

    Args:
        state: The server's and the regions'.
        replies: Of clients.
        regions: κ, and who belongs where.
        advance: The server's step, from a sum.
    """
    sums, tuned = dict[int, WeightedSum](), False
    for reply in replies:
        if not reply.payload.tensors:  # of a client's own model, which stays where it is
            tuned = True
            continue
        region = region_of(reply.client, regions)
        before = sums.get(region) or WeightedSum.empty(reply.cohort.total_examples)
        sums[region] = before.add(pad(reply.payload.tensors, state.weights), reply.examples)
        del reply  # not in memory beside the next one
    if not sums:
        if tuned:
            return state
        raise ValueError("no client replied: there is nothing to average")
    steps = state.steps + 1
    if regions.rounds == 1:
        return replace(advance(state, _joined(sums.values())), steps=steps)
    versions, taken = dict(state.versions), dict(state.taken)
    for region, total in sums.items():
        for name, weight in state.weights.items():
            begun = versions.get(f"{region}/{name}", weight)
            versions[f"{region}/{name}"] = begun + total.mean(name)
        taken[str(region)] = taken.get(str(region), 0) + total.weight
    if steps % regions.rounds:
        return replace(state, steps=steps, versions=versions, taken=taken)
    whole = WeightedSum.empty(sum(taken.values()))
    for number, examples in taken.items():
        update = {name: versions[f"{number}/{name}"] - w for name, w in state.weights.items()}
        whole = whole.add(update, examples)
    return replace(advance(state, whole), steps=steps, versions={}, taken={})


def passed(state: State, regions: Regions, clients: Iterable[int]) -> State:
    """The state after a round of so many clients, as far as later messages depend on it."""
    steps, there = state.steps + 1, {str(region_of(client, regions)): 1 for client in clients}
    return replace(state, steps=steps, taken={**state.taken, **there} if steps % regions.rounds else {})


def _joined(sums: Iterable[WeightedSum]) -> WeightedSum:
    """What all of them are together; their integers are on one scale. The first is updated in place."""
    first, *others = sums
    for other in others:
        for name, tensor in other.sums.items():
            first.sums[name].add_(tensor)
    return WeightedSum(first.total, first.weight + sum(other.weight for other in others), first.sums)


def relayed(
    state: State, sent: Mapping[str, Tensor], regions: Regions, cohort: Cohort, replied: Sequence[int]
) -> Iterator[Relayed]:
    """What crosses between the server and the regions in a round, in shape: numbers do not change its bytes.

    All regions get the weights when κ rounds begin; who has something to send then sends it when they end.

    Args:
        state: Before the round.
        sent: The global weights as they are sent.
        regions: κ, and who belongs where.
        cohort: The round's.
        replied: The clients who answered.
    """
    place = state.steps % regions.rounds
    if place == 0:
        there = {region_of(client, regions) for client in range(cohort.population)}
        yield from (Relayed(region, "down", Payload(sent)) for region in sorted(there))
    if place == regions.rounds - 1:
        dtype = torch.int64 if regions.rounds == 1 else torch.float32
        update = {n: torch.empty(w.shape, dtype=dtype, device="meta") for n, w in state.weights.items()}
        spoke = {region_of(client, regions) for client in replied} | set(map(int, state.taken))
        for region in sorted(spoke):
            yield Relayed(region, "up", Payload(update, {"examples": 1}))
