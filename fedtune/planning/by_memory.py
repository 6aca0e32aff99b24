"""What clients of unlike memory can do, from plans: which LoRA rank, and which method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.config.file import parse_config
from fedtune.config.schema import RunConfig
from fedtune.data.objects import ObjectData
from fedtune.errors import InputError
from fedtune.planning.plan import plan
from fedtune.report.tables import size

LESS: list[tuple[str, dict[str, Any]]] = [  # other methods, from those that train most of the model
    ("fedcybgd", {}),
    ("fedavg", {"trainable": "lora", "lora": {"rank": 1}}),
    ("fedkseed", {}),
]


def by_memory(
    config: RunConfig, memories: Sequence[int], objects: ObjectData | None = None
) -> dict[str, Any]:
    """What fits each memory of the configured method, and where not all clients are served, of other methods.

    Args:
        config: Of LoRA in FedAvg its rank is the highest; any other method fits a client or does not.
        memories: Bytes of each client; with more clients they come in turn, as `lora.client_ranks` does.
        objects: As of `plan`.

    Returns:
        `client_ranks` of LoRA in FedAvg: `ranks`, each a `rank` and its `client_peak_memory_bytes`;
        `clients`, each a `memory_bytes` and its `rank`, None where none fits; `setting`, which gives clients
        these ranks, None where some have none. `client_methods` unless that serves all, the configured one
        first: each a `method`, its `settings`, its `client_peak_memory_bytes` and how many `clients` it fits.

    Raises:
        InputError: Clients of these ranks have no mean with this aggregation.
    """
    found, lora = dict[str, Any](), getattr(config.method, "lora", None)
    if config.method_name == "fedavg" and lora is not None:
        found["client_ranks"] = _ranks(config, memories, objects)
        if found["client_ranks"]["setting"] is not None:
            return found
    found["client_methods"] = _methods(config, memories, objects)
    return found


def _ranks(config: RunConfig, memories: Sequence[int], objects: ObjectData | None) -> dict[str, Any]:
    """The highest of the configuration's rank and its halves that fits each memory."""
    most, peaks = config.method.lora.rank, dict[int, int]()  # type: ignore[attr-defined]
    for rank in halves(most):
        peaks[rank] = _peak(config, {"lora": {"rank": rank, "client_ranks": None}}, objects)
    ranks, setting = assigned(peaks, memories), None
    if None not in ranks:
        setting = f"method.lora.client_ranks={list(ranks)}"
        document = config.resolved()
        document["method"]["lora"]["client_ranks"] = ranks
        parse_config(document, setting)  # raises where the aggregation is of one rank
    return {
        "ranks": [{"rank": rank, "client_peak_memory_bytes": peak} for rank, peak in peaks.items()],
        "clients": [
            {"memory_bytes": memory, "rank": rank} for memory, rank in zip(memories, ranks, strict=True)
        ],
        "setting": setting,
    }


def _peak(config: RunConfig, change: Mapping[str, Any], objects: ObjectData | None) -> int:
    """Bytes of a client's peak with some of the method's settings changed."""
    document = config.resolved()
    for name, value in change.items():
        own = document["method"][name]
        document["method"][name] = own | value if isinstance(value, dict) else value
    planned = plan(parse_config(document, f"{config.method_name} {dict(change)}"), objects=objects).document
    return int(planned["client_peak_memory_bytes"]["total"])


def _methods(config: RunConfig, memories: Sequence[int], objects: ObjectData | None) -> list[dict[str, Any]]:
    """Peaks of the configured method and of some others; what does not go with the rest is left out."""
    batch = getattr(config.method, "batch_size", 1)
    others = [{"name": name, "batch_size": batch, **more} for name, more in LESS]
    found: list[dict[str, Any]] = [
        {"method": config.method_name, "settings": "", "client_peak_memory_bytes": _peak(config, {}, objects)}
    ]
    for method in others:
        document = {**config.resolved(), "method": method}
        try:
            peak = _peak(parse_config(document, str(method["name"])), {}, objects)
        except InputError:  # of a classifier, pictures or pairs, which not all methods train on
            continue
        settings = " ".join(
            f"method.{key}.rank={value['rank']}" if isinstance(value, dict) else f"method.{key}={value}"
            for key, value in method.items()
        )
        found.append({"method": method["name"], "settings": settings, "client_peak_memory_bytes": peak})
    for row in found:
        row["clients"] = sum(row["client_peak_memory_bytes"] <= memory for memory in memories)
    return found


def halves(rank: int) -> list[int]:
    """A rank, half of it, half of that, to 1."""
    found = [rank]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found


def assigned(peaks: Mapping[int, int], memories: Sequence[int]) -> list[int | None]:
    """The highest rank whose peak is within each memory; None where none is.

    Args:
        peaks: Bytes by rank.
        memories: Bytes of each client.
    """
    return [max((rank for rank, peak in peaks.items() if peak <= m), default=None) for m in memories]


def said(found: Mapping[str, Any]) -> list[str]:
    """Lines for people, of what `by_memory` gave."""
    lines = list[str]()
    if ranks := found.get("client_ranks"):
        needs = ", ".join(f"{row['rank']} {size(row['client_peak_memory_bytes'])}" for row in ranks["ranks"])
        lines.append(f"A client's peak memory by rank: {needs}.")
        for row in ranks["clients"]:
            rank = f"rank {row['rank']}" if row["rank"] is not None else "no rank fits"
            lines.append(f"A client of {size(row['memory_bytes'])}: {rank}.")
        if ranks["setting"] is not None:
            return [*lines, f"Set {ranks['setting']}."]
    rows = found["client_methods"]
    for row in rows:
        peak, one = size(row["client_peak_memory_bytes"]), "client" if row["clients"] == 1 else "clients"
        lines.append(f"{row['method']} takes {peak}, which {row['clients']} {one} of these have.")
    best = max(rows, key=lambda row: row["clients"])
    if best["settings"] and best["clients"] > rows[0]["clients"]:
        lines.append(f"{best['method']} fits more of them: {best['settings']}.")
    elif best["clients"] == 0:
        lines.append(
            "None fits any: lower method.batch_size or data.max_length, set method.offload_params=disk or "
            "method.gradient_checkpointing=full, or look for another method with fedtune plan --model."
        )
    return lines
