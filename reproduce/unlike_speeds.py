"""Clients of unlike speed in virtual time: who is waited for, who is chosen, and servers of regions between.

All weights of a layer and a head on sentence features of MiniLM (neighbours.py): ten clients of 100 examples
of AG News, alike or not, of which four train an epoch in one second, three in two, two in four and one in
eight. A round of all takes eight seconds, one of the five fastest two; a buffer steps when it is full, and
nobody waits. Four clients of a round are drawn evenly, or are those of highest loss among eight (asking takes
each a third of an epoch, which is waited for), of highest loss when they trained last, or of a tier of like
speed; or clients are there with a chance of one half, and a moment of waiting for them is a second. In the
last rows all clients take one second, and the server is eight seconds away, servers of two regions are not.
The rate of each row lies between two that are worse on a grid of 1, 3, 10, …, at the end of the time, on the
split of another seed, clients alike. Held-out loss after so many virtual seconds, and seconds until it is
what rounds of all have come to in half the time, mean and standard deviation over three seeds.

Table:   held-out loss by virtual time; docs/neighbours.md, block unlike-speeds
Command: python reproduce/unlike_speeds.py unlike-speeds
Time:    some three minutes (150 CPU seconds)
Needs:   ../shared
Result:  clients alike, after 16 and 32 s: rounds of all 0.4421 and 0.3692, four at random 0.4353 and 0.3754,
         four of highest loss 0.6826 and 0.4215 where eight are asked, 0.3852 and 0.3903 by their last round;
         unlike, after 32 s: 0.6477, 0.7282, 0.9049 and 0.7831, a buffer of 3 1.3042; server far away, after
         32 s: rounds of all 0.3858 and 0.7302, two regions of eight rounds 0.3695 and 0.6476
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from by_hand import federated
from common import RESULTS, ROOT, Entry, Prepared, climbed, main, spread, table
from neighbours import SPLITS, Classifier
from poisoning import CLIENTS, FEATURES, MODEL, NEWS, features, split
from torch import Tensor, nn

from fedtune.core.cohort import Cohort, QuorumError, RoundOutcome, sample_cohort
from fedtune.core.loop import RoundLoop
from fedtune.core.selection import candidates, highest, there, tier
from fedtune.methods.fedavg.fedbuff import arrivals
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config

MADE = RESULTS / "unlike-speeds.json"
SECONDS = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 4.0, 4.0, 8.0]
END, SHOWN, SEEDS, SEARCHED, BEGIN = 32.0, (8, 16, 32), (0, 1, 2), 9, 3e-3
EVERYONE, MOST, ASKING, MOMENT = tuple(range(CLIENTS)), 1_000, 1 / 3, 1.0


@dataclass(frozen=True)
class Form:
    """Who takes part: `whom` in each round, `count` chosen as `by` says, or whose updates fill `buffer`."""

    whom: tuple[int, ...] = EVERYONE
    count: int | None = None
    by: str = "random"
    buffer: dict[str, Any] | None = None
    regions: dict[str, Any] | None = None
    seconds: Sequence[float] = tuple(SECONDS)
    away: float = 0.0  # seconds to the server and back

    @property
    def every(self) -> int:
        """Rounds between two in which the server is reached."""
        return self.regions["rounds"] if self.regions else 1


NEAR: dict[str, Any] = {"seconds": (1.0,), "away": 8.0}
FORMS = {
    "rounds of all": Form(),
    "rounds of the five fastest": Form(tuple(range(5))),
    "rounds of four at random": Form(count=4),
    "rounds of four of highest loss, eight asked": Form(count=4, by="loss"),
    "rounds of four of highest loss at their last round": Form(count=4, by="last"),
    "rounds of three of one tier of speed": Form(count=3, by="speed"),
    "rounds of four who are there": Form(count=4, by="availability"),
    "rounds of four who are there, least asked first": Form(count=4, by="least-asked"),
    "a buffer of 10": Form(buffer={"size": 10}),
    "a buffer of 5": Form(buffer={"size": 5}),
    "a buffer of 3": Form(buffer={"size": 3}),
    "a buffer of 1": Form(buffer={"size": 1}),
    "a buffer of 3, staleness ignored": Form(buffer={"size": 3, "staleness": 0.0}),
    "server far away, rounds of all": Form(**NEAR),
    "server far away, two regions, one round": Form(regions={"of": [0, 1], "rounds": 1}, **NEAR),
    "server far away, two regions, four rounds": Form(regions={"of": [0, 1], "rounds": 4}, **NEAR),
    "server far away, two regions, eight rounds": Form(regions={"of": [0, 1], "rounds": 8}, **NEAR),
}


class Time:
    """Virtual time of one federation, and whom each of its rounds asks."""

    def __init__(self, form: Form, seed: int) -> None:
        self.form, self.seed, self.now = form, seed, 0.0
        self.last: dict[int, float] = {}

    def choose(self, loop: RoundLoop, state: Any, round: int) -> tuple[int, ...] | None:
        """The round's clients; None where it would end too late."""
        form, slowest = self.form, 0.0
        if form.buffer is not None:
            chosen, self.now = arrivals(EVERYONE, form.seconds, form.buffer["size"], round)
            return chosen if self.now <= END else None
        chosen = form.whom
        if form.by == "loss":
            among = candidates(dict.fromkeys(EVERYONE, 1), 8, by_examples=False, seed=self.seed, round=round)
            cohort = Cohort(among, dict.fromkeys(among, 1), CLIENTS)
            chosen = highest(loop.losses(state, cohort, round)[0], form.count or 0)
            slowest = ASKING * max(self.takes(client) for client in among)
        elif form.by == "last":
            losses = {client: self.last.get(client, math.inf) for client in EVERYONE}
            chosen = highest(losses, form.count or 0)
        elif form.by == "speed":
            chosen = tier(EVERYONE, form.seconds, 3, form.count or 0, seed=self.seed, round=round)
        elif form.by != "random":
            prefer: Any = "random" if form.by == "availability" else "least-asked"
            how = {"prefer": prefer, "seed": self.seed, "round": round}
            chosen = there(EVERYONE, [0.5], form.count or 0, **how)
            slowest = MOMENT
        elif form.count:
            weights = dict.fromkeys(EVERYONE, 1)
            chosen = sample_cohort(weights, form.count, seed=self.seed, round=round).clients
        slowest += max(self.takes(client) for client in chosen)
        near = form.regions is not None and round % form.every
        self.now += slowest + (0.0 if near else form.away)
        return chosen if self.now <= END else None

    def takes(self, client: int) -> float:
        """Seconds of a client's training."""
        return self.form.seconds[client % len(self.form.seconds)]


