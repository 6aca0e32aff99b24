"""Seeds without end: the two protocols that FedKSeed argues against, as its baselines, and DeComFL.

Qin et al., FedKSeed (2024), Table 1 and Figure 1(b). A local step is the same, (seed, scalar) with a fresh
seed out of 2^31, and so is the upload. Nothing can be summed by seed, so the newest model costs a client

* `download: steps` (Zelikman et al. 2023): every step that anyone ever took, replayed from w0 one by one. The
  server holds the list of steps, and time and memory grow with it;
* `download: model` (Feng et al. 2023): all weights, sent down in every round. The server holds the model and
  replays the steps of a round into it.

`download: means`, which came later, has clients of a round try the same directions: decomfl.py.

Client i's step counts with c_i = n_i / Σ n over those that replied, as in FedKSeed, and steps are applied in
the order of client and step, so that all who replay them hold the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedtune.core.aggregate import LIMIT
from fedtune.core.cohort import Cohort
from fedtune.core.robust import Updates
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
    TensorSpec,
)
from fedtune.data.batches import collate, endless_batches, on_device
from fedtune.methods.fedkseed import decomfl
from fedtune.methods.fedkseed.resolution import given, not_finite, scale_of, warn_where_rounded
from fedtune.methods.fedkseed.settings import InfinitePoolConfig
from fedtune.methods.fedkseed.step import refuse_narrow, refuse_on_a_gpu
from fedtune.methods.loading import load
from fedtune.methods.step_loss import TokenMean, form_of, trained_tokens
from fedtune.models.lean_loss import batch_loss
from fedtune.models.on_disk import kept_on_disk
from fedtune.models.tuning import train_all, trainable
from fedtune.zeroth import SeedPool, perturb_all_

SEEDS = 2**31
_FOLDED = 2**20


@dataclass(frozen=True)
class State:
    """The server's state.

    Attributes:
        seeds, scalars: All steps so far, int32 and float32; a scalar is c_i ĝ. Means have no seeds.
        known: How many of them each client has (download: steps, means).
        weights: The model (download: model).
        epsilon: ε, the same for all clients in all rounds.
    """

    seeds: Tensor
    scalars: Tensor
    known: dict[str, int] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    epsilon: float = 0.0  # in the checkpoints of older runs, which have a number in their settings


class InfinitePool:
    """Zeroth-order tuning with fresh seeds; see the module's text."""

    pools_data = False
    uses_wire = True
    saves_merged = False
    sends_model = False
    arrival: ArrivalOrder = "any-order"

    def __init__(self, config: InfinitePoolConfig, seed: int) -> None:
        self.config = config
        self.rounds = config.rounds
        # directions of which slopes are looked at; no step is taken along them
        self._pool = SeedPool(derive_seed(seed, "pool") & 0x7FFFFFFF, 1024, config.noise)
        self.directions_key = self._pool.key  # of the directions that all clients try (download: means)
        self._count = config.local_steps * config.perturbations  # directions of a client and round
        self._rate = config.lr / config.perturbations
        self._sent = ("scalars",) if config.download == "means" else ("seeds", "scalars")
        self._seen = False  # whether slopes were looked at in this process

    def prepare(self, server: ServerEnv) -> None:
        """The server needs nothing besides its state."""
        server.refuse_public(self.config.name)

    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The whole model, all of it tuned, float32: steps are taken where the weights lie."""
        model = train_all(build())  # type: ignore[arg-type]
        refuse_narrow(trainable(model), self.config.name, "fedkseed")
        refuse_on_a_gpu(trainable(model), self.config.noise)
        return model.eval()

    def init(self, model: nn.Module) -> State:
        """No step was taken; with `download: model`, the model as it is."""
        weights = {name: p.detach().cpu().clone() for name, p in trainable(model).items()}
        return State(
            torch.zeros(0, dtype=torch.int32),
            torch.zeros(0),
            weights=weights if self.config.download == "model" else {},
            epsilon=scale_of(self.config.epsilon, model, self._pool),
        )

    def plan(self, state: State, round: int, cohort: Cohort) -> Iterator[Order]:
        """All weights, or the steps that a client does not have yet."""
        expects = {
            "seeds": TensorSpec(torch.int32, (self._count,), SEEDS, at_least=0),
            "scalars": TensorSpec(torch.float32, (self._count,), LIMIT),
        }
        expects = {name: expects[name] for name in self._sent}
        scalars: dict[str, Scalar] = {"epsilon": state.epsilon} if self.config.epsilon == "auto" else {}
        if self.config.download == "means":
            scalars["pool"] = self.directions_key
        whole = Payload(state.weights, scalars)
        for client in cohort.clients:
            if self.config.download == "model":
                yield Order(client, whole, expects)
            else:
                known = state.known.get(str(client), 0)
                missing = {name: getattr(state, name)[known:] for name in self._sent}
                yield Order(client, Payload(missing, scalars), expects)

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        """Gets to the newest model, then τ local steps from there; sends seeds and scalars."""
        parameters = trainable(env.model)
        weights = {name: parameter.data for name, parameter in parameters.items()}
        if self.config.download == "model":
            load(parameters, job.tensors)
            return self._steps(weights, env, None, given(self.config.epsilon, job))
        if self.config.download == "means" and job.scalars["pool"] != self.directions_key:
            raise ClientError(
                f"the order is for directions of pool {job.scalars['pool']}, here it is "
                f"{self.directions_key}: give all the same seed"
            )
        known = env.state.tensors if env.state else {}
        history = {
            name: torch.cat([known[name], job.tensors[name]]) if known else job.tensors[name]
            for name in self._sent
        }
        with kept_on_disk(parameters):
            self._replay(weights, history.get("seeds"), history["scalars"])
            return self._steps(weights, env, Payload(history), given(self.config.epsilon, job))

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        """Appends the steps of a round, by client, or their means; with `download: model` takes them."""
        before = len(state.scalars)  # who replied had all of them
        if self.config.download == "means":
            means, clients = decomfl.mean(replies, self._count)
            known = state.known | {str(client): before for client in sorted(clients)}
            return replace(state, scalars=torch.cat([state.scalars, means]), known=known)
        got = {reply.client: reply for reply in replies}
        if not got:
            raise ValueError("no client replied: there is nothing to append")
        total = sum(reply.examples for reply in got.values())
        in_order = [got[client] for client in sorted(got)]
        seeds = torch.cat([reply.payload.tensors["seeds"] for reply in in_order])
        scalars = torch.cat(
            [reply.payload.tensors["scalars"] * (reply.examples / total) for reply in in_order]
        )
        if self.config.download == "model":
            weights = {name: weight.clone() for name, weight in state.weights.items()}
            self._replay(weights, seeds, scalars)
            return replace(state, weights=weights)
        known = state.known | {str(client): before for client in sorted(got)}
        return replace(
            state,
            seeds=torch.cat([state.seeds, seeds]),
            scalars=torch.cat([state.scalars, scalars]),
            known=known,
        )

    def updates(self) -> Updates:
        """The scalars by seed modulo 2^20, where few of a client's meet; of shared seeds as they are."""
        if self.config.download == "means":
            return Updates(vector=lambda update: [update["scalars"]])
        return Updates(
            vector=lambda update: [
                torch.zeros(_FOLDED).index_add_(0, update["seeds"].long() % _FOLDED, update["scalars"])
            ]
        )

    def export(self, state: State, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The newest model; afterwards `model` holds what it held before."""
        parameters = trainable(model)
        with kept_on_disk(parameters):
            if self.config.download == "model":
                load(parameters, state.weights)
            else:
                weights = {name: parameter.data for name, parameter in parameters.items()}
                self._replay(weights, state.seeds, state.scalars)
            yield "global", model

    def _steps(
        self, weights: Mapping[str, Tensor], env: ClientEnv, kept: Payload | None, epsilon: float
    ) -> ClientResult:
        config = self.config
        if not self._seen:
            self._seen = True
            warn_where_rounded(env, self._pool, torch.zeros(self._pool.size), config, epsilon)
        drawn, along = self._directions(env)
        batches = endless_batches(len(env.rows), config.batch_size, env.generator("batches"), env.lengths)
        scalars, loss, tried = list[float](), TokenMean(), config.perturbations
        for step in range(config.local_steps):
            env.stepped(step, config.local_steps)
            batch = self._batch(env, next(batches))
            tokens = trained_tokens(env.model, batch)
            if not tokens:  # no loss to compare: the slope is 0
                scalars += [0.0] * tried
                continue
            moved, around = on_device(batch, env.device), 0.0
            form = form_of(batch, tokens)
            with env.memory.step(batch["input_ids"].numel(), [env.model], like=form), torch.no_grad():
                for direction in along[step * tried : (step + 1) * tried]:
                    perturb_all_(weights, *direction, epsilon)
                    plus = float(batch_loss(env.model, moved, labels=batch["labels"]))
                    perturb_all_(weights, *direction, -2 * epsilon)
                    minus = float(batch_loss(env.model, moved, labels=batch["labels"]))
                    scalar = (plus - minus) / (2 * epsilon)
                    if not math.isfinite(scalar):
                        raise not_finite(plus, minus, step, env.model)
                    scalars.append(scalar)
                    around += (plus + minus) / 2
                    # back, and of the step's last direction the step with it
                    last = len(scalars) == (step + 1) * tried
                    perturb_all_(weights, *direction, epsilon - (self._rate * scalar if last else 0.0))
                for place in range(step * tried, (step + 1) * tried - 1):
                    perturb_all_(weights, *along[place], -self._rate * scalars[place])
            loss.add(around / tried, tokens, batch)
        sent = {"seeds": drawn.to(torch.int32), "scalars": torch.tensor(scalars)}
        up = Payload({name: sent[name] for name in self._sent})
        return ClientResult(up, loss.metrics | {"steps": config.local_steps}, state=kept)

    def _directions(self, env: ClientEnv) -> tuple[Tensor, list[tuple[SeedPool, int]]]:
        """What a client tries in a round, in turn; and the seeds of its own among it."""
        if self.config.download == "means":
            pool = decomfl.directions(self.directions_key, env.round, self._count, self.config.noise)
            return torch.zeros(0), [(pool, j) for j in range(self._count)]
        drawn = torch.randint(SEEDS, (self._count,), generator=env.generator("seeds"))
        return drawn, [(SeedPool(seed, 1, self.config.noise), 0) for seed in drawn.tolist()]

    def _batch(self, env: ClientEnv, indices: list[int]) -> dict[str, Tensor]:
        return collate([env.rows[i] for i in indices], env.pad_id)

    def _replay(self, weights: Mapping[str, Tensor], seeds: Tensor | None, scalars: Tensor) -> None:
        if seeds is None or self.config.download == "means":
            decomfl.rebuild(weights, scalars, self.directions_key, self._count, self._rate, self.config.noise)
            return
        for seed, scalar in zip(seeds.tolist(), scalars.tolist(), strict=True):
            perturb_all_(weights, SeedPool(seed, 1, self.config.noise), 0, -self._rate * scalar)
