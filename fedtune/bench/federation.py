"""CPU time of whole rounds of a federation in one process, against the same federation written by hand.

Twenty clients with one step each, so that what a run does beside training shows: orders and replies as bytes,
their checks, memory accounts, exact sums, logs, journal and checkpoints. The hand-written loop is what one
would write in PyTorch: one model, an AdamW a client, the weighted mean of the changes; nothing checked,
measured or saved. Both train the same examples from the same weights; in the end their weights are alike.
They are measured in turn, `TIMES` times, and the smallest CPU time of a round counts; `most` is the largest.

`beyond` is the run's time beyond the loop's, in passes over the updates of a round; a pass is what
`total.add_(update, alpha=weight)` takes for each of the twenty.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.bench.random_model import random_llama
from fedtune.config.computing import Computing
from fedtune.config.file import parse_config
from fedtune.config.schema import RunConfig
from fedtune.core.temporary import temporary_folder
from fedtune.data.batches import collate
from fedtune.data.encode import encode_causal
from fedtune.data.sources import load_examples
from fedtune.federation.callbacks import Callback, Callbacks, RoundState, Scores
from fedtune.federation.process import torch_settings
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.methods import registry
from fedtune.models.load import load_model, load_tokenizer, quiet
from fedtune.models.tuning import trainable

CLIENTS, BATCH, ROUNDS, TIMES, LR = 20, 4, 4, 2, 1e-3
CASES: dict[str, tuple[tuple[int, int] | None, dict[str, Any]]] = {  # width and blocks, and what is trained
    "LoRA, bundled model": (None, {"trainable": "lora", "lora": {"rank": 8}}),
    "LoRA, Llama of 19 M": ((384, 4), {"trainable": "lora", "lora": {"rank": 16}}),
    "all weights, bundled model": (None, {"trainable": "full"}),
    "all weights, Llama of 19 M": ((384, 4), {"trainable": "full"}),
}


def measure() -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each case and side, with CPU seconds of a round, and the ratios between them."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with temporary_folder() as folder, torch_settings(Computing(), torch.device("cpu")), quiet():
        for case, (shape, trained) in CASES.items():
            here = folder / str(len(rows))
            config = _federation(here, shape, trained)
            found: dict[str, list[tuple[list[float], dict[str, Tensor]]]] = {"fedtune": [], "by hand": []}
            for turn in range(TIMES):
                found["fedtune"].append(_run(config, here / f"run-{turn}"))
                found["by hand"].append(_by_hand(config, here))
            rounds = {side: [each for all_, _ in turns for each in all_] for side, turns in found.items()}
            seconds = {side: min(each) for side, each in rounds.items()}
            passes, numbers = _pass(found["by hand"][0][1])
            off = max(
                float((found["fedtune"][0][1][name] - weight).abs().max())
                for name, weight in found["by hand"][0][1].items()
            )
            for side in found:
                row = {"case": f"{case}: {side}", "cpu_s_a_round": seconds[side], "most": max(rounds[side])}
                rows.append(row | {"numbers_an_update": numbers})
            rows[-1]["largest_difference"] = off
            ratios[f"cpu of a round: {case}: fedtune / by hand"] = seconds["fedtune"] / seconds["by hand"]
            beyond = seconds["fedtune"] - seconds["by hand"]
            ratios[f"beyond, passes over the updates: {case}"] = beyond / passes
    return rows, ratios


def _federation(here: Path, shape: tuple[int, int] | None, trained: dict[str, Any]) -> RunConfig:
    """Data on disk, and a model where it is not the bundled one; the configuration of their federation."""
    here.mkdir()
    if shape:
        random_llama(*shape).save_pretrained(here / "model")
        load_tokenizer("bundled", here).save_pretrained(here / "model")
    lines = [
        {
            "instruction": f"Add {n % 10} and {n % 7}, then {n % 3}.",
            "output": "So be it. " * 12,
            "category": f"{n // BATCH:02}",
        }
        for n in range(CLIENTS * BATCH)
    ]
    for name, part in (("train", lines), ("test", lines[:BATCH])):
        text = "".join(json.dumps(line) + "\n" for line in part)
        (here / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return parse_config(
        {
            "model": {"name": str(here / "model") if shape else "bundled"},
            "data": {
                "train": str(here / "train.jsonl"),
                "clients": None,
                "partition": {"name": "by-field"},
                "template": "plain",
                "cache": "none",
                "holdout": {"source": str(here / "test.jsonl")},
            },
            "method": {
                "name": "fedavg",
                "rounds": ROUNDS,
                "local_steps": 1,
                "batch_size": BATCH,
                "lr": LR,
                "lr_schedule": "constant",
                **trained,
            },
            "evaluation": {"tasks": ["loss"], "every": 0},
        },
        "bench federation",
    )


class _Stopwatch(Callback):
    """The process's CPU time at the end of each round, and the weights of the last."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.weights: dict[str, Tensor] = {}

    def on_round(self, round: int, scores: Scores, state: RoundState) -> None:
        self.ends.append(time.process_time())
        if round:
            self.weights = dict(state.server.weights)


def _run(config: RunConfig, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    watch = _Stopwatch()
    run(config, folder, Silent(), callbacks=Callbacks([watch]))
    return _rounds(watch.ends[1:-1]), watch.weights  # the model is scored in the last round


def _by_hand(config: RunConfig, here: Path) -> tuple[list[float], dict[str, Tensor]]:
    loaded = load_model(config.model.name, dtype="float32", initial="pretrained", seed=0, base=here)
    examples = load_examples(str(here / "train.jsonl"), fields={}, base=here)
    items = encode_causal(
        examples, loaded.tokenizer, template="plain", loss_on="response", max_length=config.data.max_length
    ).items
    model = registry.build(config.method, seed=config.seed).client_model(lambda: loaded.model)
    parameters = trainable(model)
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    ends = []
    for _ in range(ROUNDS):
        total = {name: torch.zeros_like(w) for name, w in weights.items()}
        for client in range(CLIENTS):
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(weights[name])
            optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0, fused=True)
            model.train()
            batch = collate(items[client * BATCH : (client + 1) * BATCH], 0)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, p in parameters.items():
                    total[name].add_(p - weights[name], alpha=1 / CLIENTS)
        for name, change in total.items():
            weights[name].add_(change)
        ends.append(time.process_time())
    return _rounds(ends), weights


def _rounds(ends: Sequence[float]) -> list[float]:
    """Seconds between the ends of rounds, the first of which warmed what there is to warm."""
    return [end - start for start, end in itertools.pairwise(ends)]


def _pass(update: dict[str, Tensor]) -> tuple[float, int]:
    """CPU seconds of adding twenty updates of this shape to a sum, and the numbers of one."""
    total = {name: torch.zeros_like(tensor) for name, tensor in update.items()}
    found = []
    for _ in range(TIMES):
        started = time.process_time()
        for client in range(CLIENTS):
            for name, tensor in update.items():
                total[name].add_(tensor, alpha=1 / (client + 1))
        found.append(time.process_time() - started)
    return min(found), sum(tensor.numel() for tensor in update.values())
