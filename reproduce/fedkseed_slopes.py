"""FedKSeed's slopes in half precision: how far they agree with exact ones, and what a client says of them.

Table:   correlation with slopes of float32, and what is foretold of it; docs/fedkseed.md, block slopes
Command: python reproduce/fedkseed_slopes.py slopes
Time:    3 minutes
Needs:   nothing; the rows of instruct-7m that model and ../shared/data/dolly15k
Result:  in bfloat16 0.773 (bundled) and 0.874 (instruct-7m) at the paper's 0.0005; 0.970 and 0.991 at
         the 0.002 of `auto`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from common import DOLLY, MODELS, RESULTS, SHARED, Entry, Prepared, main, table

from fedtune.data.batches import collate
from fedtune.data.encode import encode_causal
from fedtune.data.sources import bundled_examples, load_examples
from fedtune.methods.fedkseed.resolution import correlation, doubt, scale_of
from fedtune.methods.fedkseed.step import step_weights
from fedtune.models.load import load_model
from fedtune.models.tuning import train_all
from fedtune.zeroth import SeedPool

MADE = RESULTS / "slopes.json"
DRAWS, LENGTH, EXACT = 24, 96, 1e-4
EPSILONS = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
FIELDS = {"instruction": "instruction", "input": "context", "output": "response", "category": None}


def _slopes(name: str, dtype: str, epsilons: list[float]) -> tuple[dict[str, list[float]], float]:
    """Slopes of as many directions, each on an example of its own, by ε; and what `auto` chooses."""
    real = name != "bundled"
    path = str(MODELS / name) if real else name
    loaded = load_model(path, dtype=dtype, initial="pretrained", seed=0, base=Path("."))
    model, pool = train_all(loaded.model).eval(), SeedPool(0, 4096)
    rows = (
        load_examples(str(DOLLY), fields=FIELDS, split="train", base=Path("."))
        if real
        else bundled_examples("train")
    )
    template = "alpaca" if real else "plain"
    encoded = encode_causal(
        rows[:DRAWS], loaded.tokenizer, template=template, loss_on="response", max_length=LENGTH
    )
    batches = [collate([item], 0) for item in encoded.items]
    with step_weights(model, pool, torch.zeros(4096), 0.0) as weights:
        found = {
            str(e): [
                (weights.loss(x, j, e) - weights.loss(x, j, -e)) / (2 * e) for j, x in enumerate(batches)
            ]
            for e in epsilons
        }
    return found, scale_of("auto", model, pool)


def _measure(out: Path) -> None:
    needed = sorted({*EPSILONS, *(2 * e for e in EPSILONS)})
    found: dict[str, dict[str, Any]] = {}
    for name in ("bundled", *(["instruct-7m"] if SHARED.is_dir() else [])):
        exact, _ = _slopes(name, "float32", [EXACT])
        found[name] = {"exact": exact[str(EXACT)]}
        for dtype in ("bfloat16", "float16"):
            slopes, auto = _slopes(name, dtype, needed)
            found[name][dtype] = {"slopes": slopes, "auto": auto}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found), encoding="utf-8")


def slopes() -> str:
    """The table: a line a model and dtype, a column an ε."""
    lines = []
    for name, found in json.loads(MADE.read_text(encoding="utf-8")).items():
        exact = torch.tensor(found["exact"], dtype=torch.float64)
        for dtype in ("bfloat16", "float16"):
            by = {float(e): torch.tensor(s, dtype=torch.float64) for e, s in found[dtype]["slopes"].items()}
            line = [f"{name}, {dtype}"]
            for e in EPSILONS:
                actual = float(torch.corrcoef(torch.stack([by[e], exact]))[0, 1])
                line.append(f"{actual:.3f} ({correlation(doubt(by[e], by[2 * e])):.3f})")
            lines.append([*line, f"{found[dtype]['auto']:g}"])
    header = ["", *(f"{e:g}" for e in EPSILONS), "`auto`"]
    return (
        f"Correlation of {DRAWS} slopes with those of float32 at ε = {EXACT:g}, and in brackets what is "
        f"foretold from the slopes at ε and 2ε alone:\n\n{table(header, lines)}"
    )


ENTRIES = {"slopes": Entry(slopes, [Prepared("slopes of real models", MADE, _measure)], partly=True)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
