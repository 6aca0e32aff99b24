"""What the one-shot paper's theory speaks of, measured on a run: L, τ, ‖w(0,0)‖, Γ, the bound, and Eq. 7.

Wang et al., "One Communication Round is All It Needs for Federated Fine-Tuning Foundation Models", sec. 3.
With w' on the one-shot trajectory of client i and w on its multi-round one, on the same mini-batches:

    ε_i = Σ_j β_j [g_i(w'_j) − g_i(w_j)]            Eq. 7     `Measured.local_errors`
    ε   = Σ_i p_i ε_i                               Eq. 4, 8  `Measured.error`
    L   = ‖∇F(w(0,0)) − ∇F(w(T,k))‖ / ‖w(0,0) − w(T,k)‖ on one mini-batch     `Measured.smoothness`
    τ   = ‖w(T,k) − w(0,0)‖ / ‖w(0,0)‖                        `Measured.relative_update`
    ‖ε‖ ≤ Γ ‖w(0,0)‖, Γ = L τ T k                   Theorem 1 `Measured.bound`
    ‖ε‖ ≤ L τ T k m ‖w(0,0)‖                        Eq. 13    `Measured.bound_of_clients`

w is what is trained: for LoRA the factors. The bound is L · Tk · ‖w(T,k) − w(0,0)‖ whatever ‖w(0,0)‖ is.

Both trajectories are those of a run: the multi-round one has the batches and the bits of
`fedtune run`, the one-shot one takes the same batches in the same order with one optimiser and one
schedule over all T·k steps. With plain SGD of constant rate and the plain mean, ε is w_multi − w_one exactly.

Memory: two models, the multi-round and the one-shot one of the client whose turn it is (the frozen weights
are the same memory), with their optimisers; two sums of gradients; and the server's weights and sum. What
the other clients' one-shot trajectories need to go on lies on disk. Nothing grows with steps, rounds or
clients but the disk's m times (weights, optimiser state, two sums).

Deviations: the sum of Eq. 7 is taken from j = 1 and not k + 1, since with a rate that decays over the round
the two schemes part in the first round already (where they do not, its terms are 0). Eq. 7's t = ⌈j/k⌉ counts
rounds from 1 although the weights' t counts from 0; here it is the round that step j falls into. β is the
one-shot rate, as in Eq. 7. With AdamW or momentum g stays the gradient of the loss, so that ε is no longer
the difference of the weights; that is measured beside it (`RoundEnd.distance`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.core.aggregate import LIMIT
from fedtune.core.cohort import Cohort
from fedtune.core.seeds import derive_seed, torch_generator
from fedtune.core.store import Store
from fedtune.core.temporary import temporary_folder
from fedtune.core.types import ClientEnv, Order, Payload, Reply
from fedtune.data.batching import RANDOM, Batching
from fedtune.data.encoded import Encoded
from fedtune.errors import InputError
from fedtune.measure.memory import MemoryMeter
from fedtune.methods.fedavg import lora_aggregation as lora
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.fedavg.state import State
from fedtune.methods.local_training import step_batches
from fedtune.methods.step_loss import StepBatches, drawn
from fedtune.models.tuning import trainable
from fedtune.theory.quantities import Measured, RoundEnd, schemes
from fedtune.theory.trajectory import Diverged, Trajectory, distance, gradient, lent, norm, put, saved

ERROR, ERROR_WITHOUT_RATES = "error", "error without rates"  # put aside beside a client's weights
ROUNDING = 1e-4  # of the largest move: weights that are less apart differ in their gradients by rounding

Watch = Callable[[nn.Module], tuple[float, ...]]


def measure(
    config: Config,
    model: nn.Module,
    data: Mapping[int, Sequence[Encoded]],
    *,
    pad_id: int,
    seed: int,
    device: torch.device,
    batching: Batching = RANDOM,
    smoothness_batches: int = 8,
    watch: Watch = lambda model: (),
    on_round: Callable[[int, int], None] = lambda round, clients: None,
    on_client: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Runs both schemes side by side on the same mini-batches and measures; every client takes every turn.

    Args:
        config: The multi-round settings, or one-shot ones of several epochs (`schemes`).
        model: The base model; what is trained is attached to it. It ends with the weights it began with.
        data: Each client's examples.
        pad_id: The padding token.
        seed: The run's seed: batches and adapters are those of the run.
        device: Where the model lies.
        batching: How examples become batches, as in the run.
        smoothness_batches: Mini-batches on which L is estimated, from the clients in turn.
        watch: Looks at the global models, for instance at their losses.
        on_round: Called with each round that begins and its clients.
        on_client: Called with how many of them are done.

    Raises:
        InputError: The theory does not cover the method, a loss or weight became NaN or infinite, training
            does not move the weights, or the disk is full.
    """
    multi, one = schemes(config)
    attached = FedAvg(multi, seed).client_model(lambda: model)
    parameters = trainable(attached)
    with temporary_folder() as folder, lent(parameters):
        running = _Running(
            multi,
            one,
            attached,
            parameters,
            data,
            pad_id,
            seed,
            device,
            folder,
            on_round,
            on_client,
            batching,
        )
        return running.measure(watch, smoothness_batches)


