"""What poisoned updates do to a federation, and what each defence does against them, on AG News.

Ten clients train a head of four classes and a layer of rank 8 on sentence features of MiniLM, which stay as
they are: 100 examples a client, its classes drawn from a Dirichlet distribution of 0.5, three rounds of two
epochs with AdamW. Some clients attack in every round. Losses and accuracies are of 500 held-out examples,
mean and standard deviation over three seeds.

Table:   accuracy by attack and defence; docs/poisoning.md, block poisoning-accuracy
Command: python reproduce/poisoning.py accuracy
Time:    6 minutes
Needs:   ../shared
Result:  one of ten that sends 1000 times its update takes 0.849 to 0.279; without any option it stays 0.837;
         an inflated count of one with moved labels takes it to 0.133, and capped weights keep 0.798

Table:   held-out loss by attack and defence; docs/poisoning.md, block poisoning-loss
Command: python reproduce/poisoning.py loss
Time:    seconds, after the accuracies
Needs:   ../shared
Result:  0.486 honestly; two of ten that send 10 times theirs make it 3.16, a median 0.433, Krum 0.872

Table:   who was named and left out without any option; docs/poisoning.md, block poisoning-named
Command: python reproduce/poisoning.py named
Time:    seconds, after the accuracies
Needs:   ../shared
Result:  all 36 updates times 1000 of four clients were named and left out, 8 of 36 with a flipped sign named,
         of flipped labels and inflated counts 0, of honest clients 0
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import DATA, MODELS, RESULTS, ROOT, Entry, Prepared, main, spread, table
from torch import Tensor, nn

from fedtune.config.schema import Federation
from fedtune.core.client import ClientRunner
from fedtune.core.cohort import QuorumError, RoundOutcome, quorum_of, sample_cohort, weights_of
from fedtune.core.ledger import Ledger
from fedtune.core.loop import RoundLoop
from fedtune.core.seeds import numpy_generator, torch_generator
from fedtune.core.types import Arrival, Frame, Transport
from fedtune.core.wire import Content, decode, encode
from fedtune.data.encoded import Encoded
from fedtune.federation.guard import Guard, RoundRefused
from fedtune.federation.scored import Evaluated
from fedtune.measure.clock import Clock
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.fedavg.state import State
from fedtune.protection.robust_mean import robust_mean
from fedtune.transport.in_process import InProcess, Simulation

MADE, FEATURES = RESULTS / "poisoning.json", RESULTS / "poisoning-features.safetensors"
MODEL, NEWS = MODELS / "minilm-l6", DATA / "agnews/agnews_train.jsonl"
CLIENTS, EACH, HELD_OUT, ROUNDS, SEEDS = 10, 100, 500, 3, (0, 1, 2)
SHARES = (1, 2, 4)  # of ten clients
CLAIM = 10**9  # examples
TYPICAL = 2.5  # the norm of an honest update in the first round

Alter = Callable[[Tensor, torch.Generator, float], Tensor]  # a number's tensor, draws, the update's norm
ATTACKS: dict[str, Alter | None] = {
    "scaled × 1000": lambda tensor, draw, norm: tensor * 1000,
    "scaled × 10": lambda tensor, draw, norm: tensor * 10,
    "sign flipped": lambda tensor, draw, norm: -tensor,
    "Gaussian noise": lambda tensor, draw, norm: torch.randn(tensor.shape, generator=draw) * norm,
    "labels flipped": None,
    "inflated count": None,  # of a client whose labels are flipped
}
OFF: dict[str, Any] = {"max_norm_ratio": None, "max_loss_jump": None}
DEFENCES: dict[str, dict[str, Any]] = {
    "none": OFF,
    "no option": {},
    "median": OFF | {"robust": {"mean": "median"}},
    "trimmed mean": OFF | {"robust": {"mean": "trimmed-mean", "trim": 0.2}},
    "Krum": OFF | {"robust": {"mean": "krum"}},
    "Multi-Krum": OFF | {"robust": {"mean": "krum", "keep": 5}},
    "norm bound": OFF | {"robust": {"max_norm": TYPICAL}},
    "norm quantile": OFF | {"robust": {"norm_quantile": 0.5}},
    "quantile + median": OFF | {"robust": {"mean": "median", "norm_quantile": 0.5}},
    "capped weights": OFF | {"weights": "capped"},
}


class Head(nn.Module):
    """A linear head on features with a layer of rank 8 before it; an example's token is its feature's row."""

    def __init__(self, features: Tensor, seed: int) -> None:
        super().__init__()
        draw, width = torch_generator(seed, "head"), features.shape[1]
        self.register_buffer("features", features, persistent=False)
        self.a = nn.Parameter(torch.randn(8, width, generator=draw) * width**-0.5)
        self.b = nn.Parameter(torch.zeros(width, 8))
        self.head = nn.Parameter(torch.randn(4, width, generator=draw) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        """Loss and logits of a batch."""
        hidden = self.features[input_ids[:, 0]]  # type: ignore[index]
        logits = (hidden + hidden @ self.a.T @ self.b.T) @ self.head.T + self.bias
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class Poisoned:
    """A transport on which the replies of some clients are altered as they come."""

    def __init__(self, inner: Transport, alter: Alter | None, attackers: Iterable[int], seed: int) -> None:
        self._inner, self._alter, self._attackers, self._seed = inner, alter, set(attackers), seed

    def exchange(
        self, round: int, frames: Iterable[tuple[int, Frame]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        """As the inner transport, but for the attackers' replies."""
        for arrival in self._inner.exchange(round, frames, in_plan_order=in_plan_order):
            if self._alter is None or arrival.client not in self._attackers:
                yield arrival
                continue
            reply = decode(arrival.frame)
            sizes = [float(tensor.norm()) ** 2 for tensor in reply.payload.tensors.values()]
            count = sum(tensor.numel() for tensor in reply.payload.tensors.values())
            each = 10 * (sum(sizes) / count) ** 0.5  # ten times the update's own norm in all
            draw = torch_generator(self._seed, "attack", round, arrival.client)
            tensors = {n: self._alter(t, draw, each) for n, t in reply.payload.tensors.items()}
            frame = encode(Content(replace(reply.payload, tensors=tensors), reply.meta))
            yield Arrival(arrival.client, frame)


