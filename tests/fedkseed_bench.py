"""FedKSeed on toy models: rounds whose replies and orders can be looked at and changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from toy import Bench, Toy
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.core.types import Payload
from fedtune.data.encoded import Encoded
from fedtune.methods.fedkseed.method import FedKSeed
from fedtune.methods.fedkseed.settings import Config
from fedtune.zeroth import reference
from fedtune.zeroth.pool import SeedPool

NOISES = ["hadamard4", "rademacher", "gaussian", "binomial32"]


def toy(data: dict[int, list[Encoded]], seed: int = 0, robust: Any = None, **changes: Any) -> Bench:
    defaults = {"seeds": 8, "local_steps": 1, "lr": 0.25, "epsilon": 2.0**-6}
    return Bench(FedKSeed(Config(**{**defaults, **changes}), seed=seed), Toy(), data, robust=robust)


def altered(bench: Bench, client: int, change: Callable[[Payload], None], *, order: bool = False) -> None:
    """Rewrites a client's reply, or the order before it gets there."""
    step = bench.method.client_step

    def other(job: Payload, env: Any) -> Any:
        if env.client != client:
            return step(job, env)
        if order:
            job = Payload(dict(job.tensors), dict(job.scalars))
            change(job)
            return step(job, env)
        result = step(job, env)
        change(result.payload)
        return result

    bench.method.client_step = other


def tiny(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, **shape, max_position_embeddings=32, tie_word_embeddings=True)
    return LlamaForCausalLM(config).to(dtype).eval()


def text(clients: int = 3) -> dict[int, list[Encoded]]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(3, 32, (clients * 4, 6), generator=generator).tolist()
    return {
        c: [Encoded(tuple(r), tuple(r)) for r in rows[4 * c : 4 * c + 3 + (c == 1)]] for c in range(clients)
    }


def z(bench: Bench, j: int) -> float:
    pool = SeedPool(bench.method.pool_key, bench.method.config.seeds, bench.method.config.noise)
    return float(reference.z(pool, "w", 1, j)[0])


def replies(bench: Bench) -> list[Any]:
    """Keeps the replies of the bench's rounds as the server's step sees them."""
    kept: list[Any] = []
    step = bench.method.server_step
    bench.method.server_step = lambda state, incoming: step(state, (kept.append(r) or r for r in incoming))  # type: ignore[func-returns-value]
    return kept
