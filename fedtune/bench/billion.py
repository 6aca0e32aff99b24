"""One round of each method on a model of 1.1 billion parameters, on this machine: memory by three accounts.

The shape is TinyLlama's, bfloat16, with random weights, on disk in shards; two clients take two local steps
of one example each, and the result is scored on two. Each run is a process of its own, as a user starts it.
Beside the plan (made before, from shapes alone) stands what the ledger of the run counted, and what the
operating system says that the process had resident at its peak, looked at every 20 ms: `private` is what it
alone has, `mapped` are pages of files that it read (the model's, what clients hold, libraries), which the
system may take back. One process simulates the server and its clients: `simulation` is the largest that the
accounts come to together, with what the server has at rest while a client trains as it is planned, and
`rss_beyond` what the process had more than that: libraries, the allocator, and whatever no account knows of.

A machine needs some 16 GB of memory and of disk for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.bench.process_memory import resident
from fedtune.config.yaml_text import dump_yaml
from fedtune.core.temporary import temporary_folder
from fedtune.models.load import load_tokenizer, quiet, seeded

TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
LONGEST, CLIENTS, HELD_OUT = 128, 2, 2
STEPS = {"rounds": 1, "local_steps": 2, "batch_size": 1, "lr": 1e-5}
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"method": {"name": "fedavg", "trainable": "lora"}},
    "NF4 and LoRA": {"model": {"quantization": "nf4"}, "method": {"name": "fedavg", "trainable": "lora"}},
    "FedKSeed": {"method": {"name": "fedkseed"}},
    "FedBiOT": {"method": {"name": "fedbiot", "alignment": {"steps_before": 2, "steps": 1}}},
    "FedCyBGD": {"method": {"name": "fedcybgd"}},
    "all weights, 8-bit AdamW": {
        "method": {
            "name": "fedavg",
            "trainable": "full",
            "optimizer": "adamw-8bit",
            "masters": "stochastic",
            "optimizer_in_backward": True,
        }
    },
}
ROLES = ("client", "server", "evaluation")
KINDS = {"rss": "VmRSS", "private": "RssAnon", "mapped": "RssFile"}
LOOK_S = 0.02
PARTS = ("setup", "training", "aggregation", "rebuild", "wire", "checkpoint", "evaluation")


def measure(
    shape: dict[str, Any] = TINY_LLAMA, cases: Sequence[str] = tuple(CASES)
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each method, with bytes, and seconds by part of the run; ratios of ledger and plan."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with temporary_folder() as folder, quiet():
        write_inputs(shape, folder)
        for case in cases:
            document = _document(folder, CASES[case])
            path = folder / f"run-{len(rows)}.yaml"
            path.write_text(dump_yaml(document), encoding="utf-8")
            planned = json.loads(_fedtune("plan", str(path), "--json")[0])
            held = _fedtune("run", str(path), "--out", str(path.with_suffix("")), "--quiet")[1]
            summary = json.loads((path.with_suffix("") / "summary.json").read_text(encoding="utf-8"))
            row: dict[str, Any] = {"case": case}
            for role in ROLES:
                row |= {f"planned_{role}": planned[f"{role}_peak_memory_bytes"]["total"]}
                row |= {f"ledger_{role}": (counted := summary["peak_memory_bytes"][role])}
                if counted:
                    ratios[f"{role}'s peak: {case}: ledger / plan"] = counted / row[f"planned_{role}"]
            row["simulation"] = max(
                row["ledger_client"] + planned["memory_by_device"]["server"]["host_bytes"],
                row["ledger_server"],
                row["ledger_evaluation"],
            )
            row |= held
            if held:
                row["rss_beyond"] = held["rss"] - row["simulation"]
            row["folder"] = _size(path.with_suffix(""))
            row |= {f"{part}_s": summary["seconds"][part] for part in PARTS}
            rows.append(row)
    return rows, ratios


def write_inputs(shape: dict[str, Any], folder: Path) -> None:
    """The model in shards, with the bundled tokenizer, and the examples."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with seeded(0):
            model = LlamaForCausalLM(LlamaConfig(**shape))
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder / "model", max_shard_size="500MB")
    load_tokenizer("bundled", folder).save_pretrained(folder / "model")
    rows = [{"instruction": f"Add {n} and {n + 1}.", "output": "So be it. " * 60} for n in range(8)]
    for name, part in (("train", rows), ("test", rows[:HELD_OUT])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _document(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    train = str(folder / "train.jsonl")
    return {
        "model": {"name": str(folder / "model"), "dtype": "bfloat16", **case.get("model", {})},
        "data": {
            "train": train,
            "clients": CLIENTS,
            "template": "plain",
            "max_length": LONGEST,
            "cache": "none",
            "holdout": {"source": str(folder / "test.jsonl")},
            **({"public": {"source": train}} if case["method"]["name"] == "fedbiot" else {}),
        },
        "method": {**STEPS, **case["method"]},
        "evaluation": {"tasks": ["loss"], "every": 0},
    }


def _fedtune(*arguments: str) -> tuple[str, dict[str, int]]:
    """What a command of its own process prints, and what was resident of it when most was, in bytes.

    Nothing of that where the system does not say it (Linux does).
    """
    command = [sys.executable, "-c", "from fedtune.cli.main import main; main()", *arguments]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=out, stderr=said, text=True)
        peaks: dict[str, int] = {}
        while process.poll() is None:
            now = {name: found for name, key in KINDS.items() if (found := resident(process.pid, key))}
            peaks = max(peaks, now, key=lambda each: each.get("rss", 0))
            time.sleep(LOOK_S)
        out.seek(0)
        printed = out.read()
        if process.returncode:
            said.seek(0)
            words = said.read().strip()
            raise RuntimeError(f"fedtune {' '.join(arguments)} ended with {process.returncode}: {words}")
    return printed, peaks


def _size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
