"""FedAvg whose server clips each update by its norm, so that no client moves the model far in a round.

w(t+1) = w(t) + Σ p_i Δ_i · min(1, norm / ‖Δ_i‖),   p_i = n_i / Σ n over the clients that replied
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

import fedtune
from fedtune.core.aggregate import LIMIT, WeightedSum
from fedtune.core.cohort import Cohort
from fedtune.core.seeds import derive_seed
from fedtune.core.types import ClientEnv, ClientResult, Order, Payload, Reply, ServerEnv, TensorSpec
from fedtune.methods.fedavg.method import load
from fedtune.methods.local_training import train
from fedtune.methods.settings import Training
from fedtune.methods.tuning import Tuning
from fedtune.models.tuning import trainable


class Config(Tuning, Training):
    """Settings of `method.name: clip-mean`, beside what is trained (LoRA by default) and how."""

    name: Literal["clip-mean"] = "clip-mean"
    rounds: int = Field(3, ge=1)
    norm: float = Field(1.0, gt=0)  # of an update over all its tensors; a longer one is scaled down to it


@dataclass(frozen=True)
class State:
    """The global trained parameters, float32, by name."""

    weights: dict[str, Tensor]


@fedtune.register_method("clip-mean")
class ClipMean:
    """The mean of updates that are clipped by norm: no client moves the model far in a round."""

    arrival = "any-order"  # the sum is exact, so it does not depend on who replies first
    pools_data, uses_wire, saves_merged, sends_model = False, True, False, False

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self._seed, self.rounds = config, seed, config.rounds

    def prepare(self, server: ServerEnv) -> None:
        server.refuse_public(self.config.name)

    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        return self.config.attach(build(), derive_seed(self._seed, "adapter"))

    def init(self, model: nn.Module) -> State:
        return State({name: p.detach().cpu().float().clone() for name, p in trainable(model).items()})

    def plan(self, state: State, round: int, cohort: Cohort) -> Iterator[Order]:
        expects = {name: TensorSpec(w.dtype, tuple(w.shape), LIMIT) for name, w in state.weights.items()}
        return (Order(client, Payload(state.weights), expects) for client in cohort.clients)

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        parameters = trainable(env.model)
        load(parameters, job.tensors)
        trained = train(env, parameters, self.config)
        update = {name: w.cpu() - job.tensors[name] for name, w in trained.weights.items()}
        return ClientResult(Payload(update), trained.metrics)

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        total = None
        for reply in replies:
            norm = float(sum(t.double().square().sum() for t in reply.payload.tensors.values())) ** 0.5
            scale = self.config.norm / max(norm, self.config.norm)
            clipped = {name: t * scale for name, t in reply.payload.tensors.items()}
            total = (total or WeightedSum.empty(reply.cohort.total_examples)).add(clipped, reply.examples)
        return State({name: w + total.mean(name) for name, w in state.weights.items()})

    def export(self, state: State, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        load(trainable(model), state.weights)
        yield "global", model
