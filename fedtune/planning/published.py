"""Costs as a method's own paper counts them, where that is not how the ledger counts.

FedKSeed's Table 3 counts bytes of its own encoding; FedBiOT's Table 5 leaves out what is sent once, and has a
count of operations of its own.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from fedtune.models.blocks import find_blocks
from fedtune.models.emulator import EMULATORS, cut, flops_per_token
from fedtune.planning.traffic import Traffic


def published(settings: Any, base: PreTrainedModel, traffic: Traffic) -> dict[str, int]:
    """Bytes a client and round, and operations a token, as printed; empty where the plan's own are those.

    Args:
        settings: The method's.
        base: The model, which may have LoRA in it by now.
        traffic: All messages of the run.
    """
    if settings.name in ("fedkseed", "fedkseed-pro"):
        from fedtune.methods.fedkseed.settings import paper_bytes

        return {"bytes_per_client_round": paper_bytes(settings)}
    if settings.name in ("fedbiot", "fedot", "offsite-tuning"):
        first = traffic.exchanges[0]
        blocks = find_blocks(base).modules
        places = cut(len(blocks), settings.adapter_layers, both_ends=settings.both_ends)
        emulator = EMULATORS[settings.emulator](base, places.middle, settings.layer_dropout)
        blocks_of_client = len(emulator) + settings.adapter_layers
        client = cut(blocks_of_client, settings.adapter_layers, both_ends=settings.both_ends)
        each = sum(p.numel() for p in blocks[places.adapter[0]].parameters())
        return {
            "bytes_per_client_round": first.down - first.model + first.up,
            "flops_per_token": flops_per_token(each, client),
        }
    return {}
