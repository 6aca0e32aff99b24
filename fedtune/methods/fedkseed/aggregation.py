"""A round's scalars folded into one change of the accumulator: plainly, or so that bad clients count less.

With n_ij draws of seed j by client i, the sum s_ij of their scalars, and c_i = n_i / Σ n over the clients
that replied:

    mean             Σ_i s_ij c_i                                                        Algorithm 1
    trimmed-mean     (Σ_i c_i n_ij) · mean of s_ij / n_ij with weights c_i n_ij, without the lowest and the
                     highest `trim` of the clients that drew j                           Yin et al. 2018
    median-of-means  (Σ_i c_i n_ij) · median over `groups` groups of clients of
                     Σ s_ij c_i / Σ c_i n_ij of a group                                  Chen et al. 2017

A client is one voice a seed, however often it drew it. Without trimming, and with one group, both are the
mean. They need several clients that drew the same seed: of m clients with τ draws each, m·τ/K drew it on
average while τ is small beside K.

No result depends on the order of arrival: sums are sums of integers, and what is sorted is sorted whole.
Memory: the mean O(K), the median O(K · groups), whatever the cohort; the trimmed mean holds the draws of the
round, 16 bytes each.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedtune.core.cohort import Cohort
from fedtune.core.types import Reply

SUM_LIMIT = 2.0**26  # Σ |ĝ| of a client must stay below it: no sum overflows then, for shares sum to 1
UNIT = 2.0**-36  # a scalar times its client's share is rounded once to a multiple of this


class Aggregator(Protocol):
    """Takes replies one by one and gives the change of the accumulator."""

    def add(self, reply: Reply, seeds: Tensor, scalars: Tensor) -> None:
        """Folds a reply in.

        Args:
            reply: Whose scalars they are.
            seeds: What the client drew, int64 (draws).
            scalars: ĝ of each draw, float64 (draws); together below 2^26.
        """

    def change(self) -> Tensor:
        """What is added to the accumulator, float32 (K)."""


class Mean:
    """Algorithm 1."""

    def __init__(self, size: int, cohort: Cohort) -> None:
        self._sums, self._total, self._weight = _zeros(size), cohort.total_examples, 0

    def add(self, reply: Reply, seeds: Tensor, scalars: Tensor) -> None:
        """See `Aggregator`."""
        self._sums.index_add_(0, seeds, units(scalars, reply.examples / self._total))
        self._weight += reply.examples

    def change(self) -> Tensor:
        """See `Aggregator`."""
        return mean_of(self._sums, self._weight, self._total)


class MedianOfMeans:
    """The median over the means of groups of clients; a client's place in the cohort decides on its group."""

    def __init__(self, size: int, cohort: Cohort, groups: int) -> None:
        groups = min(groups, len(cohort.clients))
        self._group = {client: place % groups for place, client in enumerate(cohort.clients)}
        self._sums, self._draws = _zeros(groups, size), _zeros(groups, size)  # Σ n_i s_ij, Σ n_i n_ij
        self._total, self._weight = cohort.total_examples, 0

    def add(self, reply: Reply, seeds: Tensor, scalars: Tensor) -> None:
        """See `Aggregator`."""
        group = self._group[reply.client]
        self._sums[group].index_add_(0, seeds, units(scalars, reply.examples / self._total))
        self._draws[group].index_add_(0, seeds, torch.full_like(seeds, reply.examples))
        self._weight += reply.examples

    def change(self) -> Tensor:
        """See `Aggregator`."""
        shares = self._draws.double() / self._weight
        means = self._sums.double() * (UNIT * self._total / self._weight) / shares
        ordered = means.sort(dim=0).values  # groups that did not draw a seed are NaN, and come last
        there = (shares > 0).sum(dim=0, keepdim=True)
        low, high = (there - 1).clamp(min=0) // 2, there // 2
        middle = (ordered.gather(0, low) + ordered.gather(0, high)) / 2
        return torch.where(there > 0, middle * shares.sum(dim=0), 0.0)[0].float()


class TrimmedMean:
    """The mean without the share `trim` of the clients at each end, seed by seed."""

    def __init__(self, size: int, cohort: Cohort, trim: float) -> None:
        self._size, self._trim = size, trim
        self._place = {client: place for place, client in enumerate(cohort.clients)}
        self._examples = np.zeros(len(cohort.clients))
        self._cells: list[Tensor] = []  # place · K + seed of each draw
        self._scalars: list[Tensor] = []

    def add(self, reply: Reply, seeds: Tensor, scalars: Tensor) -> None:
        """See `Aggregator`."""
        place = self._place[reply.client]
        self._examples[place] = reply.examples
        self._cells.append(seeds + place * self._size)
        self._scalars.append(scalars)

    def change(self) -> Tensor:
        """See `Aggregator`."""
        # one entry a client and seed that it drew; a client's own draws are summed in its own order
        cells, which, draws = np.unique(torch.cat(self._cells), return_inverse=True, return_counts=True)
        means = np.bincount(which, weights=torch.cat(self._scalars)) / draws
        seeds, weights = cells % self._size, draws * self._examples[cells // self._size]
        order = np.lexsort((cells, means, seeds))
        seeds, means, weights = seeds[order], means[order], weights[order]
        clients = np.bincount(seeds, minlength=self._size)  # that drew a seed
        rank = np.arange(len(seeds)) - (np.cumsum(clients) - clients)[seeds]
        cut = np.floor(self._trim * clients)[seeds]
        kept = (rank >= cut) & (rank < clients[seeds] - cut)  # at least one: trim is below one half
        share = np.bincount(seeds, weights, self._size) / self._examples.sum()
        left = np.bincount(seeds[kept], weights[kept], self._size)
        sums = np.bincount(seeds[kept], (weights * means)[kept], self._size)
        return torch.from_numpy(share * sums / np.where(left > 0, left, 1.0)).float()


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def units(scalars: Tensor, share: float) -> Tensor:
    """Scalars, float64, times a client's share, as whole multiples of `UNIT`."""
    return (scalars * (share / UNIT)).round_().to(torch.int64)


def mean_of(sums: Tensor, weight: int, total: int) -> Tensor:
    """The mean that a sum of `units` stands for, float32; shares were taken of `total`, and `weight` came."""
    return (sums.double() * (UNIT * total / weight)).float()
