"""Peak memory of a client: tuning methods against inference, with the same random model and batch.

All have the loss of `models/lean_loss.py` and an allocator that gives memory back; what takes gradients is
there with and without `gradient_checkpointing: full`. Behind them stand the methods that train all of a model
or a block of it, on two larger shapes (`client_steps.py`), with their backward time.

Each case is a process of its own. `peak_bytes` is the most that tensors held at once, the model among them.
`rss_bytes` checks it from outside: the most that the process held in its steps, less what it held before it
had the model (but had done the same with a tiny one, so that all libraries were loaded). It is left out where
the system does not tell, and good to some tens of megabytes, which allocators keep and libraries take.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from transformers import LlamaForCausalLM

from fedtune.bench import client_steps
from fedtune.bench.process_memory import forget_peak, peak_rss, rss
from fedtune.bench.random_model import HIDDEN, LAYERS, random_batch, random_llama
from fedtune.measure.memory import MemoryMeter, Resident
from fedtune.methods.fedkseed.step import step_weights
from fedtune.models.lean_loss import batch_loss
from fedtune.models.lora import attach_lora
from fedtune.models.memory_efficient import memory_efficient, release_memory
from fedtune.models.tuning import train_all
from fedtune.zeroth import SeedPool

STEPS = 2  # an optimizer has its state from the second on


class Client(NamedTuple):
    """What a case does again and again, and what it keeps in memory meanwhile."""

    step: Callable[[], object]
    resident: list[Resident]


@contextmanager
def _inference(model: LlamaForCausalLM) -> Iterator[Client]:
    batch = random_batch()
    with torch.no_grad():
        yield Client(lambda: float(batch_loss(model, batch)), [model])


def _fedkseed(noise: Any) -> Callable[[LlamaForCausalLM], AbstractContextManager[Client]]:
    @contextmanager
    def client(model: LlamaForCausalLM) -> Iterator[Client]:
        batch, pool = random_batch(), SeedPool(0, 4096, noise)
        with step_weights(train_all(model), pool, torch.zeros(pool.size), 1e-6) as weights:

            def step() -> None:
                plus, minus = weights.loss(batch, 7, 1e-3), weights.loss(batch, 7, -1e-3)
                weights.update([(7, (plus - minus) / 2e-3)])

            yield Client(step, [model])

    return client


def _gradients(
    attach: Callable[..., Any], checkpointing: str = "none"
) -> Callable[[LlamaForCausalLM], AbstractContextManager[Client]]:
    @contextmanager
    def client(base: LlamaForCausalLM) -> Iterator[Client]:
        model, batch = attach(base).train(), random_batch()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

        def step() -> None:
            batch_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        with memory_efficient(model, checkpointing=checkpointing):
            yield Client(step, [model, optimizer])

    return client


def _lora(model: LlamaForCausalLM) -> Any:
    return attach_lora(model, rank=16, alpha=32.0, dropout=0.0, targets=None, seed=0)


CASES: dict[str, Callable[[LlamaForCausalLM], AbstractContextManager[Client]]] = {
    "inference": _inference,
    "FedKSeed, hadamard4": _fedkseed("hadamard4"),
    "FedKSeed, rademacher": _fedkseed("rademacher"),
    "full fine-tuning, AdamW": _gradients(train_all),
    "LoRA, AdamW": _gradients(_lora),
    "full fine-tuning, AdamW, checkpointing": _gradients(train_all, "full"),
    "LoRA, AdamW, checkpointing": _gradients(_lora, "full"),
}
"""What can be measured; the first is what the others are compared with."""


def measure(hidden: int = HIDDEN, layers: int = LAYERS) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each case, and its ratios to inference; then those of `client_steps`."""
    rows: list[dict[str, Any]] = []
    for case in CASES:
        command = [sys.executable, "-m", "fedtune.bench.memory", case, str(hidden), str(layers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    first = rows[0]
    ratios = {
        f"{key}: {row['case']} / {first['case']}": row[key] / first[key]
        for key in ("peak_bytes", "rss_bytes")
        for row in rows[1:]
        if key in row
    }
    more, others = client_steps.measure()
    return rows + more, ratios | others


def measure_case(case: str, hidden: int, layers: int) -> dict[str, Any]:
    """One row, of this process."""
    release_memory()
    with CASES[case](random_llama(64, 1)) as tiny:
        tiny.step()
    del tiny
    gc.collect()
    before = rss()
    with CASES[case](random_llama(hidden, layers)) as client:
        known = forget_peak()
        for _ in range(STEPS):
            client.step()
        peak = peak_rss()
        meter = MemoryMeter("cpu")
        with meter.whole(client.resident):
            client.step()
    row: dict[str, Any] = {"case": case, "peak_bytes": meter.peak_bytes}
    if known and before is not None and peak is not None:
        row["rss_bytes"] = peak - before
    return row


if __name__ == "__main__":
    print(json.dumps(measure_case(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
