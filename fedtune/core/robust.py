"""Means of clients' updates that a few bad clients cannot move as far as they like.

    max_norm      x_i ← x_i · min(1, C / ‖x_i‖)                          Sun et al. 2019     `Bounds`
    median        of each number, over the clients; of an even count the mean of the middle two
                                                                         Yin et al. 2018     `median`
    trimmed-mean  of each number, without the ⌊β n⌋ lowest and highest   Yin et al. 2018     `trimmed_mean`
    krum          the update with the smallest Σ ‖x_i − x_j‖² over its n − f − 2 nearest others; with
                  `keep` above 1 the mean of so many (Multi-Krum)        Blanchard et al. 2017   `krum`

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent"; Yin et al.,
"Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates"; Sun et al., "Can You Really
Backdoor Federated Learning?".

None of the three means knows weights, as in their papers: a client's number of examples is a claim. A bound
on norms leaves the weights as they are. Everything happens on the replies before the server's step, which
stays as it is: of a median or a trimmed mean every reply is given the result, and one of them the whole
weight; of Krum the chosen replies weigh the same and the others nothing.

A fixed bound needs one reply at a time. Everything else needs all of a round: they are gathered, on disk in a
run, and read piece by piece, so that memory is that of a plain mean and of `PIECE` numbers at a time.
No result depends on the order in which replies come: they are taken by client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedtune.core.cohort import most_byzantine, trimmed
from fedtune.core.gathered import Gathered
from fedtune.core.types import Payload, Reply

MeanName = Literal["weighted", "median", "trimmed-mean", "krum"]
Update = Mapping[str, Tensor]
Factors = Mapping[str, float]  # what each update of a reply is multiplied by, by its name

PIECE = 1 << 20  # numbers of all clients together that are in memory at once
MARGIN = 1 - 2.0**-20  # what a bounded norm stays below its bound, against rounding


@dataclass(frozen=True)
class Updates:
    """What of a method's replies is averaged, and how long it is.

    Attributes:
        belongs: The update that a tensor is a part of, by the tensor's name; "" for what is beside it and is
            left as it is. A reply has several where the server takes several means of unlike scale.
        inner: The inner product of two updates, where it is not that of their numbers.
        scaled: An update times a factor, where that is not each number times it.
        vector: Tensors that make up an update as one long vector, of which `inner` is the inner product; of
            the same shapes and in the same order for all clients of a round. None: its tensors by name.
    """

    belongs: Callable[[str], str] = lambda name: "update"
    inner: Callable[[Update, Update], float] | None = None
    scaled: Callable[[Update, float], dict[str, Tensor]] | None = None
    vector: Callable[[Update], Iterable[Tensor]] | None = None

    def vectors(self, tensors: Update) -> dict[str, Iterable[Tensor]]:
        """A reply's updates, each as tensors that make up one long vector."""
        of = self.vector or (lambda update: [update[name] for name in sorted(update)])
        return {part: of(update) for part, update in self.parts(tensors).items()}

    def parts(self, tensors: Update) -> dict[str, dict[str, Tensor]]:
        """A reply's updates by name."""
        found: dict[str, dict[str, Tensor]] = {}
        for name in sorted(tensors):
            if part := self.belongs(name):
                found.setdefault(part, {})[name] = tensors[name]
        return found

    def norms(self, tensors: Update) -> dict[str, float]:
        """The L2 norm of each of a reply's updates."""
        return {part: self._norm(update) for part, update in self.parts(tensors).items()}

    def times(self, tensors: Update, factors: Factors) -> dict[str, Tensor]:
        """A reply's tensors, each update times its factor; of other dtypes than float32 as float32."""
        whole = dict(tensors)
        for part, update in self.parts(tensors).items():
            if factors.get(part, 1.0) != 1.0:
                whole |= (self.scaled or _scaled)(update, factors[part])
        return whole

    def _norm(self, update: Update) -> float:
        if self.inner is not None:
            return math.sqrt(max(0.0, self.inner(update, update)))
        squares = [float(torch.linalg.vector_norm(t.to(torch.float64))) ** 2 for t in update.values()]
        return math.sqrt(math.fsum(squares))


@runtime_checkable
class UpdateMethod(Protocol):
    """A method that says what of its replies is an update."""

    def updates(self) -> Updates:
        """What of a reply changes the model."""


