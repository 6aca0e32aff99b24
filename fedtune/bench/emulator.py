"""A client of FedBiOT against one that trains LoRA on the whole model: peak memory and time of a step.

The same random Llama of about 110 M parameters and the same batch for all; LoRA of rank 8 on the query and
value projections of every block on one side, of the adapter's two blocks on the other. Both are the methods'
own client steps on orders that went through the wire. A client that was sent its model in an order before
gets LoRA alone in the one that is timed. Time is taken in turn with the whole model's, and the ratio is the
median of the pairs.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fedtune.bench.random_model import HIDDEN, LAYERS, random_batch, random_llama
from fedtune.core.client import ClientRunner
from fedtune.core.cohort import Cohort
from fedtune.core.types import Method, ServerEnv
from fedtune.core.wire import Content, decode, encode
from fedtune.data.encoded import Encoded
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config as FedAvgConfig
from fedtune.methods.fedbiot.method import FedBiOT
from fedtune.methods.fedbiot.settings import Alignment, Config
from fedtune.methods.tuning import Lora
from fedtune.models.tuning import count_parameters

STEPS, REPEATS, ADAPTER_LAYERS = 2, 5, 2
DROPOUTS = (0.2, 0.5)
TRAINING: dict[str, Any] = {"rounds": 2, "local_steps": STEPS, "batch_size": 1, "betas": [0.9, 0.95]}
LORA = Lora(rank=8, alpha=16.0)


def measure(
    hidden: int = HIDDEN, layers: int = LAYERS, repeats: int = REPEATS
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for LoRA on the whole model and for each dropout of the emulator, and their ratios."""
    whole, row = _client(FedAvg(FedAvgConfig(lora=LORA, **TRAINING), 0), hidden, layers)
    rows = [{"case": "LoRA, whole model", **row}]
    ratios: dict[str, float] = {}
    for dropout in DROPOUTS:
        config = Config(
            lora=LORA,
            layer_dropout=dropout,
            adapter_layers=ADAPTER_LAYERS,
            alignment=Alignment(steps_before=0),
            **TRAINING,
        )
        step, row = _client(FedBiOT(config, 0), hidden, layers)
        pairs = [(_seconds(step), _seconds(whole)) for _ in range(repeats)]
        row["seconds"] = statistics.median(own for own, _ in pairs)
        rows[0].setdefault("seconds", statistics.median(other for _, other in pairs))
        case = f"FedBiOT, dropout {dropout:g}, adapter {ADAPTER_LAYERS}"
        rows.append({"case": case, **row})
        ratios[f"peak_bytes: {case} / LoRA, whole model"] = row["peak_bytes"] / rows[0]["peak_bytes"]
        ratios[f"seconds: {case} / LoRA, whole model"] = statistics.median(
            own / other for own, other in pairs
        )
        del step
        gc.collect()
    return rows, ratios


def _client(method: Method[Any], hidden: int, layers: int) -> tuple[Callable[[], object], dict[str, Any]]:
    """What a client does in a round, and its memory."""
    base = random_llama(hidden, layers)
    tokens = tuple(random_batch()["input_ids"][0].tolist())
    example = Encoded(tokens, tokens)
    device = torch.device("cpu")
    method.prepare(ServerEnv([example] if method.sends_model else [], 0, device))
    model = method.client_model(lambda: base)
    runner = ClientRunner(method, model, {0: [example]}, pad_id=0, seed=0, device=device)
    state, cohort = method.init(model), Cohort((0,), {0: 1}, 1)
    first = _order(method, state, cohort)
    decoded = decode(runner.handle(0, first))
    size = count_parameters(model).total if not method.sends_model else _parameters(first)
    if method.sends_model:
        state = replace(state, holders={"0": True})
    order = _order(method, state, cohort)
    return lambda: runner.handle(0, order), {"parameters": size, "peak_bytes": decoded.meta["peak_bytes"]}


def _order(method: Method[Any], state: Any, cohort: Cohort) -> bytes:
    (order,) = method.plan(state, 1, cohort)
    return encode(Content(order.payload, {"round": 1}))


def _parameters(frame: bytes) -> int:
    return sum(t.numel() for t in decode(frame).payload.tensors.values() if t.is_floating_point())


def _seconds(round: Callable[[], object]) -> float:
    """Of one step."""
    started = time.perf_counter()
    round()
    return (time.perf_counter() - started) / STEPS
