"""Which card 7 and 13 billion weights need: every method on three cards, with the settings that make it fit.

Table:   planned memory of a run on one machine with one card, every method on the shapes of LLaMA-2-7B and
         LLaMA-13B; docs/planning.md, block plan-cards
Command: python reproduce/plan_cards.py plan-cards
Time:    twenty minutes of one core
Needs:   nothing; the model's shape is in configs/papers/shapes
Result:  all weights need 56.53 GB, 43.25 GB or, with SGD, 16.00 GB, LoRA 15.64 GB, FedKSeed 15.00 GB,
         FedCyBGD 17.83 GB, FedBiOT 35.69 GB or, with public examples one by one, 15.93 GB; at 13B LoRA
         29.10 GB or, on 4 bits, 10.27 GB, FedCyBGD 32.58 GB, and 24 GB are too few for all weights
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import RESULTS, ROOT, Entry, main, table

import fedtune
from fedtune.report.tables import size

SHAPES = ROOT / "configs" / "papers" / "shapes"
MODELS = {"7B": "llama-2-7b", "13B": "llama-13b"}
CARDS = (24, 48, 80)  # GB of 10^9 bytes
DONE = RESULTS / "plan-cards.json"  # goes on with what was interrupted; delete it where plans have changed
ROLES = ("client", "server", "evaluation")
DATA = (
    "data.train=databricks/databricks-dolly-15k",
    "data.holdout={fraction: 0.01}",
    "data.template=alpaca",
    "data.clients=10",
    "data.max_length=512",
    "evaluation={tasks: [loss]}",
)

Settings = Mapping[str, Any]
BY_ONE = {"method.batch_size": 1, "method.gradient_accumulation": 8}
FEW = {"method.batch_size": 1}
INSIDE = {"method.optimizer_in_backward": "true"}
NARROW, SGD = {"method.optimizer": "adamw-8bit"}, {"method.optimizer": "sgd"}
KAHAN, STOCHASTIC = {"method.masters": "kahan"}, {"method.masters": "stochastic"}
NF4 = {"model.quantization": "nf4"}
PUBLIC_FEW = {"method.alignment.batch_size": 1}
PUBLIC = {"data.public": "{source: tatsu-lab/alpaca}"}
FROZEN = (BY_ONE, NF4)
WHOLE = (INSIDE, NARROW, KAHAN, STOCHASTIC, FEW, SGD)
BLOCKS = (BY_ONE, NARROW, KAHAN)
HALVES = (BY_ONE | {"method.gradient_accumulation": 10}, PUBLIC_FEW)
METHODS: dict[str, tuple[Settings, Sequence[Settings]]] = {
    "fedavg, full": ({"method.name": "fedavg", "method.trainable": "full"}, WHOLE),
    "fedavg, lora": ({"method.name": "fedavg", "method.trainable": "lora"}, FROZEN),
    "fedavg, adapter": ({"method.name": "fedavg", "method.trainable": "adapter"}, FROZEN),
    "fedavg, prompt": ({"method.name": "fedavg", "method.trainable": "prompt"}, FROZEN),
    "fedavg, p-tuning": ({"method.name": "fedavg", "method.trainable": "p-tuning"}, FROZEN),
    "fedkseed": ({"method.name": "fedkseed"}, (NF4,)),
    "fedkseed-pro": ({"method.name": "fedkseed-pro"}, (NF4,)),
    "infinite-pool": ({"method.name": "infinite-pool", "model.dtype": "float32"}, (NF4,)),
    "fedbiot": ({"method.name": "fedbiot"} | PUBLIC, HALVES),
    "fedot": ({"method.name": "fedot"} | PUBLIC, HALVES),
    "offsite-tuning": ({"method.name": "offsite-tuning"} | PUBLIC, HALVES),
    "fedcybgd": ({"method.name": "fedcybgd"}, BLOCKS),
    "fedcybgd, layer-drop": ({"method.name": "fedcybgd", "method.compression": "layer-drop"}, BLOCKS),
    "fedcybgd, hybrid": ({"method.name": "fedcybgd", "method.compression": "hybrid"}, BLOCKS),
    "fedbavg": ({"method.name": "fedbavg"}, BLOCKS),
    "badam": ({"method.name": "badam"}, BLOCKS),
    "standalone, lora": ({"method.name": "standalone"}, FROZEN),
    "centralized, lora": ({"method.name": "centralized"}, FROZEN),
    "zero-shot": ({"method.name": "zero-shot"}, (NF4,)),
}
"""Of each method what it is, and what makes it smaller, in the order in which that is tried."""


@dataclass(frozen=True)
class Need:
    """Bytes: on the card of each role, and on the host where all of them share a machine."""

    card: Mapping[str, int]
    host: int

    @property
    def largest(self) -> str:
        """The role that needs most of the card."""
        return max(self.card, key=lambda role: self.card[role])


def needed(shape: str, settings: Sequence[str]) -> Need:
    """What `fedtune.plan` says of a configuration that is nothing but these settings; kept for next time."""
    done = json.loads(DONE.read_text(encoding="utf-8")) if DONE.exists() else {}
    name = " ".join((shape, *settings))
    if name not in done:
        print(name, file=sys.stderr, flush=True)
        columns = fedtune.plan({}, f"model.name={SHAPES / shape}", *DATA, *settings)["memory_by_device"]
        card = {role: columns[role]["device_bytes"] for role in ROLES}
        done[name] = {"card": card, "host": columns["simulation"]["host_bytes"]}
        DONE.parent.mkdir(parents=True, exist_ok=True)
        new = DONE.with_suffix(".new")
        new.write_text(json.dumps(done, indent=1), encoding="utf-8")
        new.replace(DONE)
    return Need(**done[name])


def need(shape: str, own: Settings, changes: Sequence[Settings]) -> Need:
    """What a method needs with these changes, the later ones before the earlier ones."""
    together: dict[str, Any] = {"model.dtype": "bfloat16", **own}
    for change in changes:
        together |= change
    return needed(shape, sorted(f"{name}={value}" for name, value in together.items()))


def smallest(
    fits: Callable[[Sequence[Settings]], bool], changes: Sequence[Settings]
) -> Sequence[Settings] | None:
    """The first of `changes` that are enough, less those that it fits without; None if all are not."""
    for count in range(len(changes) + 1):
        taken = list(changes[:count])
        if fits(taken):
            for change in reversed(taken[:-1]):  # the last one is needed
                without = [one for one in taken if one is not change]
                taken = without if fits(without) else taken
            return taken
    return None


def in_words(changes: Sequence[Settings]) -> str:
    """Settings as a configuration has them."""
    together: dict[str, Any] = {}
    for change in changes:
        together |= change
    return (
        ", ".join(f"`{name.removeprefix('method.')}: {value}`" for name, value in together.items()) or "none"
    )


def rows_of(model: str, method: str) -> list[list[str]]:
    """A row for each set of settings, with the cards that want it, and one for cards that nothing fits."""
    shape, (own, changes) = MODELS[model], METHODS[method]
    found: dict[tuple[str, ...], list[int]] = {}
    for card in CARDS:

        def all_roles(taken: Sequence[Settings], room: float = card * 1e9) -> bool:
            of_model = [change for change in taken if any(name.startswith("model.") for name in change)]
            if need(shape, own, of_model).card["evaluation"] > room:  # nothing else changes that
                return False
            return max(need(shape, own, taken).card.values()) <= room

        def a_client(taken: Sequence[Settings], room: float = card * 1e9) -> bool:
            return need(shape, own, taken).card["client"] <= room

        if (taken := smallest(all_roles, changes)) is not None:
            planned = need(shape, own, taken)
            role, cells = planned.largest, (size(planned.card[planned.largest]), size(planned.host))
            row = (in_words(taken), *cells, role)
        elif (taken := smallest(a_client, changes)) is not None:
            row = (in_words(taken), size(need(shape, own, taken).card["client"]), "elsewhere", "client alone")
        else:
            least = min((need(shape, own, changes[:n]) for n in range(len(changes) + 1)), key=least_card)
            row = ("does not fit", f"at least {size(least_card(least))}", "", least.largest)
        found.setdefault(row, []).append(card)
    return [
        [model, method, row[0], row[1], row[2], row[3], ", ".join(f"{card} GB" for card in cards)]
        for row, cards in sorted(found.items(), key=lambda item: -item[1][0])
    ]


def least_card(planned: Need) -> int:
    """Bytes of the card that one machine needs for all roles."""
    return max(planned.card.values())


def cards() -> str:
    """The table."""
    torch.set_num_threads(1)
    rows = [row for model in MODELS for method in METHODS for row in rows_of(model, method)]
    header = ["model", "method", "settings that change", "on the card", "on the host", "largest role", "card"]
    return table(header, rows, numbers=False)


ENTRIES = {"plan-cards": Entry(cards)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
