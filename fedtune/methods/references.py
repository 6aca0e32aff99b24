"""The rows that every comparison needs beside the methods: zero-shot, stand-alone and centralised.

They use the same local training as FedAvg and send nothing, so they have no entries in the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from fedtune.core.cohort import Cohort
from fedtune.core.seeds import derive_seed
from fedtune.core.types import (
    ArrivalOrder,
    ClientEnv,
    ClientResult,
    Order,
    Payload,
    Reply,
    ServerEnv,
    TensorSpec,
)
from fedtune.methods.loading import load
from fedtune.methods.local_training import train
from fedtune.methods.reference_settings import CentralizedConfig, StandaloneConfig, ZeroShotConfig
from fedtune.models.tuning import trainable


@dataclass(frozen=True)
class State:
    """The weights that training starts from, and what each client made of them by "client/name"."""

    start: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)


class Local:
    """Each client trains alone, once, and keeps its own model: stand-alone, or centralised for one client."""

    rounds = 1
    arrival: ArrivalOrder = "plan-order"
    uses_wire = False
    saves_merged = False
    sends_model = False

    def __init__(self, config: StandaloneConfig | CentralizedConfig, seed: int) -> None:
        self.config, self._seed = config, seed
        self.pools_data = isinstance(config, CentralizedConfig)

    def prepare(self, server: ServerEnv) -> None:
        """The server needs nothing besides its state."""
        server.refuse_public(self.config.name)

    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The whole model, with the adapter where one is trained."""
        return self.config.attach(build(), derive_seed(self._seed, "adapter"))

    def init(self, model: nn.Module) -> State:
        """The model as it is."""
        return State({name: p.detach().cpu().clone() for name, p in trainable(model).items()})

    def plan(self, state: State, round: int, cohort: Cohort) -> Iterator[Order]:
        """Everyone starts from the same weights."""
        job = Payload(state.start)
        expects = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in state.start.items()}
        return (Order(client, job, expects) for client in cohort.clients)

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        """Local training, to its end."""
        parameters = trainable(env.model)
        load(parameters, job.tensors)
        trained = train(env, parameters, self.config)
        weights = {
            name: w.cpu().to(job.tensors[name].dtype, copy=True) for name, w in trained.weights.items()
        }
        return ClientResult(Payload(weights), trained.metrics)

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        """Keeps each client's model for evaluation: as many as there are clients, by definition."""
        kept = {f"{r.client}/{name}": t for r in replies for name, t in r.payload.tensors.items()}
        return State(state.start, kept)

    def export(self, state: State, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Each client's model; `global` for the centralised one."""
        parameters = trainable(model)
        clients = sorted({int(name.partition("/")[0]) for name in state.trained})
        for client in clients:
            own = {n.partition("/")[2]: t for n, t in state.trained.items() if n.startswith(f"{client}/")}
            load(parameters, own)
            yield ("global" if self.pools_data else f"client-{client:04d}"), model
        if not clients:
            load(parameters, state.start)
            yield "global", model


@dataclass(frozen=True)
class Nothing:
    """The state of a method that trains nothing."""


class ZeroShot:
    """The pre-trained model as it is."""

    rounds = 0
    arrival: ArrivalOrder = "plan-order"
    pools_data = False
    uses_wire = False
    saves_merged = False
    sends_model = False

    def __init__(self, config: ZeroShotConfig, seed: int) -> None:
        self.config = config

    def prepare(self, server: ServerEnv) -> None:
        """The server needs nothing besides its state."""
        server.refuse_public(self.config.name)

    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The model as it is, nothing to train."""
        return build().requires_grad_(False)

    def init(self, model: nn.Module) -> Nothing:
        """Nothing to remember."""
        return Nothing()

    def plan(self, state: Nothing, round: int, cohort: Cohort) -> Iterator[Order]:
        """Nobody is asked for anything."""
        return iter(())

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        """Never asked for; answers with nothing."""
        return ClientResult(Payload(), {})

    def server_step(self, state: Nothing, replies: Iterable[Reply]) -> Nothing:
        """Nothing changes."""
        return state

    def export(self, state: Nothing, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The model as it is."""
        yield "global", model
