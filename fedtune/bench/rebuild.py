"""Rebuilding a model from its seeds: every kind of noise against the paper's loop and against one plain pass.

Two loops stand for the paper's. Its own form (MeZO's, which FedKSeed's code has too) is out of place: seed by
seed `torch.manual_seed`, then for each tensor z = torch.normal(0, 1) and w.data = w.data − lr · (grad · z).
"In place" is the same with `add_(z, alpha=…)`, which spares two passes and two buffers. Both would take
hours, so they are timed on a few seeds and scaled to K; `gaussian` and `binomial32`, whose cost follows the
number of elements, are timed on one tensor and scaled to all. The names of the cases say so. `w += 1` reads
and writes the same memory and does nothing else. `hadamard4` is measured in bfloat16 and float16 too, each
against `w += 1` of the same dtype.

Seconds are those of the clock. Where other programs take turns with this one, the CPU seconds of one thread
are what to compare.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.zeroth import KINDS, SeedPool, rebuild_all_

PARAMETERS = 104_857_600  # 25 square matrices of width 2,048
LARGE = 1_300_000_000  # the size of the paper's smaller model, OPT-1.3B's
WIDTH = 2048
SEEDS = (1024, 4096)
THREADS = (1, 2)
_TIMED_SEEDS = 3
_ON_ONE_TENSOR = ("gaussian", "binomial32")

Weights = dict[str, Tensor]
Cost = tuple[float, float]  # seconds of the clock, CPU seconds of all threads


def measure(
    parameters: int = PARAMETERS,
    *,
    large: int | None = LARGE,
    width: int = WIDTH,
    seeds: tuple[int, ...] = SEEDS,
    threads: tuple[int, ...] = THREADS,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of each case by pool size and threads, and how many times faster each kind of noise is.

    Args:
        parameters: How many weights, float32, in square matrices.
        large: A second size, with the last of `seeds` and of `threads` only, for its absolute times; None
            leaves it out, and so does a machine with less than twice its memory.
        width: Of the matrices.
        seeds: The pool sizes K.
        threads: How many threads, for PyTorch and for ours.
    """
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    before = torch.get_num_threads()
    try:
        _measure(parameters, width, seeds, threads, rows, ratios)
        if large and os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >= 2 * 4 * large:
            _measure(large, width, seeds[-1:], threads[-1:], rows, {})
    finally:
        torch.set_num_threads(before)
    return rows, ratios


def _measure(
    parameters: int,
    width: int,
    seeds: tuple[int, ...],
    threads: tuple[int, ...],
    rows: list[dict[str, Any]],
    ratios: dict[str, float],
) -> None:
    tensors = max(parameters // width**2, 1)
    weights = {f"layers.{i}.weight": torch.full((width, width), 0.02) for i in range(tensors)}

    def row(case: str, size: int | None, count: int, cost: Cost) -> None:
        total = tensors * width**2
        head = {"case": case, "parameters": total, "K": size or "", "threads": count}
        rows.append(head | {"seconds": cost[0], "CPU seconds": cost[1]})

    for count in threads:
        torch.set_num_threads(count)
        a_seed = {
            name: _best(lambda step=step: seed_of_loop(weights, step), _TIMED_SEEDS)  # type: ignore[misc]
            for name, step in (("paper's torch loop", out_of_place), ("torch loop in place", in_place))
        }
        one_pass = _best(lambda: _plain_pass(weights), 5)
        row("w += 1", None, count, one_pass)
        for size in seeds:
            with_threads = f"K = {size}, {count} thread{'s' if count > 1 else ''}"
            for name, of_one in a_seed.items():
                case = f"{name} (the best of {_TIMED_SEEDS} seeds, times K)"
                row(case, size, count, (of_one[0] * size, of_one[1] * size))
            for kind in KINDS:
                scaled = kind in _ON_ONE_TENSOR and tensors > 1
                case = f"{kind} (one tensor of {tensors}, scaled)" if scaled else kind
                chosen = dict(list(weights.items())[:1]) if scaled else weights
                cost = _rebuild(SeedPool(1, size, kind), chosen, count)  # type: ignore[arg-type]
                factor = len(weights) / len(chosen)
                cost = cost[0] * factor, cost[1] * factor
                row(case, size, count, cost)
                # With more threads, PyTorch's waiting for each other counts as CPU time.
                for clock, unit in enumerate(("seconds", "CPU seconds") if count == 1 else ("seconds",)):
                    for name, of_one in a_seed.items():
                        ratio = of_one[clock] * size / cost[clock]
                        ratios[f"{unit}: {name} / {kind}, {with_threads}"] = ratio
                    if kind == "hadamard4":
                        ratios[f"{unit}: hadamard4 / w += 1, {with_threads}"] = cost[clock] / one_pass[clock]
        for dtype in (torch.bfloat16, torch.float16):
            called = str(dtype).removeprefix("torch.")
            halves = {name: w.to(dtype) for name, w in weights.items()}
            one_pass = _best(lambda halves=halves: _plain_pass(halves), 5)  # type: ignore[misc]
            row(f"w += 1, {called}", None, count, one_pass)
            cost = _rebuild(SeedPool(1, seeds[-1], "hadamard4"), halves, count)
            row(f"hadamard4, {called}", seeds[-1], count, cost)
            with_threads = f"K = {seeds[-1]}, {count} thread{'s' if count > 1 else ''}"
            for clock, unit in enumerate(("seconds", "CPU seconds") if count == 1 else ("seconds",)):
                ratio = cost[clock] / one_pass[clock]
                ratios[f"{unit}: hadamard4 / w += 1, {called}, {with_threads}"] = ratio


def _best(action: Callable[[], None], times: int) -> Cost:
    clock, cpu = [], []
    for _ in range(times):
        started = time.perf_counter(), time.process_time()
        action()
        clock.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    return min(clock), min(cpu)


def seed_of_loop(weights: Weights, step: Callable[[Tensor, Tensor], None]) -> None:
    """What the paper's loop does for one seed: a normal z for each tensor, and a step along it."""
    with torch.random.fork_rng(devices=[]):  # what the loop does to the global generator is undone
        torch.manual_seed(7)
        for w in weights.values():
            step(w, torch.normal(mean=0.0, std=1.0, size=w.shape))


def out_of_place(w: Tensor, z: Tensor) -> None:
    """The step as the paper's code writes it."""
    w.data = w.data - 1e-6 * (1.0 * z)


def in_place(w: Tensor, z: Tensor) -> None:
    """The same step without a copy of the tensor."""
    w.add_(z, alpha=-1e-6)


def _plain_pass(weights: Weights) -> None:
    for w in weights.values():
        w += 1


def _rebuild(pool: SeedPool, weights: Weights, threads: int) -> Cost:
    a = np.random.default_rng(0).normal(scale=1e-6, size=pool.size)
    small = {"small": torch.zeros(1, dtype=next(iter(weights.values())).dtype)}
    rebuild_all_(small, small, pool, a)  # compiles
    times = 5 if pool.noise == "hadamard4" else 2
    return _best(lambda: rebuild_all_(weights, weights, pool, a, threads=threads), times)
