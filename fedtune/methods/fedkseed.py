"""FedKSeed and FedKSeed-Pro: full-parameter tuning with two forward passes a step and K shared seeds.

Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost
under 18 Kilobytes" (2024), Algorithm 1.

    w = w0 − η Σ_j a_j z_j                                    Eq. 4    `step_weights`
    ĝ = (L(w + ε z_j; x) − L(w − ε z_j; x)) / 2ε              Eq. 5    `client_step`
    w ← w − η ĝ z_j                                           Eq. 6    `client_step`
    a_j ← a_j + Σ_i c_i Σ ĝ,   c_i = n_i / Σ n of those that replied   `server_step`
    ψ_j = mean |ĝ| of seed j;  p = softmax(min-max(ψ))        Eq. 13, 14  `probabilities` (Pro)

The server holds K numbers and no model. What crosses the wire: down the accumulator (and p), up the
drawn seeds with their scalars, or the dense K sums where those are smaller. A client that replied in the
round before gets only the entries that changed since.

Deviations: noise is a function of (pool key, parameter name, element, seed index) instead of a serial
generator's draws (`zeroth/`), so that unlike devices rebuild the same bits; seeds are pool indices. ψ of a
seed that was never drawn is the mean over those that were (the paper leaves it open). With `hadamard4`
weights are formed from w0 anew in every forward pass, for all other noise they are perturbed in place.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedtune.core.aggregate import LIMIT, WeightedSum
from fedtune.core.client import ClientError
from fedtune.core.seeds import derive_seed
from fedtune.core.settings import Settings
from fedtune.core.types import Arrival, ClientEnv, ClientResult, Cohort, Order, Payload, Reply, TensorSpec
from fedtune.data.batches import collate, endless_batches
from fedtune.errors import InputError
from fedtune.methods.zeroth_step import coefficients, step_weights
from fedtune.models.tuning import train_all, trainable
from fedtune.zeroth import NOISE_VERSION, SeedPool, rebuild_all_

log = logging.getLogger("fedtune")

SCALE = 2.0**8  # scalars are summed in units of it: the exact sum then holds any |Σ ĝ| below 2^26


class Config(Settings):
    """Settings of `method.name: fedkseed`."""

    name: Literal["fedkseed", "fedkseed-pro"] = "fedkseed"  # the method
    rounds: int = Field(40, ge=1)  # communication rounds
    seeds: int = Field(4096, ge=1, le=4096)  # K, the shared seeds
    noise: Literal["hadamard4", "rademacher", "gaussian", "binomial32"] = "hadamard4"  # see noise.md
    epsilon: float = Field(5e-4, gt=0)  # scale of a perturbation
    lr: float = Field(3e-7, gt=0)  # η, constant
    local_steps: int = Field(200, ge=1)  # τ, a client and round
    batch_size: int = Field(1, ge=1)  # examples a step
    perturbations: int = Field(1, ge=1)  # seeds tried a step, on the same batch
    scalar_limit: float | None = Field(None, gt=0)  # a reply with a scalar of this size or more is refused


class ProConfig(Config):
    """Settings of `method.name: fedkseed-pro`."""

    name: Literal["fedkseed", "fedkseed-pro"] = "fedkseed-pro"  # the method
    seeds: int = Field(1024, ge=1, le=4096)  # K, the shared seeds


@dataclass(frozen=True)
class State:
    """The server's state: a few vectors of length K.

    Attributes:
        w0: SHA-256 of the weights that everything starts from.
        accumulator: a, float32: server, clients and replay all rebuild from these bits.
        before: The accumulator that the last round began with.
        holders: Clients that replied in the last round, and so hold `before`.
        magnitude, draws: Σ |ĝ| and the number of draws of each seed (Pro).
        noise_version: Of the noise that the accumulator belongs to.
    """

    w0: str
    accumulator: Tensor
    before: Tensor
    magnitude: Tensor
    draws: Tensor
    holders: dict[str, bool] = field(default_factory=dict)
    noise_version: int = NOISE_VERSION


class FedKSeed:
    """FedKSeed, and FedKSeed-Pro; see the module's text."""

    pools_data = False
    uses_wire = True
    saves_merged = False
    arrival: Arrival = "any-order"

    def __init__(self, config: Config, seed: int) -> None:
        self.config = config
        self.rounds = config.rounds
        self.pro = config.name == "fedkseed-pro"
        self._key = derive_seed(seed, "pool") & 0x7FFFFFFF  # 4 bytes: the paper's seed of seeds
        self._w0 = _Fingerprint()

    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The whole model, all of it tuned; evaluation mode, no gradients are ever needed."""
        model = train_all(build())  # type: ignore[arg-type]
        for name, parameter in trainable(model).items():
            if parameter.device.type != "cpu":
                raise InputError(
                    f"{self.config.name} runs on the CPU; set model.device=cpu, got {parameter.device}"
                )
            if self.config.noise != "hadamard4" and parameter.dtype != torch.float32:
                raise InputError(
                    f"method.noise {self.config.noise} perturbs weights in place, which {parameter.dtype} "
                    f"({name}) cannot hold; set method.noise=hadamard4 or model.dtype=float32"
                )
        return model.eval()

    def init(self, model: nn.Module) -> State:
        """An accumulator of zeros: the model is w0."""
        zeros = torch.zeros(self.config.seeds)
        return State(self._w0.of(model), zeros, zeros, zeros.double(), zeros.to(torch.int64))

    def plan(self, state: State, round: int, cohort: Cohort) -> Iterator[Order]:
        """The accumulator whole, or what changed in it for those who hold the one before."""
        whole: dict[str, Tensor] = {"accumulator": state.accumulator}
        changed = (state.accumulator != state.before).nonzero().flatten()
        if 2 * changed.numel() < self.config.seeds:
            part = {"changed": changed.to(torch.int32), "value": state.accumulator[changed]}
        else:
            part = whole
        extra = {"probability": self.probabilities(state)} if self.pro else {}
        scalars = {"pool": self._key}
        full, delta = Payload(whole | extra, scalars), Payload(part | extra, scalars)
        for client in cohort.clients:
            yield Order(client, delta if str(client) in state.holders else full, self._expects())

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        """τ local steps from the rebuilt global model; the reply is what was drawn and its scalars."""
        config = self.config
        received = self._accumulator(job, env)
        pool = SeedPool(int(job.scalars["pool"]), config.seeds, config.noise)
        draws = self._draw(job, env)
        batches = endless_batches(len(env.items), config.batch_size, env.generator("batches"))
        scalars, loss_sum = [], 0.0
        with step_weights(env.model, pool, received, config.lr) as weights:
            for step in range(config.local_steps):
                batch = collate([env.items[i] for i in next(batches)], env.pad_id)
                tokens = batch["input_ids"].numel()
                on_device = {key: value.to(env.device) for key, value in batch.items()}
                estimates = []
                with env.memory.step(tokens, resident=[env.model, weights.held]):
                    for j in draws[step * config.perturbations : (step + 1) * config.perturbations]:
                        plus = weights.loss(on_device, j, config.epsilon)
                        minus = weights.loss(on_device, j, -config.epsilon)
                        scalar = (plus - minus) / (2 * config.epsilon)
                        if not math.isfinite(scalar):
                            raise ClientError(
                                f"the loss became {plus + minus} at step {step + 1}; lower method.lr"
                            )
                        estimates.append((j, scalar))
                        loss_sum += (plus + minus) / 2
                    weights.update([(j, g / config.perturbations) for j, g in estimates])
                scalars += [g for _, g in estimates]
        if not any(scalars):
            log.warning(
                "client %d: both losses were equal in all %d steps: epsilon %g is too small for %s weights; "
                "try method.epsilon=%g",
                env.client,
                config.local_steps,
                config.epsilon,
                next(env.model.parameters()).dtype,
                10 * config.epsilon,
            )
        metrics = {"train_loss": loss_sum / len(scalars), "steps": config.local_steps}
        return ClientResult(self._reply(draws, scalars), metrics, state=Payload({"accumulator": received}))

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        """Adds c_i Σ ĝ to the accumulator; memory is a few vectors of length K, whatever the cohort."""
        total: WeightedSum | None = None
        magnitude, draws = state.magnitude.clone(), state.draws.clone()
        holders = {}
        for reply in replies:
            total = total or WeightedSum.empty(reply.cohort.total_examples)
            sums = torch.zeros(self.config.seeds, dtype=torch.float64)
            if "sums" in reply.payload.tensors:
                sums += reply.payload.tensors["sums"]
            else:
                indices, scalars = (
                    reply.payload.tensors["seeds"].long(),
                    reply.payload.tensors["scalars"].double(),
                )
                sums.index_add_(0, indices, scalars)
                magnitude.index_add_(0, indices, scalars.abs())
                draws.index_add_(0, indices, torch.ones_like(indices))
            total = total.add({"a": sums / (SCALE * self.config.perturbations)}, reply.examples)
            holders[str(reply.client)] = True
        if total is None:
            raise ValueError("no client replied: there is nothing to add")
        accumulator = state.accumulator + SCALE * total.mean("a")
        return replace(
            state,
            accumulator=accumulator,
            before=state.accumulator,
            magnitude=magnitude,
            draws=draws,
            holders=holders,
        )

    def export(self, state: State, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The global model of Eq. 4, written into `model` for as long as it is looked at."""
        if state.noise_version != NOISE_VERSION:
            raise InputError(
                f"the state belongs to noise version {state.noise_version}, this fedtune makes version "
                f"{NOISE_VERSION}; use the fedtune that the run began with"
            )
        found = self._w0.of(model)
        if found != state.w0:
            raise InputError(
                f"the state belongs to weights with SHA-256 {state.w0[:16]}, this model has {found[:16]}; "
                "give the model that the run began with"
            )
        pool = SeedPool(self._key, self.config.seeds, self.config.noise)
        a = coefficients(state.accumulator, self.config.lr)
        parameters = trainable(model)
        w0 = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            rebuild_all_({name: p.data for name, p in parameters.items()}, w0, pool, a)
            yield "global", model
        finally:
            for name, parameter in parameters.items():
                parameter.data.copy_(w0[name])

    def probabilities(self, state: State) -> Tensor:
        """The p of Eq. 14, float32 (K); uniform until something was drawn or while ψ does not vary."""
        drawn = state.draws > 0
        if not bool(drawn.any()):
            return torch.full((self.config.seeds,), 1 / self.config.seeds)
        psi = state.magnitude / state.draws.clamp(min=1)
        psi = torch.where(drawn, psi, psi[drawn].mean())
        spread = psi.max() - psi.min()
        normalized = (psi - psi.min()) / spread if spread > 0 else torch.zeros_like(psi)
        return normalized.softmax(0).float()

    def _accumulator(self, job: Payload, env: ClientEnv) -> Tensor:
        if "accumulator" in job.tensors:
            return job.tensors["accumulator"]
        if env.state is None:
            raise ClientError("it was sent changes only, but holds no accumulator any more")
        received = env.state.tensors["accumulator"].clone()
        received[job.tensors["changed"].long()] = job.tensors["value"]
        return received

    def _draw(self, job: Payload, env: ClientEnv) -> list[int]:
        count, generator = self.config.local_steps * self.config.perturbations, env.generator("seeds")
        if not self.pro:
            return torch.randint(self.config.seeds, (count,), generator=generator).tolist()
        p = job.tensors["probability"].double()
        if p.numel() != self.config.seeds or abs(float(p.sum()) - 1) > 1e-3 or bool((p < 0).any()):
            raise ClientError(f"the probabilities it got sum to {float(p.sum()):.4f} and not to 1")
        return torch.multinomial(p, count, replacement=True, generator=generator).tolist()

    def _sends_pairs(self) -> bool:
        """Pairs of 8 bytes, or the dense sums of 4K where those are smaller. Pro needs each scalar."""
        return self.pro or 2 * self.config.local_steps * self.config.perturbations <= self.config.seeds

    def _expects(self) -> Mapping[str, TensorSpec]:
        count, limit = (
            self.config.local_steps * self.config.perturbations,
            self.config.scalar_limit or LIMIT * SCALE,
        )
        if not self._sends_pairs():
            return {
                "sums": TensorSpec(torch.float32, (self.config.seeds,), min(limit * count, LIMIT * SCALE))
            }
        return {
            "seeds": TensorSpec(torch.int32, (count,), self.config.seeds, at_least=0),
            "scalars": TensorSpec(torch.float32, (count,), min(limit, LIMIT * SCALE / count)),
        }

    def _reply(self, draws: list[int], scalars: list[float]) -> Payload:
        seeds, values = torch.tensor(draws, dtype=torch.int32), torch.tensor(scalars, dtype=torch.float32)
        if self._sends_pairs():
            return Payload({"seeds": seeds, "scalars": values})
        sums = torch.zeros(self.config.seeds, dtype=torch.float64).index_add_(
            0, seeds.long(), values.double()
        )
        return Payload({"sums": sums.float()})


class _Fingerprint:
    """SHA-256 over the trainable weights; computed once a model, for they are never written for long."""

    def __init__(self) -> None:
        self._known: tuple[int, str] | None = None

    def of(self, model: nn.Module) -> str:
        if self._known is None or self._known[0] != id(model):
            digest = hashlib.sha256()
            for name, parameter in trainable(model).items():
                digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
                digest.update(
                    parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                )
            self._known = (id(model), digest.hexdigest())
        return self._known[1]
