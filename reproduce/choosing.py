"""What each method asks of a client and of the server, planned for one model, to choose by.

Table:   memory, bytes and what clients hold, by method, on LLaMA-2-7B's shape; docs/choosing.md,
         block choosing
Command: python reproduce/choosing.py choosing
Time:    five minutes of one core
Needs:   nothing; the model's shape is in configs/papers/shapes
Result:  a client needs 15.64 GB with LoRA, 6.03 GB on 4 bits, 13.74 GB with FedKSeed, 12.38 GB with FedBiOT,
         17.83 GB with FedCyBGD or 10.82 GB with layer-drop; up go 33.55 MB, 1.20 kB, 1.05 MB, 809.53 MB
"""

from __future__ import annotations

import json
import sys
from typing import Any

from common import RESULTS, ROOT, Entry, main, table

import fedtune
from fedtune.report.tables import size

SHAPE = ROOT / "configs" / "papers" / "shapes" / "llama-2-7b"
DONE = RESULTS / "choosing.json"  # goes on with what was interrupted; delete it where plans have changed
SAME = (
    f"model.name={SHAPE}",
    "model.dtype=bfloat16",
    "data.train=databricks/databricks-dolly-15k",
    "data.holdout={fraction: 0.01}",
    "data.template=alpaca",
    "data.clients=10",
    "data.max_length=512",
    "data.public={source: tatsu-lab/alpaca}",
    "evaluation={tasks: [loss]}",
)
METHODS: dict[str, tuple[str, ...]] = {
    "fedavg, LoRA": ("method.name=fedavg", "method.trainable=lora"),
    "fedavg, LoRA on 4 bits": ("method.name=fedavg", "method.trainable=lora", "model.quantization=nf4"),
    "fedavg, all weights": ("method.name=fedavg", "method.trainable=full"),
    "fedkseed": ("method.name=fedkseed",),
    "fedkseed-pro": ("method.name=fedkseed-pro",),
    "fedbiot": ("method.name=fedbiot",),
    "fedcybgd": ("method.name=fedcybgd",),
    "fedcybgd, layer-drop": ("method.name=fedcybgd", "method.compression=layer-drop"),
}
KEPT = (
    "rounds",
    "payload_bytes",
    "client_peak_memory_bytes",
    "server_peak_memory_bytes",
    "clients_hold_model",
)


def planned(method: str) -> dict[str, Any]:
    """What `fedtune.plan` says of a method; kept for next time."""
    done: dict[str, Any] = json.loads(DONE.read_text(encoding="utf-8")) if DONE.exists() else {}
    if method not in done:
        print(method, file=sys.stderr, flush=True)
        public = [one for one in SAME if not one.startswith("data.public") or method == "fedbiot"]
        found = fedtune.plan({}, *public, *METHODS[method])
        done[method] = {name: found[name] for name in KEPT}
        DONE.parent.mkdir(parents=True, exist_ok=True)
        new = DONE.with_suffix(".new")
        new.write_text(json.dumps(done, indent=1), encoding="utf-8")
        new.replace(DONE)
    return done[method]


def choosing() -> str:
    """A row a method."""
    rows = []
    for method in METHODS:
        plan = planned(method)
        first, later = plan["payload_bytes"]["first_time"], plan["payload_bytes"]["later"]
        down = size(first["down"])
        if first["down"] != later["down"]:
            down += f", then {size(later['down'])}"
        rows.append(
            (
                method,
                size(plan["client_peak_memory_bytes"]["total"]),
                size(plan["server_peak_memory_bytes"]["total"]),
                down,
                size(later["up"]),
                "yes" if plan["clients_hold_model"] else "no",
            )
        )
    head = (
        "method",
        "a client's memory",
        "the server's",
        "down a client and round",
        "up",
        "clients see the model",
    )
    return table(head, rows)


ENTRIES = {"choosing": Entry(choosing)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
