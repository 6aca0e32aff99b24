"""DeComFL: the clients of a round try the same directions, so that scalars alone cross the wire, both ways.

Li et al., "Achieving Dimension-Free Communication in Federated Learning via Zeroth-Order Optimization"
(2024): `infinite-pool` with `download: means`. With τ local steps of P directions each, in round r:

    s_r^{k,p}, the same for all clients of the round                               `directions`
    ĝ_i^{k,p} = slope of client i's loss along z(s_r^{k,p})                        infinite_pool.py
    x ← x − η/P Σ_p ĝ_i^{k,p} z(s_r^{k,p}), k = 1 … τ, from x_r; then back to x_r  infinite_pool.py
    ḡ_r^{k,p} = Σ_i c_i ĝ_i^{k,p}                                                  `mean`
    x_{r+1} = x_r − η/P Σ_k Σ_p ḡ_r^{k,p} z(s_r^{k,p})                             `rebuild`

A client sends its τ P slopes and is sent the means of the rounds that it lacks; server and clients both
rebuild x from w0 and all means. A round is a pass over the weights, where FedKSeed takes one for all of them.

Deviations: seeds do not travel but follow from the run's, which an order names, and the round; slopes are
central differences, as FedKSeed's are (the paper's look one way: P + 1 passes a step for 2 P here); clients
are weighted by their examples, as everywhere (the paper's even mean is `federation.weights: equal`); a client
keeps the means, and no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedtune.core.seeds import derive_seed
from fedtune.core.types import Reply
from fedtune.methods.fedkseed.aggregation import Mean
from fedtune.zeroth import SeedPool, rebuild_all_
from fedtune.zeroth.pool import Noise


def directions(key: int, round: int, count: int, noise: Noise) -> SeedPool:
    """The directions of a round, in the order in which every client tries them.

    Args:
        key: The run's.
        round: Counted from 1.
        count: τ P.
        noise: Its kind.
    """
    return SeedPool(derive_seed(key, "round", round) & 0x7FFFFFFF, count, noise)


def mean(replies: Iterable[Reply], count: int) -> tuple[Tensor, list[int]]:
    """A round's means, float32 (τ P), which do not depend on the order of replies, and who replied.

    Args:
        replies: With `scalars`, float32 (τ P).
        count: τ P.
    """
    total, clients, each = None, list[int](), torch.arange(count)
    for reply in replies:
        total = total or Mean(count, reply.cohort)
        total.add(reply, each, reply.payload.tensors["scalars"].double())
        clients.append(reply.client)
    if total is None:
        raise ValueError("no client replied: there is nothing to average")
    return total.change(), clients


def rebuild(
    weights: Mapping[str, Tensor], means: Tensor, key: int, count: int, rate: float, noise: Noise
) -> None:
    """Takes the steps of all rounds, in place.

    Args:
        weights: w0, by name.
        means: Of all rounds, float32 (rounds · τ P).
        key: As of `directions`.
        count: τ P.
        rate: η / P.
        noise: As of `directions`.
    """
    for place, part in enumerate(means.split(count) if len(means) else ()):
        rebuild_all_(weights, weights, directions(key, place + 1, count, noise), part.double() * -rate)
