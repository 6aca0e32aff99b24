"""A round whose server gets a sum: with noise on it (privacy), under masks (secure aggregation), or both.

A client's part of the sum is what its method would add up for it (`SumMethod.summand`), as integers in one
vector. Without privacy clients are weighted by examples, as in any other round, and the sum has the same
bits. With privacy all weigh the same, and the sum is divided by the number of clients asked (on average,
where chance decides), not of those that replied: who drops out counts as one whose update is zero, so what a
client can change does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedtune.core.loop import RoundOutcome
from fedtune.core.privacy import add_noise_, clip_
from fedtune.core.protection import Privacy, SecureAggregation, threshold_of
from fedtune.core.types import Cohort, Order, Payload, Reply, Summed, SumMethod

S = TypeVar("S")
Shapes = Mapping[str, tuple[int, ...]]

LOSS_UNIT = 2.0**-24  # what 1 stands for in the sum of the clients' training losses


@dataclass(frozen=True)
class Share:
    """A client's part of a cohort: weight / total; and the federation's size."""

    weight: int
    total: int
    population: int

    @staticmethod
    def of_tensor(tensor: Tensor) -> Share:
        """What `as_tensor` gave."""
        weight, total, population = tensor.tolist()
        return Share(weight, total, population)

    def as_tensor(self) -> Tensor:
        """For an order, int64 (3)."""
        return torch.tensor([self.weight, self.total, self.population])

    def summand(self, method: SumMethod[Any], payload: Payload, shapes: Shapes) -> dict[str, Tensor]:
        """What a reply with this share adds to the sum."""
        return method.summand(
            payload, weight=self.weight, total=self.total, population=self.population, shapes=shapes
        )

    def clip(self, privacy: Privacy, unit: float) -> float:
        """The largest norm of a summand, in units."""
        return privacy.clip * self.weight / self.total / unit


@dataclass(frozen=True)
class Summing:
    """How the rounds of a run are summed. At least one of the two settings is there."""

    method: SumMethod[Any]
    secure: SecureAggregation | None
    privacy: Privacy | None

    def shares(self, cohort: Cohort) -> dict[int, Share]:
        """Of each client of a cohort."""
        if self.privacy is None:
            total = cohort.total_examples
            return {c: Share(cohort.examples[c], total, cohort.population) for c in cohort.clients}
        return dict.fromkeys(cohort.clients, Share(1, _divisor(cohort), cohort.population))

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
        whole = Share(1, _divisor(cohort), cohort.population).clip(self.privacy, unit)
        add_noise_(total, self.privacy.noise_multiplier * whole)
        return self._finish(state, total, cohort, outcome)

    def secure_step(
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
        from fedtune.core.secure_server import SecureRound  # cryptography only where it is used

        assert self.secure is not None
        shapes = self.method.sum_shapes(state)
        secure = SecureRound(
            outcome,
            ask,
            threshold=threshold_of(self.secure, len(cohort.clients)),
            quorum=quorum,
            bits=self.secure.bits,
        )
        with_loss = self.privacy is None
        total = secure.run(
            orders,
            shares=self.shares(cohort),
            shapes=shapes,
            length=length(shapes) + with_loss,
            on_arrival=lambda: on_arrival(state, outcome),
        )
        if with_loss:
            weight = sum(cohort.examples[client] for client in outcome.clients)
            outcome.totals["train_loss"] = float(total[-1]) * LOSS_UNIT * cohort.total_examples / weight
            total = total[:-1]
        return self._finish(state, total, cohort, outcome)

    def _finish(self, state: S, vector: Tensor, cohort: Cohort, outcome: RoundOutcome) -> S:
        sums = unflatten(vector, self.method.sum_shapes(state))
        if self.privacy is None:
            weight, total = sum(cohort.examples[c] for c in outcome.clients), cohort.total_examples
        else:
            weight = total = _divisor(cohort)
        clients = tuple(outcome.clients)
        return self.method.sum_step(state, Summed(sums, weight, total, clients, cohort.population))


def length(shapes: Shapes) -> int:
    """Numbers of a vector of these tensors."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def flatten(tensors: Mapping[str, Tensor], shapes: Shapes) -> Tensor:
    """Tensors as one vector, by name.

    Raises:
        ValueError: They are not those of `shapes`.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != dict(shapes):
        raise ValueError(f"a sum of {dict(shapes)} was asked for, and there is {found}")
    return torch.cat([tensors[name].reshape(-1) for name in sorted(shapes)])


def unflatten(vector: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """What `flatten` made one."""
    names = sorted(shapes)
    parts = vector.split([torch.Size(shapes[name]).numel() for name in names])
    return {name: part.reshape(shapes[name]) for name, part in zip(names, parts, strict=True)}


def _divisor(cohort: Cohort) -> int:
    return cohort.expected if cohort.expected is not None else len(cohort.clients)
