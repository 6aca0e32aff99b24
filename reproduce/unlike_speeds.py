"""Clients of unlike speed in virtual time: rounds that wait for the slowest, and steps of a buffer (FedBuff).

All weights of a layer and a head on sentence features of MiniLM (neighbours.py): ten clients of 100 examples
of AG News, alike or not, of which four train an epoch in one second, three in two, two in four and one in
eight. A round of all takes eight seconds, one of the five fastest two; a buffer steps when it is full, and
nobody waits. The rate of each row is the best of three at the end of the time, on the split of another seed,
clients alike. Held-out loss after so many virtual seconds, and seconds until it is what rounds of all have
come to in half the time, mean and standard deviation over three seeds.

Table:   held-out loss by virtual time; docs/neighbours.md, block unlike-speeds
Command: python reproduce/unlike_speeds.py unlike-speeds
Time:    some three minutes (120 CPU seconds)
Needs:   ../shared
Result:  clients alike, after 8 and 32 s: rounds of all 0.7440 and 0.3692, a buffer of 1 0.4282 and 0.4619,
         one of 3 0.7227 and 0.3883; unlike, after 32 s: 0.6477, a buffer of 3 1.3042, the five fastest 1.2089
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

from fedtune.methods.fedavg.fedbuff import arrivals, together
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config

MADE = RESULTS / "unlike-speeds.json"
SECONDS = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 4.0, 4.0, 8.0]
END, SHOWN, SEEDS, SEARCHED, RATES = 32.0, (8, 16, 32), (0, 1, 2), 9, (1e-3, 3e-3, 1e-2)
EVERYONE, FASTEST = tuple(range(CLIENTS)), tuple(range(5))
# by name: who takes part in a round, or the buffer's settings
FORMS: dict[str, tuple[int, ...] | dict[str, Any]] = {
    "rounds of all": EVERYONE,
    "rounds of the five fastest": FASTEST,
    "a buffer of 10": {"size": 10},
    "a buffer of 5": {"size": 5},
    "a buffer of 3": {"size": 3},
    "a buffer of 1": {"size": 1},
    "a buffer of 3, staleness ignored": {"size": 3, "staleness": 0.0},
}


def moment(form: tuple[int, ...] | dict[str, Any], round: int) -> float:
    """When a round ends, or a step is made."""
    if isinstance(form, dict):
        return arrivals(EVERYONE, SECONDS, form["size"], round)[1]
    return together(form, SECONDS, round)


def federate(
    known: Mapping[str, Tensor], name: str, alpha: float, seed: int, lr: float
) -> list[tuple[float, float]]:
    """One federation: virtual seconds and the held-out loss after each round or step."""
    form = FORMS[name]
    rounds = next(round for round in range(1, 10_000) if moment(form, round + 1) > END)
    clients, items = split(known["labels"], seed, alpha)
    buffer = {**form, "seconds": SECONDS} if isinstance(form, dict) else None
    settings = {"rounds": rounds, "local_epochs": 1, "batch_size": 25, "lr": lr, "trainable": "full"}
    method = FedAvg(Config.model_validate({**settings, "buffer": buffer}), seed)
    model: nn.Module = Classifier(known["features"], seed)
    rows, found = torch.tensor([item.input_ids[0] for item in items]), list[tuple[float, float]]()

    def after(round: int, state: Any) -> None:
        for _, exported in method.export(state, model):
            with torch.no_grad():
                logits = exported(rows[:, None], rows[:, None], known["labels"][rows]).logits
            loss = float(nn.functional.cross_entropy(logits, known["labels"][rows]))
            found.append((moment(form, round), loss))

    whom = form if isinstance(form, tuple) else None
    federated(method, model, clients, rounds, seed, whom=whom, after=after)
    return found


def at(course: list[tuple[float, float]], second: float) -> float:
    """The loss at a moment; infinite before the first round's end."""
    return [float("inf"), *(loss for when, loss in course if when <= second)][-1]


def measure(path: Path) -> None:
    """All cells."""
    from safetensors.torch import load_file

    logging.getLogger("fedtune").setLevel(logging.ERROR)
    known, found = load_file(ROOT / FEATURES), dict[str, Any]()
    for name in FORMS:
        tried = {lr: at(federate(known, name, SPLITS["alike"], SEARCHED, lr), END) for lr in RATES}
        best = min(tried, key=lambda lr: tried[lr])
        courses = {how: [federate(known, name, a, seed, best) for seed in SEEDS] for how, a in SPLITS.items()}
        found[name] = {"rate": best, **courses}
    (ROOT / path).write_text(json.dumps(found, indent=1), encoding="utf-8")


def rows() -> str:
    """A row a form."""
    found = json.loads((ROOT / MADE).read_text(encoding="utf-8"))
    first, lines = next(iter(FORMS)), []
    for name, form in FORMS.items():
        steps = len(found[name]["alike"][0])
        updates = steps * (len(form) if isinstance(form, tuple) else form["size"])
        cells = [f"{found[name]['rate']:.0e}".replace("e-0", "e-"), str(steps), str(updates)]
        for how in SPLITS:
            courses = found[name][how]
            cells += [spread([at(course, second) for course in courses]) for second in SHOWN]
            goals = [at(course, END / 2) for course in found[first][how]]
            reached = [
                min((when for when, loss in course if loss <= goal), default=None)
                for course, goal in zip(courses, goals, strict=True)
            ]
            there = [when for when in reached if when is not None]
            short = f" ({len(there)} of {len(reached)})" if len(there) < len(reached) else ""
            cells += [(spread(there) if there else "never") + (short if there else "")]
        lines.append([name, *cells])
    header = ["", "rate", "steps", "updates"]
    for how in SPLITS:
        header += [f"loss, {how}, {second} s" for second in SHOWN] + [
            f"seconds to the first row's at {END / 2:.0f} s"
        ]
    return table(header, lines)


STEPS = [Prepared("features of AG News", FEATURES, features), Prepared("federations", MADE, measure)]
ENTRIES = {"unlike-speeds": Entry(rows, STEPS, [MODEL, NEWS])}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
