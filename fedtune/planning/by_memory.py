"""Ranks by memory: which LoRA rank each client of unlike memory can train, from plans of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.config.file import parse_config
from fedtune.config.schema import RunConfig
from fedtune.data.objects import ObjectData
from fedtune.errors import InputError
from fedtune.planning.plan import plan
from fedtune.report.tables import size


def ranks_by_memory(
    config: RunConfig, memories: Sequence[int], objects: ObjectData | None = None
) -> dict[str, Any]:
    """The highest of the configuration's rank and its halves that fits each memory.

    Args:
        config: Of LoRA in FedAvg; its rank is the highest.
        memories: Bytes of each client; with more clients they come in turn, as `lora.client_ranks` does.
        objects: As of `plan`.

    Returns:
        `ranks`, a `rank` and its `client_peak_memory_bytes` each; `clients`, a `memory_bytes` and its `rank`
        each, None where none fits; `setting`, which gives clients these ranks, None where some have none.

    Raises:
        InputError: There are no ranks to give, or not in this method's mean.
    """
    lora = getattr(config.method, "lora", None)
    if config.method_name != "fedavg" or lora is None:
        raise InputError(
            f"client memories give clients their LoRA rank, and {config.method_name} as it is set trains "
            "none; set method.name=fedavg method.trainable=lora, or rank all methods with --model"
        )
    found = {}
    for rank in halves(lora.rank):
        document = config.resolved()
        document["method"]["lora"] |= {"rank": rank, "client_ranks": None}
        planned = plan(parse_config(document, f"rank {rank}"), objects=objects).document
        found[rank] = int(planned["client_peak_memory_bytes"]["total"])
    ranks = assigned(found, memories)
    setting = None
    if None not in ranks:
        setting = f"method.lora.client_ranks={list(ranks)}"
        document = config.resolved()
        document["method"]["lora"]["client_ranks"] = ranks
        parse_config(document, setting)  # raises where the aggregation is of one rank
    return {
        "ranks": [{"rank": rank, "client_peak_memory_bytes": peak} for rank, peak in found.items()],
        "clients": [
            {"memory_bytes": memory, "rank": rank} for memory, rank in zip(memories, ranks, strict=True)
        ],
        "setting": setting,
    }


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
    """Lines for people, of what `ranks_by_memory` gave."""
    needs = ", ".join(f"{row['rank']} {size(row['client_peak_memory_bytes'])}" for row in found["ranks"])
    lines = [f"A client's peak memory by rank: {needs}."]
    for row in found["clients"]:
        rank = f"rank {row['rank']}" if row["rank"] is not None else "no rank fits"
        lines.append(f"A client of {size(row['memory_bytes'])}: {rank}.")
    if found["setting"] is None:
        least = min(row["client_peak_memory_bytes"] for row in found["ranks"])
        return [
            *lines,
            f"The least is {size(least)}: lower method.batch_size or data.max_length, set "
            "method.offload_params=disk or method.gradient_checkpointing=full, or look for another method "
            "with fedtune plan --model.",
        ]
    return [*lines, f"Set {found['setting']}."]
