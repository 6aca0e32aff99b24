"""Every method planned and run in a process with a given number of threads; prints a line of JSON a method.

python threaded.py THREADS FOLDER METHOD... [bench]
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

LOCAL: dict[str, Any] = {"local_steps": 2, "batch_size": 2}
ALIGNED: dict[str, Any] = {"adapter_layers": 1, "alignment": {"steps_before": 1, "steps": 1, "batch_size": 2}}
WHOLE: dict[str, Any] = {"adapter_layers": 2, "layer_dropout": 0.0}  # four blocks are too few to drop some
SETTINGS: dict[str, dict[str, Any]] = {
    "fedavg": {**LOCAL, "rounds": 2, "lora": {"rank": 2}},
    "fedkseed": {**LOCAL, "rounds": 2, "seeds": 8},
    "fedkseed-pro": {**LOCAL, "rounds": 2, "seeds": 8},
    "infinite-pool": {**LOCAL, "rounds": 2},
    "fedbiot": {**LOCAL, "rounds": 2, "lora": {"rank": 2}, **ALIGNED},
    "fedot": {**LOCAL, "rounds": 2, "lora": {"rank": 2}, **WHOLE},
    "offsite-tuning": {**LOCAL, "lora": {"rank": 2}, **WHOLE},
    "fedcybgd": {**LOCAL, "rounds": 2},
    "fedbavg": {**LOCAL, "rounds": 2},
    "badam": {**LOCAL, "switch_interval": 1},
    "standalone": {**LOCAL, "lora": {"rank": 2}},
    "centralized": {**LOCAL, "trainable": "full", "optimizer_in_backward": True, "optimizer": "adamw-8bit"},
    "zero-shot": {},
}


def document(name: str) -> dict[str, Any]:
    data: dict[str, Any] = {"clients": 2, "max_examples": 8, "max_length": 48}
    if "alignment" in SETTINGS[name]:
        data["public"] = {"source": "bundled", "max_examples": 4}
    return {
        "data": data,
        "method": {"name": name, **SETTINGS[name]},
        "evaluation": {"tasks": ["loss", "accuracy"], "max_examples": 4, "every": 0, "bootstrap": 0},
    }


def main(threads: int, folder: Path, names: list[str]) -> None:
    import torch

    import fedtune

    torch.set_num_threads(threads)  # with OMP_NUM_THREADS too, as PyTorch takes no more than there are cores
    for name in names:
        if name == "bench":
            print(json.dumps(benches(folder)), flush=True)
            continue
        config = document(name)
        planned = fedtune.plan(config)
        done = fedtune.run(config, out=folder / name, progress=False)
        rounds = [json.loads(line) for line in (folder / name / "rounds.jsonl").read_text().splitlines()]
        for entry in rounds:
            del entry["seconds"]
        files = sorted((folder / name / "final").rglob("*.safetensors"))
        summary = {key: value for key, value in done.summary.items() if key != "seconds"}
        memory = summary.pop("peak_memory_bytes")
        found = {
            "method": name,
            "plan": planned,
            "memory": memory,
            "summary": summary,
            "rounds": rounds,
            "final": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        }
        print(json.dumps(found), flush=True)


def benches(folder: Path) -> dict[str, int]:
    """The benchmarks' own code on small models, in this process: rows of each."""
    from fedtune.bench import client_steps, emulator, memory, proximal, rebuild, synchronize, zo_step

    zo_step.REPEATS = 1  # what comes out is not looked at
    rows = {"memory": [memory.measure_case(case, 64, 2) for case in memory.CASES]}
    for case in ("Fed-full", "FedLoRA", "FedAdapter", "FedCyBGD, hybrid, last", "BAdam, first"):
        if case.startswith("FedCyBGD"):
            client_steps.write_order(client_steps.TINY, case, folder)
        rows.setdefault("client-steps", []).append(client_steps.measure_case(client_steps.TINY, case, folder))
    rows["zo-step"] = zo_step.measure(64, 2, wide=None)[0]
    rows["proximal"] = proximal.measure(64, 2)[0]
    rows["emulator"] = emulator.measure(64, 10, 1)[0]
    rows["synchronize"] = synchronize.measure(1 << 16, 64, (1,))[0]
    rows["rebuild"] = rebuild.measure(1 << 16, large=None, width=64, seeds=(8,), threads=(2,))[0]
    return {name: len(found) for name, found in rows.items()}


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
