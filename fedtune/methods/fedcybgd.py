"""FedCyBGD: all parameters tuned, one block a client, one client after another; and FedBAvg beside it.

Wang, Wang and Tang, "Save It All: Enabling Full Parameter Tuning for Federated Large Language Models via
Cycle Block Gradient Descent" (2024).

    π           = blocks of each turn                             Algorithm 1, line 2    `block_order.turn`
    C(θ)_i      = own block whole, others compressed              line 4, Eq. 5, 6       `plan`
    Δ_i         = θ_πi(K) − θ_πi(0), K local steps                lines 5 to 9           `client_step`
    θ_πi(t+1)   ← θ_πi(t) + Δ_i, before the next client's turn    line 11, η = 1         `server_step`

A round is a cycle: every client of the cohort once, in an order drawn anew. `fedbavg` is the paper's
Figure 1: in each round all clients train the same blocks and the server averages their changes.

A classification head trains with every block. A client keeps what it was sent; the server sends only the
parts that a client does not have in the version and shape it needs.

Decisions where the paper is silent: where clients and blocks are not as many, passes over the blocks go on
from cycle to cycle; a client with several blocks trains them one after another, each with its own optimiser
state; importance for `hybrid` (Eq. 6) comes from the client that has just trained the block, on its own
examples, as one number a head and a channel.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self, cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune.core.aggregate import LIMIT, WeightedSum
from fedtune.core.client import ClientError
from fedtune.core.seeds import numpy_generator, torch_generator
from fedtune.core.types import (
    Arrival,
    ClientEnv,
    ClientResult,
    Cohort,
    Order,
    Payload,
    Reply,
    ServerEnv,
    TensorSpec,
)
from fedtune.data.batches import collate
from fedtune.errors import InputError
from fedtune.methods.block_order import BlockOrder, turn
from fedtune.methods.block_training import train_blocks
from fedtune.methods.local_training import Training
from fedtune.methods.powersgd import PowerSGD
from fedtune.models.blocks import find_blocks
from fedtune.models.compression import Compression, architecture, assemble, check_drop, choose_blocks
from fedtune.models.parts import CLASSIFIER, Parts, check_around, find_parts, full_name
from fedtune.models.pruning import best, find_attention, find_mlp, group_scores, prune_groups

log = logging.getLogger("fedtune")

ARCHITECTURE, HEADS, CHANNELS = "architecture", "heads", "channels"  # on the wire beside "part:name"
_PRUNED = "p"  # behind a version's number


class Config(Training):
    """Settings of `method.name: fedcybgd`."""

    name: Literal["fedcybgd", "fedbavg"] = "fedcybgd"  # the method
    rounds: int = Field(3, ge=1)  # cycles; of fedbavg, rounds of one turn each
    blocks_per_client: int = Field(1, ge=1)  # blocks that a client trains in its turn
    block_order: BlockOrder = "ascending"  # of each pass over the blocks
    extra_blocks: list[Literal["embeddings", "norm", "head"]] = Field([])  # trained too, behind the blocks
    compression: Compression = "none"  # of what a client gets beside its own blocks
    drop_ratio: float = Field(0.5, ge=0, lt=1)  # layer-drop, hybrid: of the blocks that may be dropped
    prune_ratio: float = Field(0.5, ge=0, lt=1)  # hybrid: of the heads and MLP channels of updated blocks
    importance_examples: int = Field(10, ge=1)  # hybrid: of the client's own, for first-order importance
    powersgd: PowerSGD | None = None  # gradients pass a low-rank filter before the optimiser
    gradient_checkpointing: bool = False  # activations of a block are computed again in the backward pass

    @field_validator("extra_blocks")
    @classmethod
    def _once(cls, extra: list[str]) -> list[str]:
        if len(set(extra)) < len(extra):
            raise ValueError(f"each part once, got {', '.join(extra)}")
        return extra


class FedBAvgConfig(Config):
    """Settings of `method.name: fedbavg`."""

    name: Literal["fedcybgd", "fedbavg"] = "fedbavg"

    @model_validator(mode="after")
    def _no_cycle(self) -> Self:
        if self.compression == "hybrid":
            raise ValueError("compression: hybrid prunes what a cycle has updated; fedbavg has no cycle")
        return self


@dataclass(frozen=True)
class State:
    """The server's state.

    Attributes:
        weights: Parameters that are trained, by "part:name", in the model's dtype: what clients get.
        masters: Float32 values of those that have changed, where the model's dtype is narrower.
        versions: The turn, from 1, that last changed a part, by its name.
        held: What each client has, as JSON: the version of each part by its name.
        answered: The turn, from 1, of each client's last reply.
        heads, channels: What pruning keeps of a block in its present version, by its name.
        turns: Turns that are over, answered or not.
        missed: The last turn, from 1, that nobody answered; 0: none.
    """

    weights: dict[str, Tensor]
    masters: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    answered: dict[str, int] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)
    turns: int = 0
    missed: int = 0


class FedCyBGD:
    """FedCyBGD and FedBAvg; see the module's text."""

    pools_data = False
    uses_wire = True
    saves_merged = False
    sends_model = True

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self._seed = config, seed
        self.rounds = config.rounds
        self.arrival: Arrival = "in-turn" if config.name == "fedcybgd" else "any-order"
        self._server: _Server | None = None

    def prepare(self, server: ServerEnv) -> None:
        """The server needs nothing besides its state."""
        server.refuse_public(self.config.name)

    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The server's model; what no turn trains is frozen."""
        model = cast(PreTrainedModel, build())
        config, parts = self.config, find_parts(model)
        check_around(parts, config.extra_blocks, "method.extra_blocks")
        in_turn = [*map(str, range(parts.blocks)), *config.extra_blocks]
        if config.blocks_per_client > len(in_turn):
            raise InputError(
                f"method.blocks_per_client: {config.blocks_per_client}, but there are {len(in_turn)} blocks"
            )
        if config.compression != "none":
            check_drop(parts.blocks - min(config.blocks_per_client, parts.blocks), config.drop_ratio)
        if config.compression == "hybrid":
            for block in find_blocks(model).modules:  # what cannot be pruned is refused before any round
                find_attention(block)
                find_mlp(block)
        always = [CLASSIFIER] if CLASSIFIER in parts.parameters else []
        model.requires_grad_(False)
        for parameter in parts.named([*in_turn, *always]).values():
            parameter.requires_grad_(True)
        self._server = _Server(model, parts, in_turn, always)
        return model

    def init(self, model: nn.Module) -> State:
        """The model as it is."""
        return State({n: p.detach().cpu().clone() for n, p in self._at_server().trained().items()})

    def plan(self, state: State, round: int, cohort: Cohort) -> Iterator[Order]:
        """The order of the next client in the cycle; of fedbavg everyone's."""
        clients: Sequence[int] = cohort.clients
        if self.arrival == "in-turn":
            place = state.turns - (round - 1) * len(clients)
            assert 0 <= place < len(clients), "cohorts of all rounds are of one size"
            drawn = numpy_generator(self._seed, "client-order", round).permutation(len(clients))
            clients = [clients[drawn[place]]]
        server, own = self._at_server(), self._own(state)
        expects = self._expects(state, own)
        for client in clients:
            forms = self._forms(state, client, cohort)
            held = self._held(state, client, cohort)
            tensors = {ARCHITECTURE: architecture(server.model, [int(p) for p in forms if p.isdigit()])}
            for part, form in forms.items():
                if held.get(part) != form:
                    tensors |= server.tensors(state, part, pruned=form.endswith(_PRUNED))
            scalars = {"own": ",".join(own), "forms": _dumps(forms), "path": server.parts.path}
            yield Order(client, Payload(tensors, scalars), expects)

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        """Trains the client's own blocks on the model that it was sent; answers with what they changed by."""
        forms: dict[str, str] = json.loads(str(job.scalars["forms"]))
        own = str(job.scalars["own"]).split(",")
        kept, parts = _take_up(job, forms, env)
        model, parameters = self._client_model(job, parts, own, env)
        env = replace(env, model=model)
        always = [CLASSIFIER] if CLASSIFIER in forms else []
        update: dict[str, Tensor] = {}
        losses, steps = 0.0, 0
        for part in own:
            names = [n for n in parameters if n.partition(":")[0] in (part, *always)]
            block = {name: parameters[name] for name in names}
            start = {name: p.detach().to(torch.float32, copy=True) for name, p in block.items()}
            trained = train_blocks(
                replace(env, seed=env.derive_seed("block", part)),
                iter([block]),
                self.config,
                powersgd=self.config.powersgd,
            )
            for name, before in start.items():
                delta = (trained.weights[name] - before).cpu()
                update[name] = update[name] + delta if name in update else delta
            losses, steps = losses + trained.train_loss, steps + trained.steps
        scores = self._importance(own, list(parts), env) if self.config.compression == "hybrid" else {}
        metrics = {"train_loss": losses / len(own), "steps": steps}
        return ClientResult(Payload(update | scores), metrics, state=Payload(scalars=kept))

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        """Adds the change (fedbavg: the mean of all changes) to the blocks of this turn."""
        now, own = state.turns + 1, self._own(state)
        total: WeightedSum | None = None
        held, answered = dict(state.held), dict(state.answered)
        heads, channels = dict(state.heads), dict(state.channels)
        changes: dict[str, Tensor] = {}
        for reply in replies:
            if total is None:
                total = WeightedSum.empty(reply.cohort.total_examples)
                if self.arrival != "in-turn":
                    for client in reply.cohort.clients:  # who does not answer may have lost what it held
                        held.pop(str(client), None)
            before = self._held(state, reply.client, reply.cohort)
            held[str(reply.client)] = _dumps(before | self._forms(state, reply.client, reply.cohort))
            answered[str(reply.client)] = now
            sent = dict(reply.payload.tensors)
            for part in own:
                if f"{HEADS}:{part}" in sent:
                    heads[part] = best(sent.pop(f"{HEADS}:{part}"), self.config.prune_ratio)
                    channels[part] = best(sent.pop(f"{CHANNELS}:{part}"), self.config.prune_ratio)
            changes = sent
            if self.arrival != "in-turn":
                total = total.add(sent, reply.examples)
        if total is None:
            if self.arrival != "in-turn":
                raise ValueError("no client replied: there is nothing to average")
            log.warning("turn %d: nobody answered; block %s keeps its value", now, ", ".join(own))
            return replace(state, turns=now, missed=now)
        weights, masters = dict(state.weights), dict(state.masters)
        for name in changes:
            change = changes[name] if self.arrival == "in-turn" else total.mean(name)
            master = masters.get(name, weights[name].to(torch.float32)) + change
            weights[name] = master.to(weights[name].dtype)
            if weights[name].dtype != torch.float32:
                masters[name] = master
        versions = state.versions | dict.fromkeys([*own, *self._at_server().always], now)
        return State(weights, masters, versions, held, answered, heads, channels, now, state.missed)

    def export(self, state: State, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The whole model."""
        with torch.no_grad():
            for name, parameter in self._at_server().trained().items():
                parameter.copy_(state.weights[name])
        yield "global", model

    def _own(self, state: State) -> tuple[str, ...]:
        """The blocks of the turn that comes next."""
        config = self.config
        parts = self._at_server().in_turn
        return turn(parts, config.block_order, config.blocks_per_client, self._seed, state.turns)

    def _expects(self, state: State, own: Sequence[str]) -> dict[str, TensorSpec]:
        server = self._at_server()
        expects = {
            name: TensorSpec(torch.float32, tuple(parameter.shape), LIMIT)
            for name, parameter in server.parts.named([*own, *server.always]).items()
        }
        if self.config.compression == "hybrid":
            for part in filter(str.isdigit, own):
                block = find_blocks(server.model).modules[int(part)]
                sizes = ((HEADS, find_attention(block).groups), (CHANNELS, find_mlp(block).width))
                for kind, size in sizes:
                    expects[f"{kind}:{part}"] = TensorSpec(torch.float32, (size,), at_least=0.0)
        return expects

    def _forms(self, state: State, client: int, cohort: Cohort) -> dict[str, str]:
        """The version and shape in which a client needs each part for the turn that comes next."""
        server, config = self._at_server(), self.config
        cycle = state.turns // len(cohort.clients)
        own = {int(part) for part in self._own(state) if part.isdigit()}
        updated = {
            int(part)
            for part, at in state.versions.items()
            if part.isdigit() and (at - 1) // len(cohort.clients) == cycle
        }
        generator = torch_generator(self._seed, "drop", state.turns, client)
        blocks = choose_blocks(
            server.parts.blocks, own, updated, config.compression, config.drop_ratio, generator
        )
        around = {part: False for part in server.parts.parameters if not part.isdigit()}
        wanted = {**{str(block): pruned for block, pruned in blocks.items()}, **around}
        return {p: f"{state.versions.get(p, 0)}{_PRUNED if pruned else ''}" for p, pruned in wanted.items()}

    def _held(self, state: State, client: int, cohort: Cohort) -> dict[str, str]:
        """What a client still has. Who did not answer in a cycle with a missed turn may be who missed it."""
        name, size = str(client), len(cohort.clients)
        if name not in state.held:
            return {}
        in_turn = self.arrival == "in-turn"
        if in_turn and state.missed and (state.answered[name] - 1) // size < (state.missed - 1) // size:
            return {}
        held: dict[str, str] = json.loads(state.held[name])
        return held

    def _client_model(
        self,
        job: Payload,
        parts: Mapping[str, Mapping[str, Tensor]],
        own: Sequence[str],
        env: ClientEnv,
    ) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
        """A client's model, and what it trains of it by "part:name". Frozen parts are what it holds."""
        trains = {*own, CLASSIFIER}
        tensors = {
            part: {n: t.clone() for n, t in named.items()} if part in trains else named
            for part, named in parts.items()
        }
        path, blocks = str(job.scalars["path"]), [part for part in parts if part.isdigit()]
        model = assemble(job.tensors[ARCHITECTURE], path, tensors)
        model.to(env.device)  # type: ignore[arg-type]  # declared on a wrapper without self
        if self.config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        parameters = {}
        known = dict(model.named_parameters())
        for part in (*own, *(p for p in parts if p == CLASSIFIER)):
            index = blocks.index(part) if part.isdigit() else 0
            for inner in parts[part]:
                name = full_name(part, inner, path, index)
                if name in known:  # the others are buffers
                    parameters[f"{part}:{inner}"] = known[name]
        return model, parameters

    def _importance(self, own: Sequence[str], parts: Sequence[str], env: ClientEnv) -> dict[str, Tensor]:
        """First-order importance of heads and channels of the blocks just trained, on some own examples."""
        count = min(self.config.importance_examples, len(env.items))
        drawn = torch.randperm(len(env.items), generator=env.generator("importance"))[:count].tolist()
        modules, blocks = find_blocks(env.model).modules, [part for part in parts if part.isdigit()]
        scores: dict[str, Tensor] = {}
        for part in filter(str.isdigit, own):
            block = modules[blocks.index(part)].requires_grad_(True)
            for at in range(0, count, self.config.batch_size):
                batch = collate([env.items[i] for i in drawn[at : at + self.config.batch_size]], env.pad_id)
                with env.memory.step(batch["input_ids"].numel(), resident=[env.model]):
                    share = len(batch["input_ids"]) / count
                    loss = env.model(**{key: value.to(env.device) for key, value in batch.items()}).loss
                    (loss * share).backward()
            weights = {name: p.detach() for name, p in block.named_parameters()}
            gradients = {
                n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in block.named_parameters()
            }
            found = group_scores(block, weights, gradients)
            scores[f"{HEADS}:{part}"], scores[f"{CHANNELS}:{part}"] = (s.cpu() for s in found)
            block.requires_grad_(False)
            block.zero_grad(set_to_none=True)
        return scores

    def _at_server(self) -> _Server:
        assert self._server is not None, "client_model comes first"
        return self._server


@dataclass(frozen=True)
class _Server:
    """The server's model by part, the parts that turns go over, and those that train with every one."""

    model: PreTrainedModel
    parts: Parts
    in_turn: list[str]
    always: list[str]

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by "part:name"."""
        return self.parts.named([*self.in_turn, *self.always])

    def tensors(self, state: State, part: str, *, pruned: bool) -> dict[str, Tensor]:
        """A part as a client gets it, by "part:name"."""
        found = {n: state.weights.get(f"{part}:{n}", t) for n, t in self.parts.tensors(part).items()}
        if pruned:
            block = find_blocks(self.model).modules[int(part)]
            found = prune_groups(block, found, state.heads[part], state.channels[part])
        return {f"{part}:{name}": tensor for name, tensor in found.items()}


def _take_up(
    job: Payload, forms: Mapping[str, str], env: ClientEnv
) -> tuple[dict[str, str], dict[str, Mapping[str, Tensor]]]:
    """What the client holds from now on, version and digest by part, and the tensors of those it needs now.

    Raises:
        ClientError: It does not have what the server says it has.
    """
    came: dict[str, dict[str, Tensor]] = {}
    for name, tensor in job.tensors.items():
        part, colon, inner = name.partition(":")
        if colon:
            came.setdefault(part, {})[inner] = tensor
    kept = {part: str(what) for part, what in env.state.scalars.items()} if env.state else {}
    parts: dict[str, Mapping[str, Tensor]] = {}
    for part, form in forms.items():
        if part in came:
            kept[part] = f"{form} {env.store.put(Payload(came[part]))}"
            parts[part] = came[part]
            continue
        version, _, key = kept.get(part, "").partition(" ")
        payload = env.store.get(key) if version == form else None
        if payload is None:
            raise ClientError(f"it does not have part {part} any more; all parts will be sent again")
        parts[part] = payload.tensors
    return kept, parts


def _dumps(forms: Mapping[str, str]) -> str:
    return json.dumps(forms, separators=(",", ":"))
