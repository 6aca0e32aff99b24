"""Every method planned and run in a process with a given number of threads; prints a line of JSON a method.

python threaded.py THREADS FOLDER METHOD...
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

LOCAL: dict[str, Any] = {"local_steps": 2, "batch_size": 2}
ALIGNED = {"adapter_layers": 1, "alignment": {"steps_before": 1, "steps": 1, "batch_size": 2}}
SETTINGS: dict[str, dict[str, Any]] = {
    "fedavg": {**LOCAL, "rounds": 2, "lora": {"rank": 2}},
    "fedkseed": {**LOCAL, "rounds": 2, "seeds": 8},
    "fedkseed-pro": {**LOCAL, "rounds": 2, "seeds": 8},
    "infinite-pool": {**LOCAL, "rounds": 2},
    "fedbiot": {**LOCAL, "rounds": 2, "lora": {"rank": 2}, **ALIGNED},
    "fedot": {**LOCAL, "rounds": 2, "lora": {"rank": 2}, "adapter_layers": 1},
    "offsite-tuning": {"adapter_layers": 1, "lora": {"rank": 2}, **LOCAL},
    "fedcybgd": {**LOCAL, "rounds": 2},
    "fedbavg": {**LOCAL, "rounds": 2},
    "badam": {**LOCAL, "switch_interval": 1},
    "standalone": {**LOCAL, "lora": {"rank": 2}},
    "centralized": {**LOCAL, "lora": {"rank": 2}},
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

    assert torch.get_num_threads() == threads  # of OMP_NUM_THREADS, as a user's machine has it
    for name in names:
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


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
