"""DiLoCo beside FedAvg and one round, at as many local steps: going on, looking ahead, and bytes.

All weights of a layer and a head on sentence features of MiniLM (neighbours.py): ten clients of 100 examples
of AG News, alike or not, eight epochs in all: eight rounds of one, four of two, two of four, or one of eight,
with AdamW whose rate falls over the whole run. DiLoCo's outer rate and momentum are the paper's, 0.7 and 0.9.
The inner rate of each row is the best of four (1e-3 to 3e-2) on the split of another seed; mean and standard
deviation of the held-out loss over three seeds. Bytes are a client's in the whole run.

Table:   held-out loss and bytes by form and rounds; docs/neighbours.md, block few-rounds
Command: python reproduce/few_rounds.py few-rounds
Time:    some three minutes (160 CPU seconds)
Needs:   ../shared
Result:  clients alike and unlike, eight rounds: FedAvg 0.3676 ± 0.0551 and 0.5616 ± 0.1607, with AdamW
         going on 0.3787 ± 0.0551 and 0.4811 ± 0.0589, DiLoCo 0.4104 ± 0.0299 and 0.6995 ± 0.3651; one-shot
         0.4069 ± 0.0488 and 1.2200 ± 0.6702
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from by_hand import federated
from common import RESULTS, ROOT, Entry, Prepared, main, spread, table
from neighbours import SPLITS, Classifier
from poisoning import CLIENTS, FEATURES, MODEL, NEWS, features, split
from torch import Tensor, nn

from fedtune.config.wire import Wire
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.report.tables import size

MADE = RESULTS / "few-rounds.json"
EPOCHS, SEEDS, SEARCHED, RATES = 8, (0, 1, 2), 9, (1e-3, 3e-3, 1e-2, 3e-2)
OUTER = {"server_optimizer": {"name": "nesterov", "lr": 0.7, "momentum": 0.9}}
DILOCO = {"keep_optimizer": True, **OUTER}
# by name: the method's settings, the wire's, and the numbers of rounds
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "FedAvg": ({}, {}, (8, 4, 2)),
    "one-shot": ({}, {}, (1,)),
    "FedAvg, AdamW goes on": ({"keep_optimizer": True}, {}, (8, 2)),
    "FedAvg, Nesterov at the server": (OUTER, {}, (8, 2)),
    "DiLoCo": (DILOCO, {}, (8, 4, 2)),
    "DiLoCo, int4, errors kept": (DILOCO, {"dtype": "int4", "error_feedback": True}, (8, 2)),
}
CELLS = [(name, rounds) for name, (_, _, numbers) in FORMS.items() for rounds in numbers]


def federate(
    known: Mapping[str, Tensor], cell: tuple[str, int], alpha: float, seed: int, lr: float
) -> dict[str, float]:
    """One federation: the held-out loss, and bytes a client."""
    name, rounds = cell
    settings, wire, _ = FORMS[name]
    clients, items = split(known["labels"], seed, alpha)
    document = {"rounds": rounds, "local_epochs": EPOCHS // rounds, "batch_size": 25, "lr": lr}
    config = Config.model_validate({**document, "trainable": "full", "lr_over": "run", **settings})
    method = FedAvg(config, seed)
    compression = Wire.model_validate(wire).compression(method)
    model: nn.Module = Classifier(known["features"], seed)
    state, ledger, _ = federated(method, model, clients, rounds, seed, compression)
    rows = torch.tensor([item.input_ids[0] for item in items])
    ((_, exported),) = method.export(state, model)
    with torch.no_grad():
        logits = exported(rows[:, None], rows[:, None], known["labels"][rows]).logits
    loss = float(nn.functional.cross_entropy(logits, known["labels"][rows]))
    return {"loss": loss, **{way: ledger.payload_bytes[way] / CLIENTS for way in ("down", "up")}}


def measure(path: Path) -> None:
    """All cells."""
    from safetensors.torch import load_file

    logging.getLogger("fedtune").setLevel(logging.ERROR)
    known, found = load_file(ROOT / FEATURES), dict[str, Any]()
    for how, alpha in SPLITS.items():
        for cell in CELLS:
            tried = {lr: federate(known, cell, alpha, SEARCHED, lr)["loss"] for lr in RATES}
            best = min(tried, key=lambda lr: tried[lr])
            runs = [federate(known, cell, alpha, seed, best) for seed in SEEDS]
            found[f"{how}/{cell[0]}/{cell[1]}"] = {"rate": best, "runs": runs}
    (ROOT / path).write_text(json.dumps(found, indent=1), encoding="utf-8")


def rows() -> str:
    """A row a form and number of rounds."""
    found = json.loads((ROOT / MADE).read_text(encoding="utf-8"))
    lines = []
    for name, rounds in CELLS:
        cells = []
        for how in SPLITS:
            cell = found[f"{how}/{name}/{rounds}"]
            cells += [
                f"{cell['rate']:.0e}".replace("e-0", "e-"),
                spread([run["loss"] for run in cell["runs"]]),
            ]
        run = found[f"alike/{name}/{rounds}"]["runs"][0]
        lines.append([name, str(rounds), *cells, size(run["down"]), size(run["up"])])
    losses = [head for how in SPLITS for head in ("rate", f"loss, {how}")]
    return table(["form", "rounds", *losses, "down, a client in all", "up"], lines)


STEPS = [Prepared("features of AG News", FEATURES, features), Prepared("all forms", MADE, measure)]
ENTRIES = {"few-rounds": Entry(rows, STEPS, [MODEL, NEWS])}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