@dataclass
class _Running:
    """A measurement on its way; the fields after `batching` are what it has seen so far."""

    multi: Config
    one: Config
    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    data: Mapping[int, Sequence[Encoded]]
    pad_id: int
    seed: int
    device: torch.device
    folder: Path
    on_round: Callable[[int, int], None]
    on_client: Callable[[int], None]
    batching: Batching
    largest_move: float = 0.0
    largest_smoothness: float | None = None
    gradient_differences: float = 0.0
    distances: float = 0.0
    begun: dict[int, Payload] = field(default_factory=dict)  # what each client starts from, as sent

    def __post_init__(self) -> None:
        self.cohort = Cohort(
            tuple(sorted(self.data)), {c: len(items) for c, items in self.data.items()}, len(self.data)
        )

    def measure(self, watch: Watch, batches: int) -> Measured:
        method, one_shot = FedAvg(self.multi, self.seed), FedAvg(self.one, self.seed)
        first = state = method.init(self.model)
        self.begun = {order.client: order.payload for order in one_shot.plan(first, 1, self.cohort)}
        seen, ends, one = self._watched(watch, first), [], first
        for round in range(1, self.multi.rounds + 1):
            self.on_round(round, len(self.data))
            state = method.server_step(state, self._replies(method.plan(state, round, self.cohort), round))
            one = one_shot.server_step(first, self._one_shot_replies())
            ends.append(
                RoundEnd(
                    round,
                    distance(one.weights, state.weights),
                    distance(state.weights, first.weights),
                    self._watched(watch, state),
                    self._watched(watch, one),
                )
            )
        moved, local, local_free = ends[-1].moved, self._errors(ERROR), self._errors(ERROR_WITHOUT_RATES)
        if not moved:
            raise InputError(
                f"training does not move the weights at all; raise method.lr (now {self.multi.lr:g})"
            )
        return Measured(
            clients=len(self.data),
            rounds=self.multi.rounds,
            steps=self.multi.rounds
            * sum(self.multi.steps(len(self._env(client, 1).rows)) for client in self.data)
            / len(self.data),
            trainable=sum(w.numel() for w in first.weights.values()),
            norm=norm(first.weights),
            moved=moved,
            largest_move=self.largest_move,
            smoothnesses=tuple(self._smoothnesses(first, state, moved, batches)),
            largest_smoothness=self.largest_smoothness,
            error=local[0],
            error_without_rates=local_free[0],
            local_errors=local[1],
            local_errors_without_rates=local_free[1],
            gradient_differences=self.gradient_differences,
            distances=self.distances,
            start=seen,
            ends=tuple(ends),
        )

    def _replies(self, orders: Iterator[Order], round: int) -> Iterator[Reply]:
        """The multi-round clients' updates; each client's one-shot trajectory goes as many steps further."""
        for done, order in enumerate(orders, 1):
            try:
                update = self._side_by_side(order, round)
            except Diverged as error:
                raise InputError(
                    f"the training that is measured diverged: {error} (client {order.client}, round {round} "
                    f"of {self.multi.rounds}); lower method.lr (now {self.multi.lr:g})"
                ) from None
            yield Reply(order.client, update, {}, self.cohort)
            self.on_client(done)

    def _one_shot_replies(self) -> Iterator[Reply]:
        for client in self.cohort.clients:
            weights = saved(self._path(client), "weights")
            yield Reply(client, self._update(self.begun[client], weights), {}, self.cohort)

    def _side_by_side(self, order: Order, round: int) -> Payload:
        """One round of one client in both schemes, step by step on the same mini-batches."""
        client, env = order.client, self._env(order.client, round)
        begun = lora.pad(self.begun[client].tensors, self.parameters)
        steps = self.multi.steps(len(env.rows))
        common: dict[str, Any] = {"proximal": self.multi.proximal, "device": self.device}
        one = Trajectory(begun, self.one, self.multi.rounds * steps, **common)
        many = Trajectory(
            lora.pad(order.payload.tensors, self.parameters), self.multi, steps, round=round, **common
        )
        if round == 1:
            sums = {key: _zeros(one.weights) for key in (ERROR, ERROR_WITHOUT_RATES)}
        else:
            sums = one.restore(self._path(client), (round - 1) * steps)
        start = {name: w.to(self.device, torch.float32) for name, w in begun.items()}
        devices = [self.device] if self.device.type == "cuda" else []
        self.model.train()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed(env.seed, "dropout"))
            for step, group in enumerate(step_batches(env, self.multi)):
                if step == steps:
                    break
                self._step(one, many, drawn(env, group, step), sums)
                furthest = max(distance(w.weights, start) for w in (one, many))
                if not furthest < LIMIT:
                    raise Diverged(f"the weights are {furthest:g} from their start after {step + 1} steps")
                self.largest_move = max(self.largest_move, furthest)
        self.model.eval()
        one.save(self._path(client), sums)
        return self._update(order.payload, many.weights)

    def _step(
        self,
        one: Trajectory,
        many: Trajectory,
        batches: StepBatches,
        sums: Mapping[str, dict[str, Tensor]],
    ) -> None:
        rate, apart = one.rate, distance(one.weights, many.weights)
        generator = _random_state(self.device)
        put(self.parameters, one.weights)
        of_one = gradient(self.model, self.parameters, batches, self.device)
        _set_random_state(self.device, generator)  # dropout drops the same in both: only the weights differ
        put(self.parameters, many.weights)
        of_many = gradient(self.model, self.parameters, batches, self.device)
        difference = distance(of_one, of_many)
        if apart > ROUNDING * self.largest_move:
            self.largest_smoothness = max(self.largest_smoothness or 0.0, difference / apart)
        self.gradient_differences += difference
        self.distances += apart
        for name, mine in of_one.items():
            sums[ERROR][name].add_(mine, alpha=rate).sub_(of_many[name], alpha=rate)
            sums[ERROR_WITHOUT_RATES][name].add_(mine).sub_(of_many[name])
        one.step(of_one)
        many.step(of_many)

    def _errors(self, key: str) -> tuple[float, tuple[float, ...]]:
        """‖Σ p_i ε_i‖ and each ‖ε_i‖, one client's in memory at a time."""
        total: dict[str, Tensor] = {}
        each = []
        for client in self.cohort.clients:
            mine = saved(self._path(client), key)
            each.append(norm(mine))
            share = self.cohort.examples[client] / self.cohort.total_examples
            for name, error in mine.items():
                total[name] = error.mul_(share) if name not in total else total[name].add_(error, alpha=share)
        return norm(total), tuple(each)

    def _smoothnesses(self, first: State, last: State, moved: float, batches: int) -> Iterator[float]:
        """‖∇F(w(0,0)) − ∇F(w(T,k))‖ / ‖w(0,0) − w(T,k)‖ on random mini-batches of clients in turn."""
        envs = {client: self._env(client, 1) for client in self.cohort.clients}
        trained = {c: [at for at, row in enumerate(env.rows) if row.trained] for c, env in envs.items()}
        clients = [client for client, places in trained.items() if places]
        for number in range(batches):
            client = clients[number % len(clients)]
            places = trained[client]
            order = torch.randperm(
                len(places), generator=torch_generator(self.seed, "smoothness", client, number)
            )
            some = [places[i] for i in order[: self.multi.batch_size].tolist()]
            batch = drawn(envs[client], [some], number)
            put(self.parameters, first.weights)
            before = gradient(self.model, self.parameters, batch, self.device)
            put(self.parameters, last.weights)
            after = gradient(self.model, self.parameters, batch, self.device)
            yield distance(before, after) / moved

    def _update(self, received: Payload, weights: Mapping[str, Tensor]) -> Payload:
        """What the client would send: its update, cut to the shapes and dtypes of what it received."""
        update = {}
        for name, start in received.tensors.items():
            weight = weights[name].detach().cpu()
            part = weight[tuple(slice(n) for n in start.shape)] if weight.ndim else weight
            update[name] = (part - start.to(torch.float32)).to(start.dtype)
        return Payload(update)

    def _watched(self, watch: Watch, state: State) -> tuple[float, ...]:
        put(self.parameters, state.weights)
        return watch(self.model)

    def _path(self, client: int) -> Path:
        return self.folder / f"client-{client}.safetensors"

    def _env(self, client: int, round: int) -> ClientEnv:
        return ClientEnv(
            client=client,
            round=round,
            seed=derive_seed(self.seed, "client", client, round),
            model=self.model,
            items=self.data[client],
            pad_id=self.pad_id,
            state=None,
            memory=MemoryMeter(self.device),
            device=self.device,
            store=Store(),
            batching=self.batching,
        )


def _zeros(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(w, requires_grad=False) for name, w in weights.items()}


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
