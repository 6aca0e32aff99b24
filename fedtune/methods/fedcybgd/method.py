"""FedCyBGD: all parameters tuned, one block a client, one client after another; and FedBAvg beside it.

Wang, Wang and Tang, "Save It All: Enabling Full Parameter Tuning for Federated Large Language Models via
Cycle Block Gradient Descent" (2024).

    π           = blocks of each turn                           Algorithm 1, line 2  `turn`, order.py
    C(θ)_i      = own block whole, others compressed            line 4, Eq. 5, 6     `plan`, server.py
    Δ_i         = θ_πi(K) − θ_πi(0), K local steps              lines 5 to 9         `client_step`, client.py
    θ_πi(t+1)   ← θ_πi(t) + Δ_i, before the next client's turn  line 11, η = 1       `server_step`

A round is a cycle: every client of the cohort once, in an order drawn anew. `fedbavg` is the paper's
Figure 1: in each round all clients train the same blocks and the server averages their changes.

A classification head trains with every block. A client keeps what it was sent; the server sends only the
parts that a client does not have in the version and shape it needs. With `trainable: lora` or `adapter` a
block's weights stay as they are and what is added to it takes its place (Table 6, rows ii and iii).

Decisions where the paper is silent: where clients and blocks are not as many, passes over the blocks go on
from cycle to cycle; a client with several blocks trains them one after another, each with its own optimiser
state; importance for `hybrid` (Eq. 6) comes from the client that has just trained the block, on its own
examples, as one number a head and a channel; with LoRA or adapters a dropped block takes them along.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedtune.core.aggregate import WeightedSum
from fedtune.core.cohort import Cohort
from fedtune.core.robust import MeanName, Updates
from fedtune.core.seeds import derive_seed, numpy_generator, torch_generator
from fedtune.core.types import ArrivalOrder, ClientEnv, ClientResult, Order, Payload, Reply, ServerEnv
from fedtune.methods.fedcybgd.client import CHANNELS, HEADS, client_turn
from fedtune.methods.fedcybgd.order import turn
from fedtune.methods.fedcybgd.server import ServerModel
from fedtune.methods.fedcybgd.settings import Config
from fedtune.methods.fedcybgd.state import State
from fedtune.models.pruning import best

log = logging.getLogger("fedtune")


class FedCyBGD:
    """FedCyBGD and FedBAvg; see the module's text."""

    pools_data = False
    uses_wire = True
    saves_merged = False
    sends_model = True

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self._seed = config, seed
        self.rounds = config.rounds
        self.arrival: ArrivalOrder = "in-turn" if config.name == "fedcybgd" else "any-order"
        self._server: ServerModel | None = None

    def prepare(self, server: ServerEnv) -> None:
        """The server needs nothing besides its state."""
        server.refuse_public(self.config.name)

    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The server's model; what no turn trains is frozen."""
        model = self.config.attach(build(), derive_seed(self._seed, "adapter"))
        self._server = ServerModel.of(model, self.config)
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
        expects = server.expects(own)
        for client in clients:
            forms = self._forms(state, client, cohort)
            tensors = server.tensors(state, forms, self._held(state, client, cohort))
            scalars = {"own": ",".join(own), "forms": _dumps(forms), "path": server.parts.path}
            yield Order(client, Payload(tensors, scalars), expects)

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        """Trains the client's own blocks on the model that it was sent; answers with what they changed by."""
        return client_turn(job, env, self.config)

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
        weights = dict(state.weights)
        for name in changes:
            change = changes[name] if self.arrival == "in-turn" else total.mean(name)
            weights[name] = weights[name].to(torch.float32) + change
        versions = state.versions | dict.fromkeys([*own, *self._at_server().always], now)
        return State(weights, versions, held, answered, heads, channels, now, state.missed)

    def mean_refusal(self, mean: MeanName) -> str | None:
        """A cycle has one client a block: there is no mean. In fedbavg there is."""
        if mean != "weighted" and self.arrival == "in-turn":
            return "one client a turn trains a block, and no mean is taken; take max_norm, or fedbavg"
        return None

    def bound_refusal(self, *, quantile: bool) -> str | None:
        """A turn's change can be held to a fixed norm; others to compare it with there are none."""
        if quantile and self.arrival == "in-turn":
            return "one client a turn trains a block: there are no other norms in it; take max_norm"
        return None

    def updates(self) -> Updates:
        """The change of the turn's blocks; what a client says of heads and channels is beside it."""
        return Updates(lambda name: "" if name.startswith((f"{HEADS}:", f"{CHANNELS}:")) else "update")

    def compression_refusal(self, *, sparse: bool, feedback: bool) -> str | None:
        """A client has another block in each turn."""
        if feedback:
            return (
                "a client has another block in each turn, and what one lost would wait until that comes "
                "again, in the memory of as many blocks; leave error_feedback out"
            )
        return None

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

    def _forms(self, state: State, client: int, cohort: Cohort) -> dict[str, str]:
        """The form in which a client needs each part for the turn that comes next."""
        cycle = state.turns // len(cohort.clients)
        updated = {
            int(part)
            for part, at in state.versions.items()
            if part.isdigit() and (at - 1) // len(cohort.clients) == cycle
        }
        generator = torch_generator(self._seed, "drop", state.turns, client)
        return self._at_server().forms(self._own(state), updated, state.versions, generator)

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

    def _at_server(self) -> ServerModel:
        assert self._server is not None, "client_model comes first"
        return self._server


def _dumps(forms: Mapping[str, str]) -> str:
    return json.dumps(forms, separators=(",", ":"))
