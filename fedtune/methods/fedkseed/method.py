"""FedKSeed and FedKSeed-Pro: full-parameter tuning with two forward passes a step and K shared seeds.

Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost
under 18 Kilobytes" (2024). Lines of its Algorithm 1:

    2, 10   ψ_j = mean |ĝ| of seed j;  p = softmax(min-max(ψ))   Eq. 13, 14  `probabilities` (Pro)
    5       who gets the accumulator, and p                                  `plan`
    12      w = w0 − η Σ_j a_j z_j                               Eq. 4       `client_step`, step.py
    14      x of the client's examples, s_j of the K seeds                   `client_step`, `draw`
    15      ĝ = (L(w + ε z_j; x) − L(w − ε z_j; x)) / 2ε         Eq. 5       `client_step`
    16, 21  w ← w − η ĝ z_j                                      Eq. 6       `client_step`, step.py
    17, 19  pairs of seed and ĝ, to the server                               `reply`
    6, 7    a_j ← a_j + Σ_i c_i Σ ĝ,  c_i = n_i / Σ n            Eq. 7       `server_step`, aggregation.py

n is summed over those that replied. `export` is Eq. 4 once more, with the last accumulator.
The server holds K numbers and no model. What crosses the wire: down the accumulator (and p), or for a client
that replied in the round before only the entries that changed since; up the drawn seeds with their scalars,
or the dense K sums where those are smaller. Each order names w0 and the pool (order.py).

Deviations: noise is a function of (pool key, parameter name, element, seed index) instead of a serial
generator's draws (`zeroth/`), so that unlike devices rebuild the same bits; seeds are pool indices. ψ of a
seed that was never drawn is the mean over those that were (the paper leaves it open). A client's weights are
formed from w0 anew in every forward pass, but for other noise than `hadamard4` in float32 (step.py).
Scalars can be clipped, and folded in by a robust mean, unlike the paper's. Appendix B.2: gossip.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.core.cohort import Cohort
from fedtune.core.robust import MeanName, Updates
from fedtune.core.seeds import derive_seed
from fedtune.core.types import (
    ArrivalOrder,
    ClientEnv,
    ClientError,
    ClientResult,
    Order,
    Payload,
    Reply,
    Scalar,
    ServerEnv,
    Summed,
    TensorSpec,
)
from fedtune.data.batches import collate, endless_batches, on_device
from fedtune.errors import InputError
from fedtune.methods.fedkseed.aggregation import (
    SUM_LIMIT,
    UNIT,
    Aggregator,
    Mean,
    MedianOfMeans,
    TrimmedMean,
    mean_of,
    units,
)
from fedtune.methods.fedkseed.gossip import LIMIT, Message, Relay, mixed, unpacked
from fedtune.methods.fedkseed.order import Fingerprint, Origin, changes, checksum, with_changes
from fedtune.methods.fedkseed.resolution import given, not_finite, scale_of, warn_where_rounded
from fedtune.methods.fedkseed.settings import SUBSPACES, Config
from fedtune.methods.fedkseed.state import State
from fedtune.methods.fedkseed.step import coefficients, refuse_narrow, refuse_on_a_gpu, step_weights
from fedtune.methods.step_loss import TokenMean, form_of, trained_tokens
from fedtune.models.on_disk import kept_on_disk
from fedtune.models.tuning import train_all, trainable
from fedtune.zeroth import NOISE_VERSION, SeedPool, rebuild_all_

log = logging.getLogger("fedtune")


class FedKSeed:
    """FedKSeed, and FedKSeed-Pro; see the module's text."""

    pools_data = False
    uses_wire = True
    saves_merged = False
    sends_model = False
    arrival: ArrivalOrder = "any-order"
    unit = UNIT

    def __init__(self, config: Config, seed: int) -> None:
        self.config = config
        self.rounds = config.rounds
        self.pro = config.name == "fedkseed-pro"
        self.pool_key = derive_seed(seed, "pool") & 0x7FFFFFFF  # 4 bytes: the paper's seed of seeds
        self._w0 = Fingerprint()
        self._drawn = config.local_steps * config.perturbations  # seeds that a client draws in a round
        # indices are signed on the wire; the paper takes 4 bytes for each
        self._index = torch.int16 if config.seeds <= 2**15 else torch.int32
        self._relay = Relay(config, derive_seed(seed, "peers"), self._message) if config.graph else None
        self._seen = False  # whether slopes were looked at in this process

    def prepare(self, server: ServerEnv) -> None:
        """The server needs nothing besides its state."""
        server.refuse_public(self.config.name)

    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The whole model, all of it tuned; evaluation mode, no gradients are ever needed."""
        model = train_all(build())  # type: ignore[arg-type]
        refuse_on_a_gpu(trainable(model), self.config.noise)
        if self.config.noise in SUBSPACES:
            refuse_narrow(trainable(model), f"noise: {self.config.noise}", "noise: hadamard4")
        return model.eval()

    def init(self, model: nn.Module) -> State:
        """An accumulator of zeros: the model is w0, on which `epsilon: auto` is measured."""
        zeros = torch.zeros(self.config.seeds)
        origin = self._origin(model).as_mapping()
        epsilon = scale_of(self.config.epsilon, model, self._pool())
        return State(origin, zeros, zeros, zeros.double(), zeros.to(torch.int64), epsilon=epsilon)

    def plan(self, state: State, round: int, cohort: Cohort) -> Iterator[Order]:
        """The accumulator whole, or what changed in it for those who hold the one before."""
        fixed = {"origin": Origin(**state.origin).as_tensor()}  # type: ignore[arg-type]
        if self.pro:
            fixed["probability"] = self.probabilities(state)
        more: dict[str, Scalar] = {"epsilon": state.epsilon} if self.config.epsilon == "auto" else {}
        if self._relay is not None:
            for client, sent, own in self._relay.orders(state, cohort.clients):
                yield Order(
                    client, Payload({**fixed, **sent}, {"crc32": checksum(own), **more}), self._expects()
                )
            return
        scalars: dict[str, Scalar] = {"crc32": checksum(state.accumulator), **more}
        whole = Payload({**fixed, "accumulator": state.accumulator}, scalars)
        changed = changes(state.before, state.accumulator)
        part = whole if changed is None else Payload({**fixed, **changed}, scalars)
        for client in cohort.clients:
            yield Order(client, part if str(client) in state.holders else whole, self._expects())

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        """τ local steps from the rebuilt global model; the reply is what was drawn and its scalars."""
        config = self.config
        refused = Origin.of_tensor(job.tensors["origin"]).against(self._origin(env.model).as_mapping())
        if refused:
            raise ClientError(f"the order is for {refused}")
        received = self._received(job, env)
        pool, epsilon = self._pool(), given(config.epsilon, job)
        if not self._seen:
            self._seen = True
            warn_where_rounded(env, pool, received, config, epsilon)
        draws = self.draw(job, env.generator("seeds"))
        batches = endless_batches(len(env.rows), config.batch_size, env.generator("batches"), env.lengths)
        scalars, loss = list[float](), TokenMean()
        with step_weights(env.model, pool, received, config.lr) as weights:  # line 12
            for step in range(config.local_steps):
                env.stepped(step, config.local_steps)
                batch = collate([env.rows[i] for i in next(batches)], env.pad_id)
                tokens = trained_tokens(env.model, batch)
                if not tokens:  # no loss to compare: the slope is 0
                    scalars += [0.0] * config.perturbations
                    continue
                moved, estimates, around = on_device(batch, env.device), [], 0.0
                with env.memory.step(batch["input_ids"].numel(), [env.model], like=form_of(batch, tokens)):
                    for j in draws[step * config.perturbations : (step + 1) * config.perturbations]:
                        plus = weights.loss(moved, j, epsilon, batch["labels"])
                        minus = weights.loss(moved, j, -epsilon, batch["labels"])
                        scalar = (plus - minus) / (2 * epsilon)  # line 15
                        scalar = float(np.float32(scalar))  # as it is sent
                        if not math.isfinite(scalar):
                            raise not_finite(plus, minus, step, env.model)
                        estimates.append((j, scalar))
                        around += (plus + minus) / 2
                    weights.update([(j, g / config.perturbations) for j, g in estimates])  # line 16
                scalars += [g for _, g in estimates]
                loss.add(around / config.perturbations, tokens, batch)
        metrics = {name: round(value, 6) for name, value in loss.metrics.items()}
        metrics |= {"steps": config.local_steps}
        reply, kept = self.reply(draws, scalars), {"accumulator": received}
        if self._relay is not None:
            reply = Payload({**kept, **reply.tensors})
        return ClientResult(reply, metrics, state=reply if self._relay else Payload(kept))

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        """Adds the clients' scalars to the accumulator, seed by seed."""
        if self._relay is not None:
            return self._relay.stepped(state, replies)
        aggregator: Aggregator | None = None
        magnitude, draws, holders, clipped = state.magnitude.clone(), state.draws.clone(), {}, {}
        limit = self.config.clip
        for reply in replies:
            aggregator = aggregator or self._aggregator(reply.cohort)
            seeds, scalars = self._drawn_by(reply.payload)
            if limit is not None:
                clipped[reply.client] = int((scalars.abs() > limit).sum())
                scalars = scalars.clamp(-limit, limit)
            aggregator.add(reply, seeds, scalars / self.config.perturbations)  # line 7
            if self.pro:
                magnitude.index_add_(0, seeds, scalars.abs())
                draws.index_add_(0, seeds, torch.ones_like(seeds))
            holders[str(reply.client)] = True
        if aggregator is None:
            raise ValueError("no client replied: there is nothing to add")
        if any(clipped.values()):
            named = ", ".join(f"client {client}: {n}" for client, n in sorted(clipped.items()) if n)
            log.warning("scalars cut to ±%g, of %d each: %s", self.config.clip, self._drawn, named)
        return replace(
            state,
            accumulator=state.accumulator + aggregator.change(),
            before=state.accumulator,
            magnitude=magnitude,
            draws=draws,
            holders=holders,
        )

    def sum_refusal(self, *, privacy: bool) -> str | None:
        """Whatever looks at single scalars needs more than their sum."""
        if self.pro:
            return "it counts how often each seed was drawn and how large its scalars were; take fedkseed"
        if self.config.graph:
            return f"graph: {self.config.graph} has no server, and peers need each neighbour's scalars"
        for name in ("clip", "scalar_limit"):
            if getattr(self.config, name) is not None:
                return f"{name} looks at each client's scalars"
        if self.config.aggregation != "mean":
            return f"aggregation: {self.config.aggregation} compares the clients' scalars; take mean"
        return None

    def mean_refusal(self, mean: MeanName) -> str | None:
        """Its own robust means go by the clients that drew a seed; few draw the same."""
        if mean == "weighted":
            return None
        if self.config.graph:
            return f"graph: {self.config.graph} has no server that could take it"
        return (
            "clients draw seeds of their own, and what few of them drew has no other numbers beside it; "
            "method.aggregation has means that go by who drew a seed: trimmed-mean and median-of-means"
        )

    def bound_refusal(self, *, quantile: bool) -> str | None:
        """A client's K sums have a norm like any other update; without a server nobody bounds it."""
        return f"graph: {self.config.graph} has no server that could hold it" if self.config.graph else None

    def updates(self) -> Updates:
        """The K sums of a client's scalars; the noise of two seeds is orthogonal but for chance."""
        return Updates(
            lambda name: "update",
            lambda one, other: float(self._sums(one) @ self._sums(other)),
            lambda update, times: {n: t if n == "seeds" else t * times for n, t in update.items()},
            lambda update: [self._sums(update)],
        )

    def _sums(self, update: Mapping[str, Tensor]) -> Tensor:
        seeds, scalars = self._drawn_by(Payload(update))
        return torch.zeros(self.config.seeds, dtype=torch.float64).index_add_(0, seeds, scalars)

    def sum_shapes(self, state: State) -> dict[str, tuple[int, ...]]:
        """The accumulator's."""
        return {"accumulator": (self.config.seeds,)}

    def summand(
        self,
        payload: Payload,
        *,
        weight: int,
        total: int,
        population: int,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Tensor]:
        """The integers that the mean of Algorithm 1 would add up for this reply."""
        seeds, scalars = self._drawn_by(payload)
        sizes = torch.zeros(self.config.seeds, dtype=torch.float64).index_add_(0, seeds, scalars.abs())
        if not float(sizes.max()) < SUM_LIMIT:
            raise ValueError(f"the scalars of one seed sum to {SUM_LIMIT:,.0f} or more")
        added = torch.zeros(self.config.seeds, dtype=torch.int64)
        share = units(scalars / self.config.perturbations, weight / total)
        return {"accumulator": added.index_add_(0, seeds, share)}

    def sum_step(self, state: State, total: Summed) -> State:
        """The step that `server_step` makes, from the sum."""
        return replace(
            state,
            accumulator=state.accumulator + mean_of(total.sums["accumulator"], total.weight, total.total),
            before=state.accumulator,
            holders={str(client): True for client in total.clients},
        )

    def export(self, state: State, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The global model of Eq. 4, or with `graph` each peer's, in `model` for as long as it is looked at.

        Raises:
            InputError: The state belongs to other weights or another pool.
        """
        refused = Origin(**state.origin).against(self._origin(model).as_mapping())  # type: ignore[arg-type]
        if refused:
            raise InputError(f"the run's state is for {refused}")
        pool, parameters = self._pool(), trainable(model)
        peers = {f"client-{int(client):04d}": a for client, a in state.peers.items()}
        for name, accumulator in sorted(peers.items()) or [("global", state.accumulator)]:
            with kept_on_disk(parameters):
                weights = {name: parameter.data for name, parameter in parameters.items()}
                rebuild_all_(weights, weights, pool, coefficients(accumulator, self.config.lr))
                yield name, model

    def probabilities(self, state: State) -> Tensor:
        """The p of Eq. 14, float32 (K); uniform until something was drawn or while ψ does not vary."""
        return state.probabilities()

    def told(self, state: State) -> dict[str, Any]:
        """For a round's line: with Pro, how the probabilities are spread over the seeds (Figure 3)."""
        return {"seeds": state.spread()} if self.pro else {}

    def _pool(self) -> SeedPool:
        return SeedPool(self.pool_key, self.config.seeds, self.config.noise)

    def _origin(self, model: nn.Module) -> Origin:
        """What an accumulator of this method and model belongs to."""
        return Origin(self._w0.of(model), self.pool_key, self.config.seeds, self.config.noise, NOISE_VERSION)

    def _received(self, job: Payload, env: ClientEnv) -> Tensor:
        """The accumulator that the order stands for."""
        if "accumulator" in job.tensors:
            received = job.tensors["accumulator"]
        elif env.state is None:
            raise ClientError("it was sent changes only, but holds no accumulator any more")
        elif "shares" in job.tensors:
            own, others = self._message(env.state.tensors), [self._message(m) for m in unpacked(job)]
            received = mixed(own, others, job.tensors["shares"].tolist())
        else:
            received = with_changes(env.state.tensors["accumulator"], job.tensors)
        if received.shape != (self.config.seeds,) or checksum(received) != job.scalars["crc32"]:
            raise ClientError("its accumulator is not the server's, whose checksum is another")
        return received

    def draw(self, job: Payload, generator: torch.Generator) -> list[int]:
        """The seeds of all steps of a client's round, from its own stream of the purpose "seeds".

        Raises:
            ClientError: The order's probabilities (Pro) are none.
        """
        if not self.pro:
            return torch.randint(self.config.seeds, (self._drawn,), generator=generator).tolist()
        p = job.tensors["probability"].double()
        if p.shape != (self.config.seeds,) or not bool(torch.isfinite(p).all()) or bool((p < 0).any()):
            raise ClientError(
                f"the probabilities it got are not {self.config.seeds} finite numbers of 0 or more"
            )
        if abs(float(p.sum()) - 1) > 1e-3:
            raise ClientError(f"the probabilities it got sum to {float(p.sum()):.4f} and not to 1")
        return torch.multinomial(p, self._drawn, replacement=True, generator=generator).tolist()

    def _sends_pairs(self) -> bool:
        """Pairs, or the dense sums of 4K bytes where those are smaller and nobody needs each scalar."""
        needed = self.pro or self.config.clip is not None or self.config.aggregation != "mean"
        return needed or (self._index.itemsize + 4) * self._drawn <= 4 * self.config.seeds

    def _expects(self) -> Mapping[str, TensorSpec]:
        count, limit = self._drawn, self.config.scalar_limit or SUM_LIMIT
        size = (self.config.seeds,)
        beside = {"accumulator": TensorSpec(torch.float32, size, LIMIT)} if self._relay else {}
        if not self._sends_pairs():
            return {**beside, "sums": TensorSpec(torch.float32, size, min(limit * count, SUM_LIMIT))}
        return {
            **beside,
            "seeds": TensorSpec(self._index, (count,), self.config.seeds, at_least=0),
            "scalars": TensorSpec(torch.float32, (count,), min(limit, SUM_LIMIT / count)),
        }

    def reply(self, draws: list[int], scalars: list[float]) -> Payload:
        """A client's reply: what its examples gave leaves it here, but for the mean loss, a metric.

        Args:
            draws: The seeds of the round, as `draw` gave them.
            scalars: ĝ of each.
        """
        seeds, values = torch.tensor(draws), torch.tensor(scalars, dtype=torch.float32)
        if self._sends_pairs():
            return Payload({"seeds": seeds.to(self._index), "scalars": values})
        sums = torch.zeros(self.config.seeds, dtype=torch.float64).index_add_(0, seeds, values.double())
        return Payload({"sums": sums.float()})

    def _drawn_by(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """The seeds, int64, and scalars, float64, of a reply."""
        if "sums" in payload.tensors:  # a draw of each seed, as it were
            return torch.arange(self.config.seeds), payload.tensors["sums"].double()
        return payload.tensors["seeds"].long(), payload.tensors["scalars"].double()

    def _message(self, tensors: Mapping[str, Tensor]) -> Message:
        seeds, scalars = self._drawn_by(Payload(tensors))
        return Message(tensors["accumulator"], seeds, scalars / self.config.perturbations)

    def _aggregator(self, cohort: Cohort) -> Aggregator:
        if self.config.aggregation == "trimmed-mean":
            return TrimmedMean(self.config.seeds, cohort, self.config.trim)
        if self.config.aggregation == "median-of-means":
            return MedianOfMeans(self.config.seeds, cohort, self.config.groups)
        return Mean(self.config.seeds, cohort)