def features(path: Path) -> None:
    """Mean last hidden states of the training examples' texts, and their classes."""
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoTokenizer

    lines = (ROOT / NEWS).read_text(encoding="utf-8").splitlines()
    chosen = numpy_generator(0, "news").permutation(len(lines))[: 2 * CLIENTS * EACH + HELD_OUT]
    rows = [json.loads(lines[i]) for i in sorted(chosen)]
    names = sorted({row["label"] for row in rows})
    tokenizer, model = AutoTokenizer.from_pretrained(ROOT / MODEL), AutoModel.from_pretrained(ROOT / MODEL)
    found = []
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            texts = [row["input"] for row in rows[start : start + 64]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            found.append((hidden * mask).sum(1) / mask.sum(1))
    labels = torch.tensor([names.index(row["label"]) for row in rows])
    save_file({"features": torch.cat(found).to(torch.float32), "labels": labels}, path)


def split(labels: Tensor, seed: int, alpha: float = 0.5) -> tuple[dict[int, list[Encoded]], list[Encoded]]:
    """Clients' examples, 100 each, of classes drawn by a Dirichlet distribution, and the held-out ones."""
    draw = numpy_generator(seed, "split")
    order = draw.permutation(len(labels)).tolist()
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    pools = {label: [i for i in rest if int(labels[i]) == label] for label in range(4)}
    clients: dict[int, list[Encoded]] = {}
    for client in range(CLIENTS):
        wanted = draw.multinomial(EACH, draw.dirichlet([alpha] * 4))
        taken = [pools[label].pop() for label in range(4) for _ in range(wanted[label]) if pools[label]]
        clients[client] = [Encoded((i,), (int(labels[i]),)) for i in taken]
    return clients, [Encoded((i,), (int(labels[i]),)) for i in held]


def federate(
    known: Mapping[str, Tensor], attack: str, bad: int, settings: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """One federation; its held-out loss and accuracy, and who was named."""
    clients, held = split(known["labels"], seed)
    attackers = numpy_generator(seed, "attackers").permutation(CLIENTS)[:bad].tolist()
    registered = {client: len(items) for client, items in clients.items()}
    if attack in ("labels flipped", "inflated count"):
        for client in attackers:
            clients[client] = [Encoded(i.input_ids, ((i.labels[0] + 1) % 4,)) for i in clients[client]]
    if attack == "inflated count":
        registered |= dict.fromkeys(attackers, CLAIM)
    federation, device, clock = Federation(**settings), torch.device("cpu"), Clock()
    method = FedAvg(Config(trainable="full", rounds=ROUNDS, local_epochs=2, batch_size=25, lr=1e-2), seed)
    model = method.client_model(lambda: Head(known["features"], seed))
    runner = ClientRunner(method, model, clients, pad_id=0, seed=seed, device=device)
    inner = InProcess(runner, simulation=Simulation(), deadline_s=None, seed=seed, clock=clock)
    transport = Poisoned(inner, ATTACKS.get(attack), attackers, seed)
    robust = robust_mean(federation.robust, method, None) if federation.robust else None
    ledger = Ledger(lambda entry: None, lambda entry: None)
    loop = RoundLoop(method, transport, ledger, clock, device, robust=robust)
    weights = weights_of(registered, federation.weights, federation.max_examples)
    told = {"named": 0, "left_out": 0, "honest": 0, "stopped": 0}

    def evaluated(state: State) -> dict[str, float]:
        (_, exported), *_ = method.export(state, model)
        rows = torch.tensor([item.input_ids for item in held])
        right = torch.tensor([item.labels[0] for item in held])
        with torch.no_grad():
            output = exported(rows, rows, right)
        accuracy = float((output.logits.argmax(1) == right).float().mean())
        return {"loss": float(output.loss), "accuracy": accuracy}

    state, guard = method.init(model), Guard(federation, method)
    loss = evaluated(state)["loss"]
    for round in range(1, ROUNDS + 1):
        cohort = sample_cohort(weights, None, seed=seed, round=round)

        def once(
            without: Mapping[int, str], state: State = state, round: int = round
        ) -> tuple[State, RoundOutcome]:
            cohort = sample_cohort(weights, None, seed=seed, round=round)
            quorum = quorum_of(CLIENTS, federation.quorum)
            return loop.run(
                state, cohort, round, quorum=quorum, on_arrival=lambda state, outcome: None, without=without
            )

        try:
            settled = guard.settle(once, lambda state: Evaluated({"loss": evaluated(state)}), loss=loss)
        except (RoundRefused, QuorumError):
            told["stopped"] += 1
            break
        state, loss = settled.state, settled.scores.result["loss"]["loss"]
        out = [int(client) for refused in settled.entry.get("refused", []) for client in refused["without"]]
        said = [int(client) for client in settled.entry.get("stands_out", {})]
        told["left_out"] += len([client for client in out if client in attackers])
        told["named"] += len([client for client in out + said if client in attackers])
        told["honest"] += len([client for client in out + said if client not in attackers])
        del cohort
    return evaluated(state) | told


def measure(path: Path) -> None:
    """All cells."""
    from safetensors.torch import load_file

    logging.getLogger("fedtune").setLevel(logging.ERROR)
    known = load_file(ROOT / FEATURES)
    cells = [("nobody", 0), *((attack, bad) for attack in ATTACKS for bad in SHARES)]
    part = (ROOT / path).with_suffix(".part")  # an interrupted measurement goes on
    lines = part.read_text(encoding="utf-8").splitlines() if part.exists() else []
    found: dict[str, Any] = dict(map(json.loads, lines))
    for attack, bad in cells:
        for name, settings in DEFENCES.items():
            key = f"{attack}/{bad}/{name}"
            if key in found:
                continue
            found[key] = [federate(known, attack, bad, settings, seed) for seed in SEEDS]
            with part.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, found[key]]) + "\n")
    (ROOT / path).write_text(json.dumps(found, indent=1), encoding="utf-8")


