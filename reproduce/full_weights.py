"""What a client needs to train all weights, and with settings that need less.

Table:   planned memory of Llama-2-7B, bfloat16, all weights, 8 x 512 tokens; docs/fedavg.md, block
         full-weights-memory
Command: python reproduce/full_weights.py full-weights-memory
Time:    three minutes
Needs:   nothing; the model's shape is in configs/papers/shapes
Result:  121.33 GB before, 29.78 GB with stochastic rounding, 8 bits and steps in the backward pass
"""

from __future__ import annotations

from typing import Any

from common import ROOT, Entry, main, table

from fedtune.config.file import load_config
from fedtune.planning.plan import plan
from fedtune.report.tables import size

PAPERS = ROOT / "configs" / "papers"
INSIDE = {"optimizer_in_backward": True}
KAHAN, STOCHASTIC, NARROW = {"masters": "kahan"}, {"masters": "stochastic"}, {"optimizer": "adamw-8bit"}
FORMS: dict[str, dict[str, Any]] = {
    "as it was: float32 masters and moments": {},
    "`optimizer_in_backward: true`": INSIDE,
    "`masters: kahan`": KAHAN,
    "`masters: stochastic`": STOCHASTIC,
    "stochastic, 8 bits, in the backward pass": {**INSIDE, **STOCHASTIC, **NARROW},
}
PARTS = ("weights", "gradients", "optimizer", "activations", "total")


def planned(settings: dict[str, Any], shape: str = "llama-2-7b") -> dict[str, int]:
    """A client's planned bytes by part, with these settings."""
    changed = [f"model.name={PAPERS / 'shapes' / shape}", "method.rounds=1", "data.clients=1"]
    changed += [f"method.{name}={str(value).lower()}" for name, value in settings.items()]
    config = load_config(PAPERS / "multi_round_full.yaml", changed)
    found: dict[str, int] = plan(config).document["client_peak_memory_bytes"]
    return found


def memory() -> str:
    """A row for each form."""
    rows = []
    for name, settings in FORMS.items():
        found = planned(settings)
        rows.append([name, *(size(found[part]) for part in PARTS)])
    return table(["", *PARTS], rows)


ENTRIES = {"full-weights-memory": Entry(memory)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
