"""Memory of simulating clients: one base model for all, plus what each client keeps.

A round of LoRA with control variates (each client keeps a state of its own) on the bundled model, with
1 and with 100 clients. All live tensors of the process are added up after each reply; the reference is a
copy of the model for each client, of which one copy is made and scaled.
"""

from __future__ import annotations

import copy
import gc
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedtune.core.client import ClientRunner
from fedtune.core.cohort import sample_cohort
from fedtune.core.ledger import Ledger
from fedtune.core.loop import RoundLoop
from fedtune.data.encode import encode_causal
from fedtune.data.sources import bundled_examples
from fedtune.measure.clock import Clock
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.models.load import load_model
from fedtune.transport.in_process import InProcess, Simulation

CLIENTS = 100


def measure() -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows for one client, a hundred clients and a hundred copies, and their ratios."""
    loaded = load_model("bundled", dtype="float32", initial="pretrained", seed=0, base=Path("."))
    items = encode_causal(
        bundled_examples()[:CLIENTS], loaded.tokenizer, template="plain", loss_on="response", max_length=128
    ).items
    method = FedAvg(
        Config(rounds=1, local_steps=1, batch_size=1, optimizer="sgd", control_variates=True), seed=0
    )
    model = method.client_model(lambda: loaded.model)
    outside = _live_bytes() - _bytes_of(model)
    rows: list[dict[str, Any]] = []
    for clients in (1, CLIENTS):
        data = {client: [items[client]] for client in range(clients)}
        runner = ClientRunner(method, model, data, pad_id=0, seed=0, device=torch.device("cpu"))
        peak, seconds = _round(method, model, runner, clients)
        states = sum(state.nbytes for state in runner.states.values())
        rows.append(
            {
                "case": f"{clients} clients, one model",
                "seconds": seconds,
                "peak_bytes": peak - outside,
                "clients_own_bytes": states,
                "model_bytes": _bytes_of(model),
            }
        )
    before = _live_bytes()
    started = time.perf_counter()
    copied = copy.deepcopy(model)
    seconds = time.perf_counter() - started
    rows.append(
        {
            "case": f"{CLIENTS} models (one copy, scaled)",
            "seconds": seconds * CLIENTS,
            "peak_bytes": (_live_bytes() - before) * CLIENTS,
            "clients_own_bytes": 0,
            "model_bytes": _bytes_of(copied) * CLIENTS,
        }
    )
    one, many, copies = rows
    return rows, {
        f"peak_bytes: {CLIENTS} clients / 1 client": many["peak_bytes"] / one["peak_bytes"],
        f"peak_bytes beyond clients' own: {CLIENTS} clients / 1 client": (
            (many["peak_bytes"] - many["clients_own_bytes"]) / (one["peak_bytes"] - one["clients_own_bytes"])
        ),
        f"peak_bytes: {CLIENTS} clients / {CLIENTS} models": many["peak_bytes"] / copies["peak_bytes"],
    }


def _round(method: FedAvg, model: nn.Module, runner: ClientRunner, clients: int) -> tuple[int, float]:
    """Largest number of live tensor bytes after any reply of one round, and the round's seconds."""
    peak, clock = 0, Clock()

    def look(state: object, outcome: object) -> None:
        nonlocal peak
        peak = max(peak, _live_bytes())

    transport = InProcess(runner, simulation=Simulation(), deadline_s=None, seed=0, clock=clock)
    loop = RoundLoop(
        method, transport, Ledger(lambda entry: None, lambda entry: None), clock, torch.device("cpu")
    )
    cohort = sample_cohort(dict.fromkeys(range(clients), 1), None, seed=0, round=1)
    loop.run(method.init(model), cohort, 1, quorum=clients, on_arrival=look)
    return peak, clock.total


def _live_bytes() -> int:
    """Bytes of every tensor storage that this process can reach."""
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _bytes_of(model: nn.Module) -> int:
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return sum(storages.values())
