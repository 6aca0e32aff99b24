"""Seconds of something that may go on, on a GPU, after the call that began it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(what: Callable[[], object], device: torch.device | str = "cpu") -> tuple[float, float]:
    """Of the clock, and of the CPU in all threads, until the device has done all it was given."""
    _wait(device)
    started = time.perf_counter(), time.process_time()
    what()
    _wait(device)
    return time.perf_counter() - started[0], time.process_time() - started[1]


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
