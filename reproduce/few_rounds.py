"""DiLoCo beside FedAvg and one round, at as many steps: what going on and looking ahead come to, and bytes.

A ResNet on MNIST's pictures from random weights (small_models.py), since that is where rounds count. Ten
clients that are alike, 150 examples each, eight epochs in all: eight rounds of one, two of four, or one of
eight. The inner rate of each form is searched for each number of rounds on a part that no client has; the
outer rate and momentum are DiLoCo's, 0.7 and 0.9.

Table:   accuracy, loss and bytes by form and rounds; docs/neighbours.md, block few-rounds
Command: python reproduce/few_rounds.py few-rounds
Time:    not measured
Needs:   ../shared
Result:  1
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import DATA, RESULTS, ROOT, Entry, Prepared, main, spread, table
from search_rates import SEED, search
from small_models import scores

from fedtune.report.tables import size

CLIENTS, EXAMPLES, EPOCHS, SEEDS = 10, 150, 8, (0, 1, 2)
MADE = RESULTS / "few-rounds.json"
OUTER = {"server_optimizer": {"name": "nesterov", "lr": 0.7, "momentum": 0.9}}
KEEP = {"keep_optimizer": True}
# by name: the method's settings, the wire's
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FedAvg": ({}, {}),
    "FedAvg, AdamW goes on": (KEEP, {}),
    "FedAvg, Nesterov at the server": (OUTER, {}),
    "DiLoCo": (KEEP | OUTER, {}),
    "DiLoCo, int8": (KEEP | OUTER, {"dtype": "int8"}),
    "DiLoCo, int4, errors kept": (KEEP | OUTER, {"dtype": "int4", "error_feedback": True}),
}
KIND, ROUNDS = "ResNet", (8, 2)


def measured(settings: dict[str, Any], wire: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The rate, and the test scores of all seeds."""
    own = {"rounds": rounds, "local_epochs": EPOCHS // rounds, **settings}
    if rounds > 1:  # one decay over all steps, however many rounds they are cut into
        own["lr_over"] = "run"
    tried: dict[float, float] = {}

    def loss(lr: float) -> float:
        tried[lr] = scores(KIND, CLIENTS, EXAMPLES, {**own, "lr": lr}, SEED, "validation", wire)["loss"]
        return tried[lr]

    search(loss, 1e-2)
    best = min(tried, key=lambda lr: tried[lr])
    runs = [scores(KIND, CLIENTS, EXAMPLES, {**own, "lr": best}, seed, "test", wire) for seed in SEEDS]
    return {"rate": best, "runs": runs}


def cells() -> dict[str, tuple[dict[str, Any], dict[str, Any], int]]:
    """Every measurement by its key."""
    found = {f"{name}/{rounds}": (*form, rounds) for rounds in ROUNDS for name, form in FORMS.items()}
    return found | {"FedAvg/1": ({}, {}, 1)}


def measure(path: Path) -> None:
    """All cells; goes on with what was interrupted."""
    part = (ROOT / path).with_suffix(".part")
    lines = part.read_text(encoding="utf-8").splitlines() if part.exists() else []
    found: dict[str, Any] = dict(map(json.loads, lines))
    for key, cell in cells().items():
        if key not in found:
            found[key] = measured(*cell)
            with part.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, found[key]]) + "\n")
    (ROOT / path).write_text(json.dumps(found, indent=1), encoding="utf-8")


def rows() -> str:
    """A row a form and number of rounds."""
    found = json.loads((ROOT / MADE).read_text(encoding="utf-8"))
    lines = []
    for key in cells():
        name, _, rounds = key.partition("/")
        runs = found[key]["runs"]
        rate = f"{found[key]['rate']:.0e}".replace("e-0", "e-")
        sent = [size(runs[0][way] / CLIENTS) for way in ("down", "up")]
        scored = [spread([run[metric] for run in runs]) for metric in ("accuracy", "loss")]
        lines.append([name, rounds, rate, *scored, *sent])
    return table(["form", "rounds", "rate", "accuracy", "loss", "down, a client in all", "up"], lines)


ENTRIES = {"few-rounds": Entry(rows, [Prepared("all forms", MADE, measure)], [DATA / "mnist-t10k"])}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
