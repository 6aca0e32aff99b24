"""Plans beside what small runs measured: every method, and what it becomes by its main settings.

Table:   every method in every form on three models; docs/planning.md, block plan-measured
Command: python reproduce/plan_measured.py plan-measured
Time:    not measured
Needs:   ../shared/models/stories260K-hf and babyllama105-hf
Result:  the bundled model, FedAvg of all weights: 15.15 MB planned and measured at a client (+0.0%),
         5,936,896 operations a token planned and 5,909,106 counted (+0.5%)
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import MODELS, Entry, main, table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fedtune.config.file import parse_config
from fedtune.config.schema import RunConfig
from fedtune.core.client import ClientRunner
from fedtune.core.types import Frame
from fedtune.data.batches import collate
from fedtune.data.encoded import Encoded
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.methods import step_loss
from fedtune.methods.fedcybgd import client as block_client
from fedtune.methods.fedcybgd import training as block_training
from fedtune.methods.fedkseed import infinite_pool
from fedtune.methods.fedkseed import method as fedkseed
from fedtune.planning.plan import plan
from fedtune.report.tables import size

TWO = {"rounds": 2, "batch_size": 4}
EMULATED = {
    "adapter_layers": 2,
    "emulator": "channel-pruning",
    "local_steps": 2,
    "alignment": {"steps_before": 1},
}
ZEROTH = {**TWO, "local_steps": 2}
SGD = {"optimizer": "sgd", "lr": 1e-2}
ONE_SHOT = {"rounds": 1, "local_epochs": 3, "batch_size": 4}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg, full": {"name": "fedavg", "trainable": "full", **TWO},
    "fedavg, lora": {"name": "fedavg", "trainable": "lora", **TWO},
    "fedkseed": {"name": "fedkseed", "seeds": 64, **ZEROTH},
    "fedkseed-pro": {"name": "fedkseed-pro", "seeds": 64, **ZEROTH},
    "infinite-pool": {"name": "infinite-pool", **ZEROTH},
    "fedbiot": {"name": "fedbiot", **TWO, **EMULATED, "alignment": {"steps_before": 1, "steps": 1}},
    "fedot": {"name": "fedot", **TWO, **EMULATED},
    "offsite-tuning": {"name": "offsite-tuning", **TWO, **EMULATED},
    "fedcybgd": {"name": "fedcybgd", **TWO, "local_epochs": 2},
    "fedbavg": {"name": "fedbavg", **TWO, "local_epochs": 2},
    "badam": {
        "name": "badam",
        "batch_size": 4,
        "local_steps": 4,
        "switch_interval": 2,
        "block_order": "ascending",
    },
    "standalone": {"name": "standalone", "batch_size": 4, "local_epochs": 2},
    "centralized": {"name": "centralized", "batch_size": 4, "local_epochs": 2},
    "zero-shot": {"name": "zero-shot"},
}
"""Every method of the registry."""
CYCLE = METHODS["fedcybgd"]
FORMS: dict[str, dict[str, Any]] = {
    "fedavg, full, one-shot": {"name": "fedavg", "trainable": "full", **ONE_SHOT},
    "fedavg, lora, one-shot": {"name": "fedavg", **ONE_SHOT},
    "fedavg, lora, one-shot, asynchronous": {"name": "fedavg", "arrival": "asynchronous", **ONE_SHOT},
    "fedavg, lora, stacked (FLoRA)": {"name": "fedavg", "aggregation": "stack", **TWO},
    "fedavg, lora, A frozen (FFA-LoRA)": {"name": "fedavg", "aggregation": "freeze-a", **TWO},
    "fedavg, lora, unlike ranks": {"name": "fedavg", "lora": {"rank": 8, "client_ranks": [8, 4]}, **TWO},
    "fedavg, adapter (FedAdapter)": {"name": "fedavg", "trainable": "adapter", **TWO},
    "fedavg, prompt (FedPrompt)": {"name": "fedavg", "trainable": "prompt", **TWO},
    "fedavg, p-tuning (FedPTuning)": {"name": "fedavg", "trainable": "p-tuning", **TWO},
    "fedavg, full, SGD": {"name": "fedavg", "trainable": "full", **TWO, **SGD},
    "fedavg, full, FedProx": {"name": "fedavg", "trainable": "full", "proximal": 0.1, **TWO},
    "fedavg, full, FedProx, accumulation": {
        "name": "fedavg",
        "trainable": "full",
        "proximal": 0.1,
        "rounds": 2,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "local_epochs": 2,
    },
    "fedavg, full, FedProx, one batch to accumulate": {
        "name": "fedavg",
        "trainable": "full",
        "proximal": 0.1,
        "gradient_accumulation": 2,
        **TWO,
    },
    "fedavg, lora, accumulation, cut": {
        "name": "fedavg",
        "rounds": 2,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "max_grad_norm": 1.0,
    },
    "fedavg, full, momentum (FedAvgM)": {
        "name": "fedavg",
        "trainable": "full",
        "server_optimizer": {"name": "momentum"},
        **TWO,
    },
    "fedavg, full, FedAdam": {
        "name": "fedavg",
        "trainable": "full",
        "server_optimizer": {"name": "adam"},
        **TWO,
    },
    "fedavg, full, SCAFFOLD": {
        "name": "fedavg",
        "trainable": "full",
        "control_variates": True,
        **TWO,
        **SGD,
    },
    "fedkseed, gaussian": {"name": "fedkseed", "seeds": 64, "noise": "gaussian", **ZEROTH},
    "fedkseed, three seeds a step": {"name": "fedkseed", "seeds": 64, "perturbations": 3, **ZEROTH},
    "fedkseed, dense sums": {"name": "fedkseed", "seeds": 8, **ZEROTH, "local_steps": 12},
    "infinite-pool, model sent": {"name": "infinite-pool", "download": "model", **ZEROTH},
    "fedbiot, layer-dropout": {
        "name": "fedbiot",
        **TWO,
        **EMULATED,
        "emulator": "layer-dropout",
        "adapter_layers": 1,
        "layer_dropout": 0.3,
        "alignment": {"steps_before": 1, "steps": 1},
    },
    "fedbiot, proximal": {
        "name": "fedbiot",
        **TWO,
        **EMULATED,
        "proximal": 0.1,
        "alignment": {"steps_before": 1, "steps": 1},
    },
    "fedcybgd, layer-drop": {**CYCLE, "compression": "layer-drop"},
    "fedcybgd, hybrid": {**CYCLE, "compression": "hybrid"},
    "fedcybgd, PowerSGD": {**CYCLE, "powersgd": {}},
    "fedcybgd, lora": {**CYCLE, "trainable": "lora"},
    "fedcybgd, adapter": {**CYCLE, "trainable": "adapter"},
    "fedcybgd, adapter, layer-drop": {**CYCLE, "trainable": "adapter", "compression": "layer-drop"},
    "fedcybgd, embeddings and norm too": {**CYCLE, "extra_blocks": ["embeddings", "norm"]},
    "fedcybgd, nothing computed again": {**CYCLE, "gradient_checkpointing": False},
    "fedbavg, layer-drop": {**METHODS["fedbavg"], "compression": "layer-drop"},
    "badam, embeddings too": {**METHODS["badam"], "extra_blocks": ["embeddings"]},
    "standalone, full": {**METHODS["standalone"], "trainable": "full"},
    "centralized, full": {**METHODS["centralized"], "trainable": "full"},
}
"""What methods have by their settings."""
_aten = torch.ops.aten
ATTENTION = {  # torch's counter has the attention kernels of GPUs alone
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}


def small_run(model: str, method: str) -> RunConfig:
    """Two clients with four examples each, which are one batch."""
    document: dict[str, Any] = {
        "model": {"name": model, "device": "cpu"},
        "data": {"template": "plain", "max_examples": 8, "max_length": 48, "clients": 2},
        "method": (METHODS | FORMS)[method],
        "evaluation": {"tasks": ["loss"], "every": 0, "max_examples": 2, "bootstrap": 0},
    }
    if document["method"]["name"] in ("fedbiot", "fedot", "offsite-tuning"):
        document["data"]["public"] = {"source": "bundled", "max_examples": 10}
    return parse_config(document, method)


class _NoModules:
    """Counts for the whole, and not by module."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def counted(found: dict[str, float]) -> Iterator[None]:
    """Inside, torch's own counter counts what clients' steps compute; `found` gets `flops` and `tokens`.

    Tokens are those of all batches of the steps, padding too. What a client computes beside its steps is left
    out: what FedCyBGD's hybrid compression asks for the importance of heads and channels.
    """
    handle, train_blocks = ClientRunner.handle, block_training.train_blocks
    counters: list[FlopCounterMode] = []
    turns: list[float] = []

    def counting(self: ClientRunner, client: int, frame: Frame) -> Frame:
        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        counter.mod_tracker = _NoModules()  # type: ignore[assignment]  # its hooks keep tensors, and memory is measured here too
        counters.append(counter)
        with counter:
            reply = handle(self, client, frame)
        total = counters.pop().get_total_flops()
        found["flops"] += sum(turns) if turns else total
        turns.clear()
        return reply

    def turn(*arguments: Any, **more: Any) -> Any:
        before = counters[-1].get_total_flops()
        trained = train_blocks(*arguments, **more)
        turns.append(counters[-1].get_total_flops() - before)
        return trained

    def noting(items: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
        batch = collate(items, pad_id)
        found["tokens"] += batch["input_ids"].numel()
        return batch

    with ExitStack() as patches:
        patches.enter_context(patch.object(ClientRunner, "handle", counting))
        patches.enter_context(patch.object(block_client, "train_blocks", turn))
        for module in (step_loss, fedkseed, infinite_pool):
            patches.enter_context(patch.object(module, "collate", noting))
        yield


def compare(model: str, method: str) -> dict[str, float]:
    """One method's plan and what its run came to: bytes down and up, client memory, operations a token."""
    config = small_run(model, method)
    document = plan(config).document
    found = {"flops": 0.0, "tokens": 0.0}
    with tempfile.TemporaryDirectory() as folder, counted(found):
        summary = run(config, Path(folder) / "run", Silent())
    payload, planned = summary["payload_bytes"], document["payload_bytes"]
    return {
        "planned_down": planned["down"],
        "down": payload["down"],
        "planned_up": planned["up"],
        "up": payload["up"],
        "planned_memory": document["client_peak_memory_bytes"]["total"],
        "memory": summary["peak_memory_bytes"]["client"],
        "planned_server_memory": document["server_peak_memory_bytes"]["total"],
        "server_memory": summary["peak_memory_bytes"]["server"],
        "planned_evaluation_memory": document["evaluation_peak_memory_bytes"]["total"],
        "evaluation_memory": summary["peak_memory_bytes"]["evaluation"],
        "planned_flops": sum(document["flops_per_token"].values()),
        "flops": found["flops"] / max(found["tokens"], 1.0),
        "planned_trainable": document["trainable_parameters"],
        "trainable": summary["trainable_parameters"],
    }


def measured() -> str:
    """Every method in every form on every model."""
    torch.set_num_threads(1)
    models = ("bundled", *map(str, REAL))
    forms = METHODS | FORMS
    return measured_table([(model, form, compare(model, form)) for model in models for form in forms])


def measured_table(rows: Sequence[tuple[str, str, dict[str, float]]]) -> str:
    """What `compare` gave for models and methods."""
    header = ["model", "method", "bytes down, up", "the ledger's", "client memory", "measured"]
    header += ["FLOP a token", "counted", "server memory", "measured"]
    lines = []
    for model, method, row in rows:
        line = [Path(model).name, method]
        line += [f"{row[f'{p}down']:,}, {row[f'{p}up']:,}" for p in ("planned_", "")]
        line += [size(row["planned_memory"]), _against(row["memory"], row["planned_memory"])]
        line += [f"{row['planned_flops']:,}", _against(row["flops"], row["planned_flops"], flops=True)]
        server = row["planned_server_memory"]
        lines.append([*line, size(server), _against(row["server_memory"], server)])
    return table(header, lines, numbers=False)


def _against(value: float, planned: float, *, flops: bool = False) -> str:
    """A measured value, and what the plan is of it."""
    shown = f"{value:,.0f}" if flops else size(value)
    return f"{shown} ({planned / value - 1:+.1%})" if value else shown


REAL = (MODELS / "stories260K-hf", MODELS / "babyllama105-hf")
ENTRIES = {"plan-measured": Entry(measured, needs=REAL)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
