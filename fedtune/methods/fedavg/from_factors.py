"""The server's step of the aggregations that need each client's factors, and not their sum alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedtune.core.aggregate import WeightedSum
from fedtune.core.types import Reply
from fedtune.methods.fedavg import fedex_lora, flexlora, hetlora, lora_fair
from fedtune.methods.fedavg import lora_aggregation as lora
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.fedavg.state import State


def advanced(state: State, replies: Iterable[Reply], config: Config) -> State:
    """The state after a round. Holds a cohort's factors together: the result is made of each of them."""
    factors: list[lora.Trained] = []
    ranks, heard = dict(state.ranks), False
    rest: WeightedSum | None = None
    for reply in replies:
        heard = True
        if not reply.payload.tensors:  # fine-tuning sends nothing
            continue
        rest = rest or WeightedSum.empty(reply.cohort.total_examples)
        rest = rest.add(
            {n: t for n, t in reply.payload.tensors.items() if not lora.is_factor(n)}, reply.examples
        )
        if reply.examples:  # 0: a robust mean left it out
            sent = {n: t for n, t in reply.payload.tensors.items() if lora.is_factor(n)}
            if config.aggregation != "stack":  # what changed since the round's start
                sent = {n: lora.cut_like(state.weights[n], t) + t for n, t in sent.items()}
            if config.prune:
                ranks[str(reply.client)] = hetlora.rank_of(sent)
            factors.append((sent, reply.examples))
    if not heard:
        raise ValueError("no client replied: there is nothing to aggregate")
    if rest is None:
        return state
    weights = {n: w + rest.mean(n) if n in rest.sums else w for n, w in state.weights.items()}
    match config.aggregation:
        case "svd":
            return replace(state, weights=weights | flexlora.factored(factors, weights, state.scaling))
        case "refine":
            return replace(state, weights=weights | lora_fair.refined(factors, state.scaling, config.ridge))
        case "sparsity":
            new = hetlora.averaged(factors, weights, state.scaling)
            return replace(state, weights=weights | new, ranks=ranks)
        case "residual":
            new, product = fedex_lora.averaged(factors, state.product, state.scaling)
            return replace(state, weights=weights | new, product=product)
    return replace(state, weights=weights, product=lora.stack(state.product, factors, state.scaling))