def federate(
    known: Mapping[str, Tensor], name: str, alpha: float, seed: int, lr: float
) -> list[tuple[float, float]]:
    """One federation: virtual seconds and the held-out loss after each round or step."""
    form, time = FORMS[name], Time(FORMS[name], seed)
    clients, items = split(known["labels"], seed, alpha)
    buffer = {**form.buffer, "seconds": list(form.seconds)} if form.buffer else None
    settings = {
        "rounds": MOST - MOST % form.every,
        "local_epochs": 1,
        "batch_size": 25,
        "lr": lr,
        "trainable": "full",
    }
    more = {"buffer": buffer, "regions": form.regions}
    method = FedAvg(Config.model_validate({**settings, **more}), seed)
    model: nn.Module = Classifier(known["features"], seed)
    rows, found = torch.tensor([item.input_ids[0] for item in items]), list[tuple[float, float]]()

    def after(round: int, state: Any, outcome: RoundOutcome) -> None:
        time.last |= {client: outcome.metrics[client]["train_loss"] for client in outcome.clients}
        if round % form.every:
            return
        for _, exported in method.export(state, model):
            with torch.no_grad():
                logits = exported(rows[:, None], rows[:, None], known["labels"][rows]).logits
            found.append((time.now, float(nn.functional.cross_entropy(logits, known["labels"][rows]))))

    federated(method, model, clients, method.rounds, seed, choose=time.choose, after=after)
    return found


def at(course: list[tuple[float, float]], second: float) -> float:
    """The loss at a moment; infinite before the first round's end."""
    return [float("inf"), *(loss for when, loss in course if when <= second)][-1]


def searched(known: Mapping[str, Tensor], name: str, lr: float) -> float:
    """The loss at the end on the split that rates are chosen on; infinite where training broke down."""
    try:
        return at(federate(known, name, SPLITS["alike"], SEARCHED, lr), END)
    except QuorumError:
        return math.inf


def measure(path: Path) -> None:
    """All cells."""
    from safetensors.torch import load_file

    logging.getLogger("fedtune").setLevel(logging.ERROR)
    known, found = load_file(ROOT / FEATURES), dict[str, Any]()
    for name in FORMS:
        best = climbed(partial(searched, known, name), BEGIN)
        courses = {how: [federate(known, name, a, seed, best) for seed in SEEDS] for how, a in SPLITS.items()}
        found[name] = {"rate": best, **courses}
    (ROOT / path).write_text(json.dumps(found, indent=1), encoding="utf-8")


def rows() -> str:
    """A row a form."""
    found = json.loads((ROOT / MADE).read_text(encoding="utf-8"))
    first, lines = next(iter(FORMS)), []
    for name, form in FORMS.items():
        steps = len(found[name]["alike"][0])
        each = form.buffer["size"] if form.buffer else form.count or len(form.whom)
        updates = steps * form.every * each
        cells = [f"{found[name]['rate']:.0e}".replace("e-0", "e-"), str(steps), str(updates)]
        for how in SPLITS:
            courses = found[name][how]
            for second in SHOWN:
                losses = [at(course, second) for course in courses]
                cells.append(spread(losses) if all(map(math.isfinite, losses)) else "no round yet")
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
