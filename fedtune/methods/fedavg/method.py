"""FedAvg in every form the papers compare, and one-shot federated fine-tuning, which is its one-round case.

McMahan et al. (2017); Wang et al., "One-shot Federated Learning Methods" for foundation models: one
round of T·k local epochs instead of T rounds of k, synchronous or asynchronous.

    w(t+1) = server(w(t), Σ p_i Δ_i),   p_i = n_i / Σ n over the clients that replied       `server_step`
    Δ_i    = local training from w(t) on client i's examples                                `client_step`

Settings: FedProx (`proximal`), FedAvgM and FedAdam (`server_optimizer`), DiLoCo (Douillard et al. 2023: that
of Nesterov, and `keep_optimizer`), SCAFFOLD (`control_variates`, Karimireddy et al. 2020, option II), LoRA
factors averaged, stacked or with A frozen (`aggregation`), or as flexlora.py, fedex_lora.py, lora_fair.py,
rolora.py and hetlora.py have it. Clients' own parts and models: own_parts.py, ditto.py and fine_tuning.py.
Steps after k updates in place of rounds (`buffer`): fedbuff.py. Servers of regions: hierarchical.py.

Asynchronous one-shot folds each arrival in at once: after m' of m arrivals the model is
w + Σ p_i Δ_i over those m', and after all m it has the bits of the synchronous mean, because the sum is
exact (`core/aggregate.py`).

Deviations: clients send updates, not weights (same bytes; a bfloat16 update keeps eight more bits of
what training did than a bfloat16 weight would); SCAFFOLD's model update is weighted by examples like
every other, its control variates are averaged evenly as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from fedtune.core.aggregate import FRACTION_BITS, LIMIT, WeightedSum
from fedtune.core.cohort import Cohort
from fedtune.core.relaying import Relayed
from fedtune.core.robust import MeanName, Updates
from fedtune.core.seeds import derive_seed
from fedtune.core.types import (
    ArrivalOrder,
    ClientEnv,
    ClientResult,
    Order,
    Payload,
    Reply,
    ServerEnv,
    Summed,
    TensorSpec,
)
from fedtune.measure.memory import Resident
from fedtune.methods.fedavg import (
    fedbuff,
    from_factors,
    hierarchical,
    own_parts,
    personal,
    refusals,
    robust,
    rolora,
    telling,
)
from fedtune.methods.fedavg import lora_aggregation as lora
from fedtune.methods.fedavg.hetlora import SelfPruning
from fedtune.methods.fedavg.hierarchical import region_of
from fedtune.methods.fedavg.settings import FROM_FACTORS, Config
from fedtune.methods.fedavg.state import State
from fedtune.methods.loading import load
from fedtune.methods.local_training import Trained, train
from fedtune.models.lora import lora_layers
from fedtune.models.tuning import trainable

CONTROL, PRODUCT = "control:", "product:"  # prefixes on the wire beside the weights' own names


class FedAvg:
    """FedAvg and one-shot; see the module's text."""

    pools_data = False
    uses_wire = True
    sends_model = False
    unit = 2.0**-FRACTION_BITS

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self._seed = config, seed
        self.rounds = config.rounds + (config.fine_tune is not None)
        self.personal = config.personal
        self.saves_merged = config.aggregation in ("stack", "residual")
        self.arrival: ArrivalOrder = (
            "one-by-one"
            if config.arrival == "asynchronous"
            else "plan-order"
            if config.aggregation in FROM_FACTORS
            else "any-order"
        )

    def prepare(self, server: ServerEnv) -> None:
        """The server needs nothing besides its state."""
        server.refuse_public(self.config.name)

    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The whole model, with the adapter where one is trained."""
        model = self.config.attach(build(), derive_seed(self._seed, "adapter"))
        if self.config.aggregation == "freeze-a":
            for name, parameter in trainable(model).items():
                parameter.requires_grad_(not name.endswith(lora.A))
        own_parts.chosen(trainable(model), self.config.own)
        return model

    def init(self, model: nn.Module) -> State:
        """The state before the first round: the model as it is, without what stays with clients."""
        parameters = trainable(model)
        own = own_parts.chosen(parameters, self.config.own)
        parameters = {name: p for name, p in parameters.items() if name not in own}
        weights = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in parameters.items()}
        return State(
            weights,
            {name: str(p.dtype).removeprefix("torch.") for name, p in parameters.items()},
            scaling={name: float(layer.scaling["default"]) for name, layer in lora_layers(model).items()},
            control={n: torch.zeros_like(w) for n, w in weights.items()}
            if self.config.control_variates
            else {},
        )

    def plan(self, state: State, round: int, cohort: Cohort) -> Iterator[Order]:
        """Everyone in the cohort gets the global weights, cut to its rank."""
        weights, tuning = state.sent(), self.asks_all(round)
        ranks = {client: state.ranks.get(str(client), self._rank(client)) for client in cohort.clients}
        if self.config.aggregation == "stack":  # every client draws its own fresh factors
            down = {name: w for name, w in weights.items() if not lora.is_factor(name)}
            down |= {PRODUCT + name: t for name, t in state.product.items()}
            payloads = dict.fromkeys(ranks.values(), Payload(down))  # the product is whole for every rank
        else:
            down = weights | {CONTROL + name: c for name, c in state.control.items()}
            down |= {PRODUCT + name: t for name, t in state.product.items()}
            payloads = {rank: Payload(lora.cut(down, rank) if rank else down) for rank in set(ranks.values())}
            if self.config.aggregation == "alternate":
                weights = rolora.moving(weights, round)
        own = dict[int, Payload]()  # where not all get the newest weights
        if self.config.buffer:
            own = fedbuff.sent(state, {client: fedbuff.begun(state, client) for client in ranks}, ranks)
        elif self.config.regions:
            regions = self.config.regions
            own = fedbuff.sent(state, {client: region_of(client, regions) for client in ranks}, ranks)
        for client in cohort.clients:
            rank = ranks[client]
            up = (lora.cut(weights, rank) if rank else weights) | {
                CONTROL + name: c for name, c in state.control.items()
            }
            expects = {name: TensorSpec(t.dtype, tuple(t.shape), LIMIT) for name, t in up.items()}
            yield Order(client, own.get(client, payloads[rank]), {} if tuning else expects)

    def asks_all(self, round: int) -> bool:
        """Of the round of fine-tuning, which is of every client's model."""
        return round > self.config.rounds

    def loss_refusal(self) -> str | None:
        """See telling.py."""
        return telling.refusal(self.config)

    def client_loss(self, job: Payload, env: ClientEnv, examples: int | None) -> float:
        """See telling.py."""
        weights, product, _ = _parts(job)
        return telling.loss_of(env, self.config, weights, product, examples)

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        """Local training from the received weights; returns the update (or the trained factors to stack)."""
        if not self.personal:
            return self._step(job, env)[0]
        received = lora.pad(_parts(job)[0], trainable(env.model))
        shared = partial(self._step, job)
        return personal.step(env, self.config, received, shared, tunes=self.asks_all(env.round))

    def _step(
        self, job: Payload, env: ClientEnv, beside: Sequence[Resident] = ()
    ) -> tuple[ClientResult, Trained]:
        parameters = trainable(env.model)
        weights, product, control = _parts(job)
        if self.config.aggregation == "stack":
            fresh = lora.fresh(parameters, env.generator("factors"))
            weights |= lora.cut(fresh, self._rank(env.client)) if self._rank(env.client) else fresh
        start = lora.pad(weights, parameters)
        load(parameters, start)
        own = dict(env.state.tensors) if env.state else {n: torch.zeros_like(c) for n, c in control.items()}
        prune = self.config.prune
        pruning = SelfPruning(prune, weights, parameters) if prune else None
        alternates = self.config.aggregation == "alternate"
        turn = rolora.in_turn(parameters, env.round) if alternates else nullcontext(parameters)
        with lora.folded(env.model, product) if product else nullcontext(), turn as moving:
            trained = train(
                env,
                moving,
                self.config,
                proximal=self.config.proximal,
                correction={name: c - own[name] for name, c in control.items()},
                penalty=pruning.penalty if pruning else None,
                keeps=self.config.keep_optimizer,
                beside=beside,
            )

        now = pruning.settled(trained.weights) if pruning else trained.weights

        def delta(name: str) -> Tensor:  # from the start as float32: bfloat16 weights widen without loss
            return now[name].cpu() - start[name].to(torch.float32)

        up: dict[str, Tensor] = {}
        for name, received in weights.items():
            if name not in moving:
                continue
            whole = trained.weights[name].cpu() if self._sends_factor(name) else delta(name)
            up[name] = lora.cut_like(whole, received).to(received.dtype)
        if not control:
            return ClientResult(Payload(up), trained.metrics, trained.kept), trained
        renewed = {  # option II: c_i ← c_i − c + (w(t) − w_i) / Σ rates
            name: own[name] - c - delta(name) / trained.rate_sum for name, c in control.items()
        }
        up |= {CONTROL + name: renewed[name] - own[name] for name in renewed}
        return ClientResult(Payload(up), trained.metrics, state=Payload(renewed)), trained

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        """Folds the replies in; memory is one sum of 8 bytes a parameter, whatever the number of replies."""
        if self.config.aggregation in FROM_FACTORS:
            return from_factors.advanced(state, replies, self.config)
        if self.config.regions:
            nothing = WeightedSum(1, 0, {})
            advance = partial(self._advance, control=nothing)
            return hierarchical.advanced(state, replies, self.config.regions, advance)
        total, tuned = cast(WeightedSum | None, None), False
        control: WeightedSum | None = None
        asked: Cohort | None = None
        for reply in replies:
            if not reply.payload.tensors:
                tuned = True
                continue
            if total is None:
                total = WeightedSum(reply.cohort.total_examples, state.weight, dict(state.sums))
                control = WeightedSum.empty(reply.cohort.population)
            assert control is not None
            update = {n: t for n, t in reply.payload.tensors.items() if not n.startswith(CONTROL)}
            if self.config.buffer:
                stale = state.steps - fedbuff.begun(state, reply.client)
                update = fedbuff.weighed(update, stale, self.config.buffer.staleness)
                asked = reply.cohort
            total = total.add(lora.pad(update, state.weights), reply.examples)
            control = control.add(
                {
                    n.removeprefix(CONTROL): t
                    for n, t in reply.payload.tensors.items()
                    if n.startswith(CONTROL)
                },
                1,
            )
            del reply, update  # not in memory beside the next one
        if total is None and tuned:  # clients' models, which stay where they are
            return state
        if total is None or control is None:
            raise ValueError("no client replied: there is nothing to average")
        new = self._advance(state, total, control)
        if asked is None:
            return new
        begun, versions = fedbuff.stepped(state, asked.clients, asked.population)
        return replace(new, steps=state.steps + 1, begun=begun, versions=versions)

    def relayed(self, state: State, cohort: Cohort, replied: Sequence[int]) -> Iterator[Relayed]:
        """See hierarchical.py."""
        if self.config.regions and not self.asks_all(state.steps + 1):
            sent = state.sent()
            yield from hierarchical.relayed(state, sent, self.config.regions, cohort, replied)

    def chooses(self, round: int, clients: Sequence[int]) -> tuple[int, ...] | None:
        """Those whose updates fill the buffer; None: a round is of whoever is asked."""
        buffer = self.config.buffer
        return fedbuff.arrivals(clients, buffer.seconds, buffer.size, round)[0] if buffer else None

    def sum_refusal(self, *, privacy: bool) -> str | None:
        """See refusals.py."""
        return refusals.of_sums(self.config, privacy=privacy)

    def mean_refusal(self, mean: MeanName) -> str | None:
        """See refusals.py."""
        return refusals.of_means(self.config, mean)

    def bound_refusal(self, *, quantile: bool) -> str | None:
        """See refusals.py."""
        return refusals.of_bounds(self.config, quantile=quantile)

    def updates(self) -> Updates:
        """See robust.py."""
        stacked = self.config.aggregation == "stack"
        return robust.updates(self.config.lora, stacked=stacked, control=CONTROL)

    def compression_refusal(self, *, sparse: bool, feedback: bool) -> str | None:
        """See refusals.py."""
        return refusals.of_compression(self.config, sparse=sparse, feedback=feedback)

    def sum_shapes(self, state: State) -> dict[str, tuple[int, ...]]:
        """The global weights', and the control variates'."""
        shapes = {name: tuple(w.shape) for name, w in state.weights.items()}
        return shapes | {CONTROL + name: tuple(c.shape) for name, c in state.control.items()}

    def summand(
        self,
        payload: Payload,
        *,
        weight: int,
        total: int,
        population: int,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Tensor]:
        """The integers that `server_step` would add up for this reply."""
        like = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        update = {n: t for n, t in payload.tensors.items() if not n.startswith(CONTROL)}
        control = {n: t for n, t in payload.tensors.items() if n.startswith(CONTROL)}
        sums = WeightedSum.empty(total).add(lora.pad(update, like), weight).sums
        return sums | WeightedSum.empty(population).add(control, 1).sums

    def sum_step(self, state: State, total: Summed) -> State:
        """The step that `server_step` makes, from the sum."""
        control = {n.removeprefix(CONTROL): t for n, t in total.sums.items() if n.startswith(CONTROL)}
        weights = {n: t for n, t in total.sums.items() if not n.startswith(CONTROL)}
        return self._advance(
            state,
            WeightedSum(total.total, total.weight, weights),
            WeightedSum(total.population, len(total.clients), control),
        )

    def _advance(self, state: State, total: WeightedSum, control: WeightedSum) -> State:
        renewed = {name: c + control.scaled(name) for name, c in state.control.items()}  # c + 1/N Σ Δc_i
        if self.config.arrival == "asynchronous":
            start = state.start or state.weights
            weights, _ = self._apply(start, total, {})
            return replace(state, weights=weights, start=start, sums=total.sums, weight=total.weight)
        weights, moments = self._apply(state.weights, total, state.moments)
        return replace(state, weights=weights, moments=moments, control=renewed)

    def export(self, state: State, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The global model."""
        parameters = trainable(model)
        if not self.saves_merged:
            load(parameters, state.weights)
            yield "global", model
            return
        product, factors = state.product, {n: w for n, w in state.weights.items() if lora.is_factor(n)}
        if self.config.aggregation == "residual":  # all of it on the base: merging rounds once
            product = lora.stack(product, [(factors, 1)], state.scaling)
        load(parameters, {name: torch.zeros_like(factor) for name, factor in factors.items()})
        load(parameters, {n: w for n, w in state.weights.items() if not lora.is_factor(n)})
        with lora.folded(model, product):
            yield "global", model

    def client_models(
        self, state: State, clients: Mapping[int, Payload], model: nn.Module
    ) -> Iterator[tuple[str, nn.Module]]:
        """The global weights with what each client keeps of its own."""
        return own_parts.models(state.weights, clients, model)

    def _apply(
        self, weights: Mapping[str, Tensor], total: WeightedSum, moments: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        new: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if name not in total.sums:  # not trained in this round
                new[name] = weight
                continue
            mine = {m: moments[f"{m}/{name}"] for m in ("m", "v") if f"{m}/{name}" in moments}
            new[name], moved = self.config.server_optimizer.step(weight, total.mean(name), mine)
            kept |= {f"{m}/{name}": t for m, t in moved.items()}
            if self.config.arrival != "asynchronous":  # nothing is added to it any more: 8 bytes for 4
                del total.sums[name]
        return new, kept

    def _sends_factor(self, name: str) -> bool:
        return self.config.aggregation == "stack" and lora.is_factor(name)

    def _rank(self, client: int) -> int:
        """The LoRA rank of a client where ranks differ, else 0."""
        ranks = self.config.lora.client_ranks if self.config.lora else None
        return ranks[client % len(ranks)] if ranks else 0


def _parts(job: Payload) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What an order has: weights, what is added to the base weights, and SCAFFOLD's c."""
    product, control = (
        {n.removeprefix(prefix): t for n, t in job.tensors.items() if n.startswith(prefix)}
        for prefix in (PRODUCT, CONTROL)
    )
    return {n: t for n, t in job.tensors.items() if not n.startswith((CONTROL, PRODUCT))}, product, control
