"""FedKSeed without a server: peers pass their K-vectors on to neighbours (`graph`).

Qin et al. (2024), Appendix B.2: clients that aggregate among themselves send what they know to several
receivers, which K numbers allow. The paper gives no algorithm. Here, in each round,

    b_j = a_j + Σ ĝ of peer j's τ steps from a_j                      `client_step` in method.py
    a_i ← Σ_j w_ij b_j over peer i and its neighbours                 `mixed`
    w_ij = n_j / max(S_i, S_j),  w_ii = 1 − Σ w_ij                    `shares`
    S_i  = Σ n over peer i and its neighbours

These are Metropolis weights (Xiao and Boyd, 2004) for unlike n: Σ_i n_i w_ij = n_j, so that the mean of the
a_i by examples moves as one accumulator would, whatever the graph. Where all are neighbours w_ij is c_j, and
every peer's a has the bits of Algorithm 1's. Neighbours are those of a round's cohort that replied.

A message is a peer's a with the seeds and ĝ of its steps, not their sum: so nothing is rounded twice. In
simulation, and over a network, the server hands messages on and computes nothing that a peer needs: `down`
of the ledger is what peers get from their neighbours, `up` a message once, which over direct links goes to
each of them. A peer that was away in the last round gets the a that it had, as from its own disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from fedtune.core.seeds import numpy_generator
from fedtune.core.types import ClientError, Payload, Reply
from fedtune.methods.fedkseed.aggregation import SUM_LIMIT, UNIT, units
from fedtune.methods.fedkseed.settings import Config
from fedtune.methods.fedkseed.state import State

Graph = Literal["ring", "full", "random"]
Neighbours = Mapping[int, Sequence[int]]
LIMIT = SUM_LIMIT / 4  # of an a: differences and a client's slopes together have room in a sum


@dataclass(frozen=True)
class Message:
    """What a peer passes on.

    Attributes:
        accumulator: a that its steps began with, float32 (K).
        seeds: What it drew, int64 (draws).
        scalars: ĝ of each over `perturbations`, float64 (draws).
    """

    accumulator: Tensor
    seeds: Tensor
    scalars: Tensor


def neighbours(graph: Graph, clients: Sequence[int], degree: int, seed: int, round: int) -> Neighbours:
    """Who passes on to whom, in both directions, by client.

    Args:
        graph: `ring`: the next and the one before, by number; `full`: all; `random`: anew in each round,
            `degree` others that a peer draws, and those that drew it.
        clients: Who is there.
        degree: Others that each draws; at most all.
        seed: Of the draws.
        round: The round.
    """
    there = sorted(clients)
    found = {client: set[int]() for client in there}
    rng = numpy_generator(seed, "graph", round)
    for place, client in enumerate(there):
        others = [other for other in there if other != client]
        if graph == "ring":
            others = [there[place - 1], there[(place + 1) % len(there)]] if others else []
        elif graph == "random":
            others = [others[i] for i in rng.permutation(len(others))[:degree]]
        for other in others:
            found[client].add(other)
            found[other].add(client)
    return {client: sorted(others) for client, others in found.items()}


def shares(graph: Neighbours, examples: Mapping[int, int]) -> dict[int, list[float]]:
    """w_ii, then w_ij of each neighbour in order, by client."""
    around = {i: examples[i] + sum(examples[j] for j in others) for i, others in graph.items()}
    found = {}
    for i, others in graph.items():
        each = [Fraction(examples[j], max(around[i], around[j])) for j in others]
        found[i] = [float(share) for share in (1 - sum(each), *each)]
    return found


def mixed(own: Message, others: Sequence[Message], weights: Sequence[float]) -> Tensor:
    """A peer's next a, float32 (K).

    Args:
        own: Its message.
        others: Its neighbours'.
        weights: w_ii, then w_ij of each.
    """
    total = torch.zeros(own.accumulator.shape, dtype=torch.int64)
    for message, weight in zip((own, *others), weights, strict=True):
        total.index_add_(0, message.seeds, units(message.scalars, weight))
        apart = message.accumulator.double() - own.accumulator.double()
        total += units(apart, weight)  # of its own exactly 0
    return own.accumulator + (total.double() * UNIT).float()


def packed(messages: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Messages of neighbours, and what each counts, as an order brings them."""
    names = messages[0].keys() if messages else ()
    stacked = {f"neighbours:{name}": torch.stack([m[name] for m in messages]) for name in names}
    return {**stacked, "shares": torch.tensor(weights, dtype=torch.float64)}


def unpacked(job: Payload) -> Iterator[dict[str, Tensor]]:
    """The messages that `packed` took, one after another.

    Raises:
        ClientError: The order's parts are of unlike numbers of neighbours.
    """
    prefix, count = "neighbours:", len(job.tensors["shares"]) - 1
    parts = {name: t for name, t in job.tensors.items() if name.startswith(prefix)}
    if any(len(part) != count for part in parts.values()):
        raise ClientError("its order has not as many messages of neighbours as it has shares of them")
    for place in range(count):
        yield {name.removeprefix(prefix): part[place] for name, part in parts.items()}


class Relay:
    """What the server does: it hands on what each peer is to get.

    Args:
        config: The method's, with a `graph`.
        seed: As of `neighbours`.
        message: What a peer's reply says.
    """

    def __init__(self, config: Config, seed: int, message: Callable[[Mapping[str, Tensor]], Message]) -> None:
        assert config.graph is not None
        self._graph: Graph = config.graph
        self._config, self._seed, self._message = config, seed, message

    def orders(self, state: State, clients: Sequence[int]) -> Iterator[tuple[int, dict[str, Tensor], Tensor]]:
        """For each client what it is sent, and the a, float32 (K), that it comes to."""
        graph, weights = self._round(state)
        for client in clients:
            own = state.peers.get(str(client), torch.zeros(self._config.seeds))
            sent = {"accumulator": own}
            if client in graph:
                messages = [_sent(state, other) for other in graph[client]]
                sent = packed(messages, weights[client])
            yield client, sent, own

    def stepped(self, state: State, replies: Iterable[Reply]) -> State:
        """The state with a round's messages, and what they make of each peer's a."""
        got = {reply.client: reply for reply in replies}
        if not got:
            raise ValueError("no client replied: there is nothing to pass on")
        sent = {f"{c}/{name}": t for c, reply in got.items() for name, t in reply.payload.tensors.items()}
        examples = {str(client): reply.examples for client, reply in got.items()}
        state = replace(state, messages=sent, examples=examples, steps=state.steps + 1)
        graph, weights = self._round(state)
        messages = {client: self._message(_sent(state, client)) for client in graph}
        peers = {
            str(client): mixed(messages[client], [messages[other] for other in others], weights[client])
            for client, others in graph.items()
        }
        return replace(state, peers={**state.peers, **peers})

    def _round(self, state: State) -> tuple[Neighbours, dict[int, list[float]]]:
        examples = {int(client): n for client, n in state.examples.items()}
        graph = neighbours(self._graph, list(examples), self._config.degree, self._seed, state.steps)
        return graph, shares(graph, examples)


def _sent(state: State, client: int) -> dict[str, Tensor]:
    prefix = f"{client}/"
    return {n.removeprefix(prefix): t for n, t in state.messages.items() if n.startswith(prefix)}
