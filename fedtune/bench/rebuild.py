"""Rebuilding a model from its seeds: every kind of noise against the paper's loop and against one plain pass.

The paper's loop (torch.manual_seed, then torch.normal and an addition for every tensor, seed by seed) would
take hours, so it is timed on a few seeds and scaled to K; `gaussian` and `binomial32`, whose cost follows the
number of elements, are timed on one tensor and scaled to all. The names of the cases say so. `w += 1` reads
and writes the same memory and does nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.zeroth import KINDS, SeedPool, rebuild_all_

PARAMETERS = 104_857_600  # 25 square matrices of width 2,048
WIDTH = 2048
SEEDS = (1024, 4096)
THREADS = (1, 2)
_TIMED_SEEDS = 3
_ON_ONE_TENSOR = ("gaussian", "binomial32")


def measure(
    parameters: int = PARAMETERS,
    *,
    width: int = WIDTH,
    seeds: tuple[int, ...] = SEEDS,
    threads: tuple[int, ...] = THREADS,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of each case by pool size and threads, and how many times faster each kind of noise is.

    Args:
        parameters: How many weights, float32, in square matrices.
        width: Of the matrices.
        seeds: The pool sizes K.
        threads: How many threads, for PyTorch and for ours.
    """
    tensors = max(parameters // width**2, 1)
    weights = {f"layers.{i}.weight": torch.full((width, width), 0.02) for i in range(tensors)}
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}

    def row(case: str, size: int | None, count: int, seconds: float) -> None:
        total = tensors * width**2
        rows.append(
            {"case": case, "parameters": total, "K": size or "", "threads": count, "seconds": seconds}
        )

    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            a_seed = _best(lambda: _paper_seed(weights), _TIMED_SEEDS)
            one_pass = _best(lambda: _plain_pass(weights), 5)
            row("w += 1", None, count, one_pass)
            for size in seeds:
                loop = a_seed * size
                row(f"torch loop (the best of {_TIMED_SEEDS} seeds, times K)", size, count, loop)
                with_threads = f"K = {size}, {count} thread{'s' if count > 1 else ''}"
                for kind in KINDS:
                    scaled = kind in _ON_ONE_TENSOR and tensors > 1
                    case = f"{kind} (one tensor of {tensors}, scaled)" if scaled else kind
                    chosen = dict(list(weights.items())[:1]) if scaled else weights
                    seconds = _rebuild_seconds(SeedPool(1, size, kind), chosen, count)  # type: ignore[arg-type]
                    seconds *= len(weights) / len(chosen)
                    row(case, size, count, seconds)
                    ratios[f"seconds: torch loop / {kind}, {with_threads}"] = loop / seconds
                    if kind == "hadamard4":
                        ratios[f"seconds: hadamard4 / w += 1, {with_threads}"] = seconds / one_pass
    finally:
        torch.set_num_threads(before)
    return rows, ratios


def _best(action: Callable[[], None], times: int) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _paper_seed(weights: dict[str, Tensor]) -> None:
    with torch.random.fork_rng(devices=[]):  # what the loop does to the global generator is undone
        torch.manual_seed(7)
        for w in weights.values():
            w.add_(torch.normal(mean=0.0, std=1.0, size=w.shape), alpha=-1e-6)


def _plain_pass(weights: dict[str, Tensor]) -> None:
    for w in weights.values():
        w += 1


def _rebuild_seconds(pool: SeedPool, weights: dict[str, Tensor], threads: int) -> float:
    a = np.random.default_rng(0).normal(scale=1e-6, size=pool.size)
    small = {"small": torch.zeros(1)}
    rebuild_all_(small, small, pool, a)  # compiles
    times = 5 if pool.noise == "hadamard4" else 1
    return _best(lambda: rebuild_all_(weights, weights, pool, a, threads=threads), times)
