"""The server's aggregation: exact sums streamed one reply at a time, against keeping all and averaging.

All get the same updates, made one by one as replies would come; `watched` also looks at each one's norm and
direction, as every round does. Memory is the peak of live tensor bytes on the server's side beyond the global
weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fedtune.core.aggregate import WeightedSum
from fedtune.core.watch import sketch, standings
from fedtune.measure.memory import MemoryMeter

PARAMETERS = 200_000
CLIENTS = (10, 100, 1000)


def measure() -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of both ways at 10, 100 and 1,000 clients, and the ratios between them."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    peaks: dict[tuple[str, int], int] = {}
    for clients in CLIENTS:
        for case, way in (
            ("exact sum", _stream),
            ("exact sum, watched", _watched),
            ("list then mean", _list_then_mean),
        ):
            started = time.perf_counter()
            way(clients)
            seconds = time.perf_counter() - started
            meter = MemoryMeter("cpu")  # measured apart: following every operation takes time
            with meter.whole():
                way(clients)
            peaks[case, clients] = meter.peak_bytes
            rows.append(
                {
                    "case": case,
                    "clients": clients,
                    "seconds": round(seconds, 4),
                    "peak_bytes": meter.peak_bytes,
                }
            )
        by_case: dict[str, dict[str, Any]] = {row["case"]: row for row in rows[-3:]}
        for unit in ("seconds", "peak_bytes"):
            ratios[f"{unit}: exact sum / list then mean, {clients} clients"] = (
                by_case["exact sum"][unit] / by_case["list then mean"][unit]
            )
            ratios[f"{unit}: exact sum, watched / exact sum, {clients} clients"] = (
                by_case["exact sum, watched"][unit] / by_case["exact sum"][unit]
            )
    ratios["peak_bytes: exact sum, 1000 clients / 10 clients"] = (
        peaks["exact sum", 1000] / peaks["exact sum", 10]
    )
    ratios["peak_bytes: list then mean, 1000 clients / 10 clients"] = (
        peaks["list then mean", 1000] / peaks["list then mean", 10]
    )
    return rows, ratios


def _updates(clients: int) -> Iterator[tuple[dict[str, Tensor], int]]:
    generator = torch.Generator().manual_seed(0)
    for client in range(clients):
        yield {"w": torch.randn(PARAMETERS, generator=generator)}, 10 + client % 7


def _stream(clients: int) -> Tensor:
    total = WeightedSum.empty(sum(10 + client % 7 for client in range(clients)))
    for update, examples in _updates(clients):
        total = total.add(update, examples)
    return total.mean("w")


def _watched(clients: int) -> Tensor:
    total, seen = WeightedSum.empty(sum(10 + client % 7 for client in range(clients))), {}
    for client, (update, examples) in enumerate(_updates(clients)):
        seen[client] = {"update": sketch(update.values())}
        total = total.add(update, examples)
    standings(seen, dict.fromkeys(seen, 1))
    return total.mean("w")


def _list_then_mean(clients: int) -> Tensor:
    kept = list(_updates(clients))
    total = sum(examples for _, examples in kept)
    return sum((update["w"] * (examples / total) for update, examples in kept), torch.zeros(PARAMETERS))
