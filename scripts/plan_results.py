"""The tables of docs/planning.md: plans beside what small runs measured, and beside what papers print.

    python scripts/plan_results.py measured MODEL...   every method on these models
    python scripts/plan_results.py papers              the papers' tables, from configs/papers

scripts/results.sh inserts the output.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fedtune.config.file import load_config, parse_config
from fedtune.config.schema import RunConfig
from fedtune.core.client import ClientRunner
from fedtune.data.batches import collate
from fedtune.data.encode import Encoded
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.methods import local_training
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

ALPACA = "fedcybgd_llama2_alpaca"


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

    def counting(self: ClientRunner, client: int, frame: bytes) -> bytes:
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
        for module in (local_training, block_training, fedkseed, infinite_pool):
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
        "planned_flops": sum(document["flops_per_token"].values()),
        "flops": found["flops"] / max(found["tokens"], 1.0),
        "planned_trainable": document["trainable_parameters"],
        "trainable": summary["trainable_parameters"],
    }


def measured(models: Sequence[str]) -> str:
    """Every method in every form on every model."""
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
    return table(header, lines)


def _against(value: float, planned: float, *, flops: bool = False) -> str:
    """A measured value, and what the plan is of it."""
    shown = f"{value:,.0f}" if flops else size(value)
    return f"{shown} ({planned / value - 1:+.1%})" if value else shown


SHAPES = Path(__file__).resolve().parents[1] / "configs" / "papers" / "shapes"


def paper(name: str, shape: str, *settings: str) -> dict[str, Any]:
    """The plan of a configuration of a paper on the shape of its model, for one client and round."""
    one = ["data.clients=1", "data.partition={name: iid}", "federation.clients_per_round=null"]
    path = SHAPES.parent / f"{name}.yaml"
    config = load_config(path, [f"model.name={SHAPES / shape}", *one, *settings])
    if "rounds" in type(config.method).model_fields:
        config = config.model_copy(update={"method": config.method.model_copy(update={"rounds": 1})})
    return plan(config, steps=False).document


def papers() -> str:
    """What the papers print, and what is planned."""
    lines: list[list[str]] = []

    def row(where: str, what: str, printed: str, planned: str) -> None:
        lines.append([where, what, printed, planned])

    for shape, hidden, printed in (
        (
            "datajuicer-1.3b",
            2048,
            ("12.63 M, 96.36 MiB", "40.96 K, 320.0 KiB", "1.57 M, 12.00 MiB", "1.35 B, 17,988 B"),
        ),
        (
            "llama-3b",
            3200,
            ("30.79 M, 234.94 MiB", "64.00 K, 500.0 KiB", "2.66 M, 20.31 MiB", "3.43 B, 17,988 B"),
        ),
    ):
        rows = {
            "FedPTuning": ("fedptuning", f"method.p_tuning.hidden={hidden}"),
            "FedPrompt": ("fedprompt", "seed=0"),
            "FedIT-SGD": ("fedit_sgd", "seed=0"),
            "FedIT": ("fedit", "seed=0"),
            "FedKSeed": ("fedkseed_ni_1b", "seed=0"),
            "FedKSeed-Pro": ("fedkseed_pro_ni_1b", f"method.seeds={1024 if hidden == 2048 else 2048}"),
        }
        pro = f"{printed[3].split(',')[0]}, {'9,796' if hidden == 2048 else '17,988'} B"
        shown = dict(zip(rows, (*printed[:3], printed[2], printed[3], pro), strict=True))
        for name, (config, setting) in rows.items():
            document = paper(config, shape, setting)
            count = document["published"].get("bytes_per_client_round", document["payload_bytes"]["total"])
            row(
                "FedKSeed, Table 3",
                f"{name}, {shape}",
                shown[name],
                f"{document['trainable_parameters']:,}, {count:,} B ({count / 2**20:.2f} MiB)",
            )
    for dropout, adapter, method, printed_row in (
        (0.2, 4, "fedot", "0.524 M, 10.33 GFLOP, 4.19 MB"),
        (0.2, 2, "fedbiot", "0.262 M, 5.47 GFLOP, 14.68 MB"),
        (0.2, 4, "fedbiot", "0.524 M, 5.87 GFLOP, 15.73 MB"),
        (0.5, 4, "fedot", "0.524 M, 7.09 GFLOP, 4.19 MB"),
        (0.5, 2, "fedbiot", "0.262 M, 3.65 GFLOP, 9.96 MB"),
        (0.5, 4, "fedbiot", "0.524 M, 4.25 GFLOP, 11.53 MB"),
    ):
        document = fedbiot(method, adapter, dropout)
        found = document["published"]
        row(
            "FedBiOT, Table 5",
            f"{method}, s = {adapter}, β = {dropout}",
            printed_row,
            f"{document['trainable_parameters'] / 1e6:.3f} M, {found['flops_per_token'] / 1e9:.2f} GFLOP, "
            f"{found['bytes_per_client_round'] / 1e6:.2f} MB",
        )
    for number, name, label, printed_row in (
        (1, "fed_full", "Fed-full", "12.48 GB, 12.48 GB"),
        (1, "fedlora", "FedLoRA", "24.96 GB, 32.03 MB"),
        (1, ALPACA, "FedCyBGD, no compression (Table 6: 13.23 GB)", "12.48 GB, 770.37 MB"),
        (
            1,
            f"{ALPACA}_layer_drop",
            "FedCyBGD, half of the blocks (Table 6, i: 6.99 GB)",
            "6.24 GB, 770.37 MB",
        ),
        (6, f"{ALPACA}_lora", "ii, LoRA of rank 16 in the block", "together 12.49 GB"),
        (6, f"{ALPACA}_adapter", "iii, an adapter in the block, half of the blocks", "together 6.30 GB"),
    ):
        first = paper(name, "llama-2-7b")["payload_bytes"]["first_time"]
        row(
            f"FedCyBGD, Table {number}",
            label,
            printed_row,
            f"{first['down'] / 2**30:.2f} GiB, {first['up'] / 2**20:.2f} MiB "
            f"(together {(first['down'] + first['up']) / 2**30:.2f} GiB)",
        )
    for rounds, printed_row in ((3, "3000 GB"), (1, "1000 GB")):
        total = one_shot(rounds)["payload_bytes"]["total"]
        row("one-shot, section 5", f"Llama-13b, m = 10, T = {rounds}", printed_row, f"{total / 1e9:,.0f} GB")
    return table(["paper", "row", "printed", "planned"], lines)


def fedbiot(method: str, adapter: int, dropout: float) -> dict[str, Any]:
    """A row of FedBiOT's Table 5: LLaMA-2-7B."""
    settings = [
        f"method.name={method}",
        f"method.adapter_layers={adapter}",
        f"method.layer_dropout={dropout}",
    ]
    if method == "fedot":
        settings += ["method.both_ends=true", "method.alignment.steps=0"]
    return paper("fedbiot_gsm8k_s2_0.2", "llama-2-7b", *settings)


def one_shot(rounds: int) -> dict[str, Any]:
    """Section 5 of the one-shot paper: full weights of Llama-13b in float32, ten clients, T rounds."""
    path = SHAPES.parent / "multi_round_full.yaml"
    settings = [f"model.name={SHAPES / 'llama-13b'}", "model.dtype=float32", f"method.rounds={rounds}"]
    return plan(load_config(path, settings), steps=False).document


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    whole = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in whole)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *names = sys.argv[1:] or [""]
    if what == "measured" and names:
        print(measured(names))
    elif what == "papers":
        print(papers())
    else:
        raise SystemExit(__doc__)
