"""Held-out losses against a loop as one writes it, and lm-evaluation-harness where that is installed.

Random Llamas of two shapes, one with a small and one with a large vocabulary, and examples of 16 to 128
tokens of which a quarter carry loss. All ways get the same batches of examples of like lengths, find the same
losses (a difference is an error), and take turns; seconds are the processor's. `peak_bytes` is what tensors
hold at most, beside the weights.

* as written: `model(...).logits` of all positions, in float32 and cut to those before an answer's tokens.
* `model(..., labels=...).loss`: the model's own mean of a batch, as `transformers.Trainer` evaluates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.data.batches import collate
from fedtune.data.encoded import IGNORED, Encoded
from fedtune.evaluation import harness_names
from fedtune.evaluation.likelihoods import example_losses
from fedtune.evaluation.types import MEMORY
from fedtune.measure.memory import MemoryMeter
from fedtune.models.load import load_tokenizer, seeded

EXAMPLES, BATCH, REPEATS = 16, 8, 2
SHAPES: dict[str, dict[str, Any]] = {
    "32,000 words": {"vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 4},
    "151,936 words": {"vocab_size": 151936, "hidden_size": 128, "num_hidden_layers": 4},
}
Way = Callable[[LlamaForCausalLM, Sequence[Encoded]], list[float]]


def measure(
    shapes: Sequence[str] = tuple(SHAPES), examples: int = EXAMPLES
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row of each shape and way, and ratios to the loop as written."""
    ways: dict[str, Way] = {"as written": _as_written, "the model's own loss": _own, "fedtune": _fedtune}
    if harness_names.installed():
        ways["lm-eval"] = _harness
    rows, ratios = list[dict[str, Any]](), dict[str, float]()
    for shape in shapes:
        model, items = _model(shape), _items(SHAPES[shape]["vocab_size"], examples)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        peaks, found = dict[str, int](), dict[str, float]()
        with torch.no_grad():
            for name, way in ways.items():
                meter = MemoryMeter("cpu")
                with meter.whole([model]):
                    found[name] = sum(way(model, items))
                peaks[name] = meter.peak_bytes - weights
            for _ in range(REPEATS):
                for name, way in ways.items():
                    started = time.process_time()
                    way(model, items)
                    seconds[name].append(time.process_time() - started)
        for name, total in found.items():
            assert abs(total / found["as written"] - 1) < 1e-4, (shape, name)
            rows.append(
                {
                    "case": f"{shape}: {name}",
                    "cpu_seconds": statistics.median(seconds[name]),
                    "peak_bytes": peaks[name],
                }
            )
            if name != "as written":
                pairs = zip(seconds[name], seconds["as written"], strict=True)
                ratio = statistics.median(own / plain for own, plain in pairs)
                ratios[f"cpu_seconds: {shape}: {name} / as written"] = ratio
                ratios[f"peak_bytes: {shape}: {name} / as written"] = peaks[name] / peaks["as written"]
    return rows, ratios


def _model(shape: str) -> LlamaForCausalLM:
    width = SHAPES[shape]["hidden_size"]
    config = LlamaConfig(
        **SHAPES[shape],
        intermediate_size=width * 8 // 3,
        num_attention_heads=width // 64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    with seeded(0):
        return LlamaForCausalLM(config).eval()


def _items(words: int, examples: int) -> list[Encoded]:
    """Longest first, as all ways take them."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for length in torch.randint(16, 129, (examples,), generator=generator).tolist():
        ids = tuple(torch.randint(3, words, (length,), generator=generator).tolist())
        prompt = length - length // 4
        items.append(Encoded(ids, (IGNORED,) * prompt + ids[prompt:]))
    return sorted(items, key=lambda item: -len(item.input_ids))


def _as_written(model: LlamaForCausalLM, items: Sequence[Encoded]) -> list[float]:
    losses = []
    for start in range(0, len(items), BATCH):
        batch = collate(items[start : start + BATCH], 0)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses += each.view(labels.shape).sum(1).tolist()
    return losses


def _own(model: LlamaForCausalLM, items: Sequence[Encoded]) -> list[float]:
    losses = []
    for start in range(0, len(items), BATCH):
        some = items[start : start + BATCH]
        losses.append(float(model(**collate(some, 0)).loss) * sum(item.trained for item in some))
    return losses


def _fedtune(model: LlamaForCausalLM, items: Sequence[Encoded]) -> list[float]:
    return example_losses(model, items, batch_size=BATCH, memory=MEMORY, pad_id=0)[0]


def _harness(model: LlamaForCausalLM, items: Sequence[Encoded]) -> list[float]:
    from fedtune.evaluation.harness import plain_likelihoods

    asked = [(list(item.input_ids[: -item.trained]), list(item.input_ids[-item.trained :])) for item in items]
    tokenizer = load_tokenizer("bundled", Path("."))
    return [-found for found in plain_likelihoods(model, tokenizer, asked, batch_size=BATCH)]
