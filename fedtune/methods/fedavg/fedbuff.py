"""FedBuff: the server steps after every k updates, and clients begin again without waiting for the others.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation" (2022), Algorithm 1. Version v of
the model is that after v steps. A client that began with version v and whose update is folded into step s + 1
has staleness τ = s − v:

    x_{s+1} = server(x_s, Σ p_i (1 + τ_i)^−a Δ_i),   over the k updates that come first       `weighed`

Time is virtual: a client's training takes it the `seconds` that belong to it, from when it began, and which
updates come first follows from that alone (`arrivals`), for a plan as for a run. So a round is a step: its
clients are those whose updates fill the buffer, and each is asked for the update of the version that it began
with, which the server holds as long as somebody has yet to come from it.

Deviations: a client whose update is in the buffer begins anew with the step that it fills, not at once with
the version before it; updates are weighted by examples too (the paper's evenly: `federation.weights: equal`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune.core.types import Payload
from fedtune.methods.fedavg.lora_aggregation import cut
from fedtune.methods.fedavg.state import State


def arrivals(
    clients: Sequence[int], seconds: Sequence[float], size: int, round: int
) -> tuple[tuple[int, ...], float]:
    """Whose updates make a step, in ascending order, and when it is made.

    Args:
        clients: All.
        seconds: What a client's training takes: those of client i at i modulo their number.
        size: k; all clients where there are fewer.
        round: The step, counted from 1.
    """
    ready = {client: seconds[client % len(seconds)] for client in clients}
    first, now = list[int](), 0.0
    for _ in range(round):
        first = sorted(ready, key=lambda client: (ready[client], client))[:size]
        now = ready[first[-1]]
        for client in first:
            ready[client] = now + seconds[client % len(seconds)]
    return tuple(sorted(first)), now


def begun(state: State, client: int) -> int:
    """The version that a client began with."""
    return state.begun.get(str(client), 0)


def sent(state: State, keys: Mapping[int, int], ranks: Mapping[int, int]) -> dict[int, Payload]:
    """The version that each client gets, as it is sent; one payload for those who are sent the same.

    Args:
        state: The server's.
        keys: By client, which of `state.versions` it gets; where that is not there, the newest weights.
        ranks: The LoRA rank of each client that is asked; 0 where all have one.
    """
    made, found = dict[tuple[int, int], Payload](), dict[int, Payload]()
    for client, rank in ranks.items():
        key = keys[client], rank
        if key not in made:
            prefix = f"{key[0]}/"
            old = {n.removeprefix(prefix): t for n, t in state.versions.items() if n.startswith(prefix)}
            weights = {n: w.to(getattr(torch, state.dtypes[n])) for n, w in (old or state.weights).items()}
            made[key] = Payload(cut(weights, rank) if rank else weights)
        found[client] = made[key]
    return found


def weighed(update: Mapping[str, Tensor], stale: int, exponent: float) -> dict[str, Tensor]:
    """An update as it counts, float32."""
    times = float((1 + stale) ** -exponent)
    return {name: t.float() * times for name, t in update.items()} if stale else dict(update)


def stepped(
    before: State, clients: Sequence[int], population: int
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Who has begun with which version after a step, and the old versions that somebody has yet to come from.

    Args:
        before: The state before the step.
        clients: Whose updates were asked for.
        population: Clients of the federation.
    """
    new = {**before.begun, **dict.fromkeys(map(str, clients), before.steps + 1)}
    needed = set(new.values()) | ({0} if len(new) < population else set())
    held = {**before.versions, **{f"{before.steps}/{name}": w for name, w in before.weights.items()}}
    return new, {name: w for name, w in held.items() if int(name.partition("/")[0]) in needed}
