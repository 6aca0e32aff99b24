"""Micro-benchmarks: each measures the real code beside a plain reference, in one run, as ratios.

Machines are shared and noisy, so a number of seconds means little; a ratio within one run means something.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fedtune.errors import InputError, nearest

BENCHES = {
    "aggregation": "the server's exact streaming mean against list-then-mean, by number of clients",
    "rebuild": "weights from K seeds: each kind of noise against the paper's loop and one plain pass",
    "synchronize": "time and bytes to the newest model: K seeds, seeds without end, a download; by rounds",
    "zo-step": "a zeroth-order step's time against its two forward passes, by dtype",
    "local-step": "a client's steps against a loop by hand, Trainer and TRL: CPU time, peak memory",
    "encoding": "clients' examples to token ids, against the tokenizer alone: CPU time, bytes a token",
    "memory": "peak memory of a client by method, and backward time of one block against all",
    "evaluation": "held-out losses against a loop with whole logits, and lm-eval: CPU time, peak memory",
    "generation": "answers in padded batches against transformers.generate, one example after the other",
    "proximal": "FedBiOT's proximal term from products of the rank's size, against the dense product",
    "emulator": "a client's step on an adapter and emulator, against LoRA on the whole model",
    "federation": "rounds of twenty clients with a step each, against the same written by hand: CPU time",
    "simulation": "memory of simulated clients: one base model in all, against a model each",
    "billion": "a round of each method on 1.1 billion weights: plan, ledger, process; needs 16 GB",
    "gpu-checks": "on a GPU: bits of all noise, every method in bfloat16 against the CPU, memory and plan",
    "gpu-speed": "on a GPU, 1.1 billion weights: noise against a copy, steps against loops by hand",
}
DTYPES = ("float32", "bfloat16", "float16")
ON_A_GPU = ("gpu-checks", "gpu-speed")  # scripts/on_a_gpu.sh runs them


def run_benches(name: str, dtypes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Runs the benchmark of that name, or `all` that need no GPU.

    Args:
        name: Of the benchmark.
        dtypes: Those that zo-step measures, of `DTYPES`; none for all of them.

    Returns:
        One document a benchmark: `bench`, `machine`, `rows` and `ratios`.

    Raises:
        InputError: No benchmark has that name, or it has no dtypes, or not these.
    """
    if name != "all" and name not in BENCHES:
        raise InputError(
            f"no benchmark is named {name!r}; there are {', '.join(BENCHES)} and all.{nearest(name, BENCHES)}"
        )
    if dtypes and name != "zo-step":
        raise InputError(f"--dtype is of zo-step; {name} has its own dtypes: leave it out")
    unknown = [each for each in dtypes if each not in DTYPES]
    if unknown:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {unknown[0]!r}")
    from fedtune.measure.environment import environment  # here, so that they are listed without torch

    settings = {"dtypes": tuple(dict.fromkeys(dtypes))} if dtypes else {}
    documents = []
    for each in [each for each in BENCHES if each not in ON_A_GPU] if name == "all" else [name]:
        module = importlib.import_module(f"fedtune.bench.{each.replace('-', '_')}")
        rows, ratios = module.measure(**settings)
        documents.append({"bench": each, "machine": environment(), "rows": rows, "ratios": ratios})
    return documents


def bench_table(document: dict[str, Any]) -> Table:
    """The rows of one benchmark."""
    table = Table(title=f"{document['bench']}: {BENCHES[document['bench']]}", title_justify="left")
    columns = list(dict.fromkeys(key for row in document["rows"] for key in row))
    for column in columns:
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in document["rows"]:
        table.add_row(*(_cell(row.get(column, "")) for column in columns))
    return table


def _cell(value: object) -> str:
    return (
        f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
