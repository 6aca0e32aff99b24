"""τ of LoRA counted on its factors and on what they add to the model, beside τ of all weights.

‖ΔW‖ is of what training adds to the model's weights: for LoRA the product (alpha / rank) · B · A, where the
factors themselves begin at A drawn and B = 0. The bundled model, ten clients alike, 400 examples, three
rounds of one epoch; LoRA of rank 16 at 3e-3, all weights at 2e-3, as in the tables of docs/theory.md.

Table:   τ by what is counted, and T·k as the paper counts it; docs/theory.md, block tau
Command: python reproduce/tau.py tau
Time:    not measured
Needs:   nothing
Result:  1
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, Entry, Prepared, main, table
from safetensors.torch import load_file
from torch import Tensor

from fedtune.config.file import load_config
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.methods import registry
from fedtune.models.load import load_model
from fedtune.models.save import load_result

SEEDS, CLIENTS, EXAMPLES, ROUNDS = (0, 1, 2), 10, 400, 3
KINDS = {"LoRA": (), "all weights": ("method.trainable=full", "method.lr=2e-3")}
BATCH = 8


def norm(weights: Mapping[str, Tensor]) -> float:
    """‖w‖ over all tensors, in float64."""
    return math.sqrt(sum(float(w.double().square().sum()) for w in weights.values()))


def moved(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What training added, by name. Raises KeyError where the two have not the same tensors."""
    if after.keys() != before.keys():
        raise KeyError(f"not in both: {sorted(after.keys() ^ before.keys())[:3]}")
    return {name: after[name].double() - w.double() for name, w in before.items()}


def plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors by layer and letter, however PEFT wraps their names."""
    found = {}
    for name, weight in weights.items():
        layer = re.search(r"(layers\.\d+\..*)\.lora_([AB])\b", name)
        if layer is None:
            raise KeyError(f"{name} is no factor")
        found[f"{layer[1]}.{layer[2]}"] = weight
    return found


def measure(out: Path, *, kind: str, seed: int) -> None:
    """Trains once, and writes the norms."""
    data = f"data={{train: bundled, clients: {CLIENTS}, max_examples: {EXAMPLES}, partition: {{name: iid}}}}"
    settings = (data, f"seed={seed}", "evaluation={tasks: [loss], every: 0, max_examples: 32}")
    config = load_config(ROOT / "configs/bundled_multi_round.yaml", [*settings, *KINDS[kind]])

    def base(name: str) -> Any:
        return load_model(name, dtype="float32", initial="pretrained", seed=seed, base=ROOT)

    method: Any = registry.build(config.method, config.seed)
    trained = method.init(method.client_model(lambda: base("bundled").model)).weights
    before = {name: w.detach() for name, w in base("bundled").model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        run(config, Path(folder) / "run", Silent())
        final = Path(folder) / "run/final"
        result: Any = load_result(final, base).model
        whole = result.merge_and_unload() if kind == "LoRA" else result
        after = {name: w.detach() for name, w in whole.named_parameters()}
        if kind == "LoRA":
            first, last = plain(trained), plain(load_file(final / "adapter_model.safetensors"))
        else:
            first, last = before, after
        added = moved(after, before)
        touched = {name: w for name, w in before.items() if bool(added[name].any())}
        found = {
            "trained": norm(moved(last, first)) / norm(first),
            "touched": norm(added) / norm(touched),
            "model": norm(added) / norm(before),
            "tensors": len(touched),
        }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found), encoding="utf-8")


def cell(kind: str, seed: int) -> Prepared:
    """A measured run."""
    out = RESULTS / "tau" / f"{kind.replace(' ', '-')}-{seed}.json"
    return Prepared(f"τ of {kind}, seed {seed}", out, partial(measure, kind=kind, seed=seed))


def shown(values: list[float]) -> str:
    """Mean and range, at three digits."""
    return f"{sum(values) / len(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def taus() -> str:
    """A row a way to train, mean and range over the seeds."""
    rows = []
    for kind in KINDS:
        made = [json.loads((ROOT / cell(kind, seed).made).read_text(encoding="utf-8")) for seed in SEEDS]
        rows.append([kind, *(shown([row[key] for row in made]) for key in ("trained", "touched", "model"))])
    ours, papers = (
        ROUNDS * math.ceil(EXAMPLES / (CLIENTS * BATCH)),
        ROUNDS * math.ceil(EXAMPLES / BATCH),
    )
    header = ["trained", "τ of what is trained", "‖ΔW‖ / ‖W‖ of the tensors it changes", "of the whole model"]
    return (
        f"{table(header, rows)}\n\nT·k is {ours} here, the steps of a client, and {papers} as the paper "
        "counts it in its Table 4: steps over the data of all clients."
    )


ENTRIES = {"tau": Entry(taus, [cell(kind, seed) for kind in KINDS for seed in SEEDS])}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
