"""FedBiOT's alignment before the first round: how much of the emulator's gap its settings win back.

The gap is what the held-out loss of AdapEmu is above that of the whole model, both untrained. What is won
back of it is (before − after) / (before − whole model): 100 % would be an emulator as good as E*.

Table:   forms, λ and rates of the alignment on two models; docs/fedbiot.md, block alignment-gap
Command: python reproduce/fedbiot_alignment.py alignment-gap
Time:    6 minutes
Needs:   ../shared/models/instruct-7m, ../shared/models/stories260K-hf, ../shared/data/dolly15k,
         ../shared/data/alpaca, ../shared/data/tinystories
Result:  the paper's sum with λ = 1 and a rate of 1e-4 wins back -4.1 ± 0.4 and 1.3 ± 0.2 %; `mean` with
         λ = 100 and 0.003 19.3 ± 3.3 and 24.1 ± 2.0 %
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import DATA, MODELS, RESULTS, Entry, Prepared, main, table

from fedtune.core.types import ServerEnv
from fedtune.data.batches import collate
from fedtune.data.encode import encode_causal
from fedtune.data.encoded import IGNORED, Encoded
from fedtune.data.sources import load_examples
from fedtune.methods import registry
from fedtune.models.load import load_model

CPU = torch.device("cpu")
TRIED = RESULTS / "alignment-gap"
STEPS, BATCH, LENGTH, PUBLIC, HELD_OUT, SEEDS = 60, 4, 64, 1000, 100, (0, 1)
LAYERS = {
    "instruct-7m": 2,
    "stories260K-hf": 1,
}  # of the adapter; 6 and 4 blocks are left, β = 0.2 of them go
CELLS = (  # form, λ, rate; the first were the defaults before the form `mean`
    ("paper", 1.0, 1e-4),
    ("paper", 1000.0, 3e-3),
    ("mean", 1.0, 1e-3),
    ("mean", 1.0, 3e-3),
    ("mean", 10.0, 1e-3),
    ("mean", 10.0, 3e-3),
    ("mean", 100.0, 3e-3),
    ("rms-normalized", 1.0, 3e-3),
)
DOLLY_FIELDS = {"instruction": "instruction", "input": "context", "output": "response", "category": None}


class Model:
    """A model, its public and its held-out examples, encoded once."""

    def __init__(self, name: str) -> None:
        self.name = name
        tokenizer = self._load().tokenizer
        self.pad_id = int(tokenizer.pad_token_id)
        if name == "stories260K-hf":
            lines = (DATA / "tinystories/stories.jsonl").read_text(encoding="utf-8").splitlines()
            ids = [
                tokenizer(json.loads(line)["text"])["input_ids"][:LENGTH]
                for line in lines[: PUBLIC + HELD_OUT]
            ]
            items = [Encoded(tuple(row), tuple(row)) for row in ids]
            self.public, self.held_out = items[:PUBLIC], items[PUBLIC:]
            return
        encode = partial(
            encode_causal, tokenizer=tokenizer, template="alpaca", loss_on="response", max_length=LENGTH
        )
        self.public, self.held_out = (
            list(encode(load_examples(str(path), fields=fields, split="train", base=Path("."))[:count]).items)
            for path, fields, count in (
                (DATA / "alpaca/alpaca_subset.jsonl", {}, PUBLIC),
                (DATA / "dolly15k/databricks-dolly-15k.jsonl", DOLLY_FIELDS, HELD_OUT),
            )
        )

    def losses(self, seed: int, weight: float, **alignment: Any) -> tuple[float, float]:
        """Held-out loss of the whole model and of AdapEmu, after the alignment before the first round."""
        config = registry.config_class("fedbiot").model_validate(
            {
                "adapter_layers": LAYERS[self.name],
                "layer_dropout": 0.2,
                "distill_weight": weight,
                "alignment": {"batch_size": BATCH, **alignment},
            }
        )
        method: Any = registry.build(config, seed)
        method.prepare(ServerEnv(self.public, self.pad_id, CPU))
        model = method.client_model(lambda: self._load().model)
        found = {name: self._loss(each.eval()) for name, each in method.export(method.init(model), model)}
        return found["global"], found["adapemu"]

    def _load(self) -> Any:
        path = str(MODELS / self.name)
        return load_model(path, dtype="float32", initial="pretrained", seed=0, base=Path("."))

    @torch.no_grad()
    def _loss(self, model: Any) -> float:
        """Nats a token of the answers."""
        total, tokens = 0.0, 0
        for items in _chunks(self.held_out, 20):
            batch = collate(items, self.pad_id)
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float().transpose(1, 2)
            total += float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            tokens += int((labels != IGNORED).sum())
        return total / tokens


def _chunks(items: Sequence[Encoded], size: int) -> Iterator[Sequence[Encoded]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


model_of = cache(Model)


def _measure(out: Path, *, name: str, form: str, weight: float, lr: float, seed: int, steps: int) -> None:
    alignment = {"steps_before": steps, "steps": 1, "lr": lr, "form": form}
    full, emulated = model_of(name).losses(seed, weight, **alignment)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"full": full, "emulated": emulated}), encoding="utf-8")


def _cell(name: str, form: str, weight: float, lr: float, seed: int, steps: int = STEPS) -> Prepared:
    out = TRIED / f"{name},{form},{weight:g},{lr:g},{steps},{seed}.json"
    measure = partial(_measure, name=name, form=form, weight=weight, lr=lr, seed=seed, steps=steps)
    return Prepared("an aligned emulator", out, measure)


def cells() -> list[Prepared]:
    """All that is measured, with the emulators as they are before any alignment."""
    untouched = [_cell(name, "mean", 1.0, 1e-3, 0, steps=0) for name in LAYERS]
    return [*untouched, *(_cell(name, *cell, seed) for cell in CELLS for name in LAYERS for seed in SEEDS)]


def won_back() -> str:
    """The table: a line a setting, a column a model."""

    def read(cell: Prepared) -> dict[str, float]:
        found: dict[str, float] = json.loads(cell.made.read_text(encoding="utf-8"))
        return found

    untouched = {name: read(_cell(name, "mean", 1.0, 1e-3, 0, steps=0)) for name in LAYERS}
    lines = []
    for form, weight, lr in CELLS:
        line = [f"`{form}`", f"{weight:g}", f"{lr:g}"]
        for name, before in untouched.items():
            gap = before["emulated"] - before["full"]
            shares = [
                100 * (before["emulated"] - read(_cell(name, form, weight, lr, seed))["emulated"]) / gap
                for seed in SEEDS
            ]
            line.append(f"{statistics.fmean(shares):.1f} ± {statistics.stdev(shares):.1f}")
        lines.append(line)
    said = "; ".join(
        f"{name}: {before['full']:.4f} and {before['emulated']:.4f}" for name, before in untouched.items()
    )
    caption = (
        f"% of the gap won back by {STEPS} steps of {BATCH} public examples, mean ± standard deviation over "
        f"{len(SEEDS)} seeds. Held-out loss of the whole model and of the emulator before: {said}."
    )
    return f"{caption}\n\n{table(['form', 'λ', 'alignment.lr', *LAYERS], lines)}"


NEEDS = (
    *(MODELS / name for name in LAYERS),
    DATA / "dolly15k",
    DATA / "alpaca",
    DATA / "tinystories",
)
ENTRIES = {"alignment-gap": Entry(won_back, cells(), NEEDS)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
