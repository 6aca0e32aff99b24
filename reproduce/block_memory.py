"""What a client of FedCyBGD holds beside one of FedLoRA of the same settings, by part: plans, no weights.

Table:   what a client's step holds at its peak, planned; docs/fedcybgd.md, block memory-parts
Command: python reproduce/block_memory.py memory-parts
Time:    not measured
Needs:   nothing; the architectures alone are read
Result:  with checkpointing FedCyBGD's first block takes 1.08 of FedLoRA (GPT-2) and 1.14 (LLaMA-2-7B), its
         last 1.05 and 1.08; without, the first 1.03 and 0.95, the last 0.56 and 0.48
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Entry, main, table
from torch import nn

from fedtune.config.file import parse_config
from fedtune.core.cohort import Cohort
from fedtune.core.types import ClientEnv
from fedtune.data.encoded import Encoded
from fedtune.methods import registry
from fedtune.models.blocks import find_blocks
from fedtune.planning.dry_run import FakeStore
from fedtune.planning.fake import Fakes, values
from fedtune.planning.memory import PartsMeter
from fedtune.planning.traffic import first_state
from fedtune.report.tables import size

PLANNED = {  # name: configuration, examples, tokens of each
    "GPT-2 small, float32, 2 x 256": ("gpt2", 2, 256),
    "LLaMA-2-7B, bfloat16, 8 x 512": ("llama-2-7b", 8, 512),
}
SAME = {
    "": {"gradient_checkpointing": "full"},
    ", offloaded": {"gradient_checkpointing": "full", "offload_params": "disk"},
    ", no checkpointing": {"gradient_checkpointing": "none"},
}


CASES = ("Fed-full", "FedLoRA", "FedCyBGD, first", "FedCyBGD, last")


def parts() -> str:
    """What a client's step holds at its peak, planned, and its ratios to that of others."""
    rows = []
    for name, (kind, examples, tokens) in PLANNED.items():
        folder = str(ROOT / "configs" / "papers" / "shapes" / kind)
        meters: dict[str, PartsMeter] = {}
        for other, settings in SAME.items():
            own = CASES[1:] if "offload_params" in settings else CASES  # nothing of Fed-full is frozen
            meters |= {case: _planned(folder, case, settings, examples, tokens) for case in own}
            for case in own:
                kinds = ("weights", "gradients", "optimizer", "activations")
                cells = [size(meters[case].parts[part]) for part in kinds]
                peak = meters[case].peak_bytes
                ratios = (f"{peak / meters[to].peak_bytes:.2f}" for to in CASES[:2])
                rows.append([name, f"{case}{other}", *cells, size(peak), *ratios])
    header = ["model and batch", "case", "weights", "gradients", "masters, moments", "activations", "peak"]
    return table([*header, *(f"of {to}, same settings" for to in CASES[:2])], rows)


def _planned(folder: str, case: str, settings: dict[str, Any], examples: int, tokens: int) -> PartsMeter:
    """A step of a model without values."""
    fakes, meter = Fakes(), PartsMeter(repeats=True)
    dtype = "bfloat16" if "llama-2" in folder else "float32"
    base = fakes.model(
        folder, base=Path(), initial="pretrained", task="causal-lm", num_labels=None, dtype=dtype
    )
    trainable = "full" if case == "Fed-full" else "lora"
    own = {"name": "fedcybgd"} if "CyBGD" in case else {"name": "fedavg", "trainable": trainable}
    document = {**own, **settings, "local_steps": 1, "batch_size": examples}
    method: Any = registry.build(parse_config({"method": document}, "planned").method, 0)
    model = method.client_model(lambda: base)
    fakes.empty_out(model)
    blocks = len(find_blocks(model).modules)
    cohort = Cohort(tuple(range(blocks)), dict.fromkeys(range(blocks), examples), blocks)
    ids = tuple(range(tokens))
    with values():
        state = first_state(method, model)
        if case.endswith("last"):
            state = replace(state, turns=blocks - 1)
        order = next(iter(method.plan(state, 1, cohort)))
        env = ClientEnv(
            client=order.client,
            round=1,
            seed=0,
            model=nn.Module() if method.sends_model else model,
            items=[Encoded(ids, ids)] * examples,
            pad_id=0,
            state=None,
            memory=meter,
            device=torch.device("cpu"),
            store=FakeStore(),
        )
        method.client_step(order.payload, env)
    return meter


ENTRIES = {"memory-parts": Entry(parts)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
