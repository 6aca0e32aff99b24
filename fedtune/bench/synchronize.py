"""How a client gets to the newest model after r rounds: time, and bytes that it has to be sent.

FedKSeed's Figures 1(b) and 4. With seeds without end every step that anyone took is replayed: one pass over
the weights each, timed on some steps and scaled. With K seeds it is one rebuild, whatever happened before. A
model that is downloaded takes its bytes over a link of 100 Mbit/s. The paper's loop draws its noise from
PyTorch's generator; `hadamard4` is ours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedtune.zeroth import SeedPool, perturb_all_, rebuild_all_

PARAMETERS, WIDTH = 16_777_216, 2048
ROUNDS = (1, 10, 30, 60)
CLIENTS, STEPS = 50, 200  # a round, as in Figure 1(b)
LINK = 100e6 / 8  # bytes a second
TIMED = 5


def measure(
    parameters: int = PARAMETERS, width: int = WIDTH, rounds: tuple[int, ...] = ROUNDS
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows by number of rounds, and how many times longer than FedKSeed's the other ways take.

    Args:
        parameters: How many weights, float32, in square matrices.
        width: Of the matrices.
        rounds: After how many rounds a client joins.
    """
    weights = {f"layers.{i}.weight": torch.full((width, width), 0.02) for i in range(parameters // width**2)}
    total = sum(w.numel() for w in weights.values())
    a_step = {
        "paper's loop": _seconds(lambda: _paper_step(weights)),
        "hadamard4": _seconds(lambda: perturb_all_(weights, SeedPool(7, 1, "hadamard4"), 0, 1e-6)),
    }
    rebuilds = {
        f"{name}, K = {size}": (_rebuild(weights, size), 4 + 4 * size * vectors)
        for name, size, vectors in (("FedKSeed", 4096, 1), ("FedKSeed-Pro", 1024, 2))
    }
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for count in rounds:
        steps = count * CLIENTS * STEPS
        for noise, seconds in a_step.items():
            case = f"every step replayed, {noise} (the median of {TIMED} steps, times {steps:,})"
            rows.append({"case": case, "rounds": count, "seconds": seconds * steps, "bytes": 8 * steps})
        for case, (seconds, sent) in rebuilds.items():
            rows.append({"case": case, "rounds": count, "seconds": seconds, "bytes": sent})
        case, downloaded = "model downloaded, 100 Mbit/s", 4 * total / LINK
        rows.append({"case": case, "rounds": count, "seconds": downloaded, "bytes": 4 * total})
        ours = rebuilds["FedKSeed, K = 4096"][0]
        for noise, seconds in a_step.items():
            ratios[f"seconds: every step replayed, {noise} / FedKSeed, K = 4096, {count} rounds"] = (
                seconds * steps / ours
            )
        ratios[f"seconds: model downloaded / FedKSeed, K = 4096, {count} rounds"] = downloaded / ours
    return rows, ratios


def _rebuild(weights: dict[str, Tensor], size: int) -> float:
    pool, a = SeedPool(7, size, "hadamard4"), [1e-6] * size
    return _seconds(lambda: rebuild_all_(weights, weights, pool, a))


def _paper_step(weights: dict[str, Tensor]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for name, w in weights.items():
            weights[name] = w - 1e-6 * torch.normal(mean=0.0, std=1.0, size=w.shape)


def _seconds(action: Callable[[], None]) -> float:
    action()  # compiles
    seconds = []
    for _ in range(TIMED):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