def scores(metric: str) -> str:
    """A row an attack, a column a defence."""
    found = json.loads((ROOT / MADE).read_text(encoding="utf-8"))
    rows = []
    for attack, bad in [("nobody", 0), *((attack, bad) for attack in ATTACKS for bad in SHARES)]:
        said = attack if not bad else f"{attack}, {bad} of {CLIENTS}"
        of = [[run[metric] for run in found[f"{attack}/{bad}/{name}"]] for name in DEFENCES]
        rows.append([said, *map(short, of)])
    return table(["attackers", *DEFENCES], rows)


def short(values: list[float]) -> str:
    """Mean and spread in few digits."""
    mean, _, sd = spread(values).partition(" ± ")
    return f"{float(mean):.3g} ± {float(sd):.2g}"


def named() -> str:
    """Of the attackers' updates of a run without any option, how many were named and left out."""
    found = json.loads((ROOT / MADE).read_text(encoding="utf-8"))
    rows = []
    for attack, bad in [("nobody", 0), *((attack, bad) for attack in ATTACKS for bad in SHARES)]:
        runs = found[f"{attack}/{bad}/no option"]
        sums = {key: sum(run[key] for run in runs) for key in ("named", "left_out", "honest", "stopped")}
        said = attack if not bad else f"{attack}, {bad} of {CLIENTS}"
        updates = bad * ROUNDS * len(SEEDS)
        rows.append([said, str(updates), *(str(value) for value in sums.values())])
    header = ["attackers", "their updates", "named", "left out", "honest named", "runs stopped"]
    return table(header, rows)


STEPS = [Prepared("features of AG News", FEATURES, features), Prepared("poisoned runs", MADE, measure)]
NEEDS = [MODEL, NEWS]
ENTRIES = {
    "accuracy": Entry(lambda: scores("accuracy"), STEPS, NEEDS),
    "loss": Entry(lambda: scores("loss"), STEPS, NEEDS),
    "named": Entry(named, STEPS, NEEDS),
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
