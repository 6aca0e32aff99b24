"""A round whose server gets a sum: with noise on it (privacy), under masks (secure aggregation), or both.

A client's part of the sum is what its method would add up for it (`SumMethod.summand`), as integers in one
vector. Without privacy clients are weighted by examples, as in any other round, and the sum has the same
bits. With privacy all weigh the same, and the sum is divided by the number of clients asked (on average,
where chance decides), not of those that replied: who drops out counts as one whose update is zero, so what a
client can change does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedtune.core.cohort import Cohort, RoundOutcome
from fedtune.core.types import Order, Reply, Summed, SumMethod
from fedtune.protection.noise import add_noise_, clip_
from fedtune.protection.settings import Privacy, SecureAggregation, threshold_of
from fedtune.protection.share import LOSS_NUMBERS, CohortShare, flatten, length, mean_loss, unflatten

S = TypeVar("S")


@dataclass(frozen=True)
class Summing:
    """How the rounds of a run are summed. At least one of the two settings is there."""

    method: SumMethod[Any]
    secure: SecureAggregation | None
    privacy: Privacy | None

    @property
    def in_phases(self) -> bool:
        """Whether a round takes several exchanges: under masks it does."""
        return self.secure is not None

    def shares(self, cohort: Cohort) -> dict[int, CohortShare]:
        """Of each client of a cohort."""
        if self.privacy is None:
            total = cohort.total_examples
            return {c: CohortShare(cohort.examples[c], total, cohort.population) for c in cohort.clients}
        return dict.fromkeys(cohort.clients, CohortShare(1, _divisor(cohort), cohort.population))

    def step(self, state: S, replies: Iterable[Reply], *, cohort: Cohort, outcome: RoundOutcome) -> S:
        """The server's step of a round with privacy alone: clips and sums what it got, and adds the noise."""
        assert self.privacy is not None
        shapes, unit = self.method.sum_shapes(state), self.method.unit
        shares, total = self.shares(cohort), torch.zeros(length(shapes), dtype=torch.int64)
        for reply in replies:
            share = shares[reply.client]
            vector = flatten(share.summand(self.method, reply.payload, shapes), shapes)
            total += clip_(vector, share.clip(self.privacy, unit))
            outcome.metrics[reply.client] = {}  # a mean of losses without noise would tell what ε must not
        whole = CohortShare(1, _divisor(cohort), cohort.population).clip(self.privacy, unit)
        add_noise_(total, self.privacy.noise_multiplier * whole)
        return self._finish(state, total, cohort, outcome)

    def phased_step(
        self,
        state: S,
        orders: Iterable[Order],
        *,
        cohort: Cohort,
        outcome: RoundOutcome,
        quorum: int,
        ask: Callable[[Iterable[Order]], Iterator[Reply]],
        on_arrival: Callable[[S, RoundOutcome], None],
    ) -> S:
        """The server's step of a round under masks.

        Raises:
            QuorumError: Too few clients stayed to the end of a phase; nothing was unmasked.
        """
        from fedtune.protection.secure_server import SecureRound  # cryptography only where it is used

        assert self.secure is not None
        shapes = self.method.sum_shapes(state)
        secure = SecureRound(
            outcome,
            ask,
            threshold=threshold_of(self.secure, len(cohort.clients)),
            quorum=quorum,
            bits=self.secure.bits,
        )
        loss_numbers = LOSS_NUMBERS if self.privacy is None else 0
        total = secure.run(
            orders,
            shares=self.shares(cohort),
            shapes=shapes,
            length=length(shapes) + loss_numbers,
            on_arrival=lambda: on_arrival(state, outcome),
        )
        if loss_numbers:
            loss = mean_loss(total[-loss_numbers:], cohort.total_examples)
            outcome.totals |= {} if loss is None else {"train_loss": loss}
            total = total[:-loss_numbers]
        return self._finish(state, total, cohort, outcome)

    def _finish(self, state: S, vector: Tensor, cohort: Cohort, outcome: RoundOutcome) -> S:
        sums = unflatten(vector, self.method.sum_shapes(state))
        if self.privacy is None:
            weight, total = sum(cohort.examples[c] for c in outcome.clients), cohort.total_examples
        else:
            weight = total = _divisor(cohort)
        clients = tuple(outcome.clients)
        return self.method.sum_step(state, Summed(sums, weight, total, clients, cohort.population))


def _divisor(cohort: Cohort) -> int:
    return cohort.expected if cohort.expected is not None else len(cohort.clients)