@runtime_checkable
class MeanMethod(UpdateMethod, Protocol):
    """A method whose server takes a mean of its clients' tensors, in whose place another one can be."""

    def mean_refusal(self, mean: MeanName) -> str | None:
        """Why another mean than the weighted one makes no sense with these settings; asked of it too."""

    def bound_refusal(self, *, quantile: bool) -> str | None:
        """Why norms cannot be bounded: by a fixed number, or by a quantile of the round's."""

    def updates(self) -> Updates:
        """What of a reply is averaged."""


def median(rows: Tensor) -> Tensor:
    """The median of each column, float32.

    Args:
        rows: float32 (clients, numbers).
    """
    ordered, n = rows.sort(dim=0).values, len(rows)
    if n % 2:
        return ordered[n // 2]
    return ((ordered[n // 2 - 1].to(torch.float64) + ordered[n // 2].to(torch.float64)) / 2).to(torch.float32)


def trimmed_mean(rows: Tensor, trim: float) -> Tensor:
    """The mean of each column without the lowest and the highest, float32.

    Args:
        rows: float32 (clients, numbers).
        trim: The share that is left out at each end, below one half.
    """
    cut = trimmed(trim, len(rows))
    kept = rows.sort(dim=0).values[cut : len(rows) - cut]
    return kept.to(torch.float64).mean(dim=0).to(torch.float32)


def krum(squares: Sequence[Sequence[float]], byzantine: int, keep: int) -> list[int]:
    """The places of the updates that Krum chooses, best first; of equal scores the first.

    Args:
        squares: ‖x_i − x_j‖² of all pairs.
        byzantine: f. At least 2f + 3 updates are needed.
        keep: How many to choose.
    """
    n = len(squares)
    nearest = n - byzantine - 2
    scores = [
        math.fsum(sorted(square for j, square in enumerate(row) if j != i)[:nearest])
        for i, row in enumerate(squares)
    ]
    return sorted(range(n), key=lambda i: (scores[i], i))[:keep]


def quantile(norms: Iterable[float], share: float) -> float:
    """The smallest of some norms that at least this share of them do not exceed."""
    ordered = sorted(norms)
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def factor(norm: float, bound: float) -> float:
    """What a norm is multiplied by to be at most `bound`; 1 for a shorter one.

    Rounded to 24 bits, so that the order in which a machine sums up a norm changes no bit of the result.
    """
    if norm <= bound:
        return 1.0
    return float(torch.tensor(bound * MARGIN / norm, dtype=torch.float32))


@dataclass(frozen=True)
class RobustMean:
    """Turns a round's replies into those that the server's step makes the robust mean of.

    Attributes:
        updates: What of a reply is averaged.
        gather: Makes the place where replies are kept side by side.
        mean: Which.
        trim: Of a trimmed mean: the share left out at each end.
        byzantine: Of Krum: f; None: as many as its condition allows for the replies that came.
        keep: Of Krum: updates that are chosen.
        max_norm: The largest norm of an update; None: no fixed bound.
        norm_quantile: The share of the round's norms that are not above the bound; None: no such bound.
    """

    updates: Updates
    gather: Callable[[], Gathered]
    mean: MeanName = "weighted"
    trim: float = 0.0
    byzantine: int | None = None
    keep: int = 1
    max_norm: float | None = None
    norm_quantile: float | None = None

    @property
    def gathers(self) -> bool:
        """Whether all replies of a round are needed at once."""
        return self.mean != "weighted" or self.norm_quantile is not None

    def bounded(self, payload: Payload) -> Payload:
        """A reply's content with its update's norm at most `max_norm`."""
        if self.max_norm is None:
            return payload
        norms = self.updates.norms(payload.tensors)
        factors = {part: factor(norm, self.max_norm) for part, norm in norms.items()}
        return Payload(self.updates.times(payload.tensors, factors), payload.scalars)

    def __call__(self, replies: Iterable[Reply]) -> Iterator[Reply]:
        """The replies that the server's step gets, one in memory at a time."""
        if not self.gathers:
            for reply in replies:
                yield replace(reply, payload=self.bounded(reply.payload))
            return
        with self.gather() as gathered:
            norms: dict[int, dict[str, float]] = {}
            for reply in replies:
                if self.max_norm is not None or self.norm_quantile is not None:
                    norms[reply.client] = self.updates.norms(reply.payload.tensors)
                gathered.put(reply)
                del reply  # or the last one would stay in memory
            yield from self._handed_on(gathered, self._factors(norms))

    def _factors(self, norms: Mapping[int, Factors]) -> dict[int, Factors]:
        found: dict[int, dict[str, float]] = {client: {} for client in norms}
        for part in {part for one in norms.values() for part in one}:
            bound = math.inf if self.max_norm is None else self.max_norm
            if self.norm_quantile is not None:
                bound = min(bound, quantile((one[part] for one in norms.values()), self.norm_quantile))
            for client, one in norms.items():
                found[client][part] = factor(one[part], bound)
        return dict(found)

    def _handed_on(self, gathered: Gathered, factors: Mapping[int, Factors]) -> Iterator[Reply]:
        known = gathered.replies()
        if not known:
            return
        weights: Mapping[int, int] | None = None
        result: dict[str, Tensor] = {}
        if self.mean == "krum":
            byzantine = most_byzantine(len(known)) if self.byzantine is None else self.byzantine
            chosen = krum(self._squares(gathered, factors), byzantine, self.keep)
            weights = {client: int(place in chosen) for place, client in enumerate(known)}
        elif self.mean != "weighted":
            result = self._columns(gathered, factors)
            weights = {client: int(place == 0) for place, client in enumerate(known)}
        for client, reply in known.items():
            cohort = reply.cohort
            if weights is not None:
                weighing = {asked: weights.get(asked, 0) for asked in cohort.clients}
                cohort = replace(cohort, examples=weighing)
            own = gathered.whole(client, without=result)
            tensors = self.updates.times(own, factors.get(client, {})) | result
            yield Reply(client, Payload(tensors, reply.payload.scalars), reply.metrics, cohort)

    def _rows(self, gathered: Gathered, factors: Mapping[int, Factors], name: str) -> Iterator[Tensor]:
        """A tensor of all clients, float32 (clients, numbers), in pieces, by client."""
        known = gathered.replies()
        size = math.prod(gathered.shapes(next(iter(known)))[name])
        piece, part = max(1, PIECE // len(known)), self.updates.belongs(name)
        for start in range(0, size, piece):
            end = min(size, start + piece)
            rows = []
            for client in known:
                row = gathered.read(client, name, start, end).to(torch.float32)
                times = factors.get(client, {}).get(part, 1.0)
                rows.append(row if times == 1.0 else row * times)
            yield torch.stack(rows)

    def _columns(self, gathered: Gathered, factors: Mapping[int, Factors]) -> dict[str, Tensor]:
        """The mean of each number by itself."""
        found = {}
        for name, shape in gathered.shapes(next(iter(gathered.replies()))).items():
            if not self.updates.belongs(name):
                continue
            pieces = [
                median(rows) if self.mean == "median" else trimmed_mean(rows, self.trim)
                for rows in self._rows(gathered, factors, name)
            ]
            found[name] = torch.cat(pieces).reshape(shape) if pieces else torch.zeros(shape)
        return found

    def _squares(self, gathered: Gathered, factors: Mapping[int, Factors]) -> list[list[float]]:
        """‖x_i − x_j‖² of all pairs of updates."""
        clients = list(gathered.replies())
        n, inner = len(clients), self.updates.inner
        squares = [[0.0] * n for _ in clients]
        if inner is not None:
            products = [[0.0] * n for _ in clients]
            for i in range(n):
                one = self._update(gathered, factors, clients[i])
                for j in range(i, n):
                    products[i][j] = inner(one, self._update(gathered, factors, clients[j]))
            for i in range(n):
                for j in range(i + 1, n):
                    square = products[i][i] + products[j][j] - 2 * products[i][j]
                    squares[i][j] = squares[j][i] = max(0.0, square)
            return squares
        for name in gathered.shapes(clients[0]):
            if not self.updates.belongs(name):
                continue
            for rows in self._rows(gathered, factors, name):
                wide = rows.to(torch.float64)
                for i in range(n - 1):
                    apart = (wide[i + 1 :] - wide[i]).square().sum(dim=1).tolist()
                    for j, square in enumerate(apart, start=i + 1):
                        squares[i][j] += square
                        squares[j][i] = squares[i][j]
        return squares

    def _update(self, gathered: Gathered, factors: Mapping[int, Factors], client: int) -> dict[str, Tensor]:
        tensors = self.updates.times(gathered.whole(client), factors.get(client, {}))
        return {name: tensor for name, tensor in tensors.items() if self.updates.belongs(name)}


def _scaled(update: Update, times: float) -> dict[str, Tensor]:
    return {name: tensor.to(torch.float32) * times for name, tensor in update.items()}
