"""What share of the computed tokens is padding: random batches, batches of like length, and packed rows.

Dolly with a small model's tokenizer, batches of 8 of at most 512 tokens, one local epoch: what a plan says.

Table:   padding, tokens and steps of an epoch by `data.batching`; docs/data.md, block padding
Command: python reproduce/batching.py padding
Time:    two minutes
Needs:   Dolly and instruct-7m of ../shared
Result:  PENDING
"""

from __future__ import annotations

from typing import get_args

from common import DOLLY, MODELS, Entry, main

from fedtune.config.file import parse_config
from fedtune.data.batching import Name
from fedtune.planning import workload

MODEL = MODELS / "instruct-7m"
CLIENTS = (10, 150)  # with about 1,350 examples each, and 90


def padding() -> str:
    """A row for each number of clients and each batching."""
    rows = ["| clients | `data.batching` | steps of an epoch | tokens computed | of them padding |"]
    rows.append("|---:|---|---:|---:|---:|")
    for clients in CLIENTS:
        for name in get_args(Name):
            data = {"train": str(DOLLY), "clients": clients, "batching": name, "max_length": 512}
            data["fields"] = {"instruction": "instruction", "input": "context", "output": "response"}
            config = parse_config(
                {"model": {"name": str(MODEL)}, "data": data, "method": {"name": "fedavg"}}, "this table"
            )
            work = workload.read(config, pooled=False, rows=1)
            assert work.passes and work.tokens
            computed, padded = work.tokens
            steps = sum(config.method.steps(count) for count in work.passes.values()) / clients
            rows.append(
                f"| {clients} | `{name}` | {steps:,.0f} | {computed:,} | {100 * padded / computed:.1f} % |"
            )
    return "\n".join(rows)


ENTRIES = {"padding": Entry(padding, needs=(DOLLY, MODEL))}


if __name__ == "__main__":
    main(__doc__, ENTRIES)
