"""A round of each method on 1.1 billion weights: plan, ledger and process.

Table:   each role's peak by the ledger and against its plan, the process at its peak, folders, seconds;
         docs/planning.md, block billion
Command: python reproduce/billion.py billion
Time:    half an hour alone on the machine
Needs:   9 GB of free memory, 18 for the row of all weights, which is else left out; 16 GB of disk
Result:  the ledger is 0.993 to 1.041 of the plan; beyond all accounts of a simulation the process has
         492.62 MB with LoRA, 583.81 MB with NF4 and LoRA, 654.09 MB with FedCyBGD, 782.78 MB with FedKSeed,
         831.06 MB with FedBiOT; all weights were not run
"""

from __future__ import annotations

import json
import sys
from typing import Any

from common import RESULTS, Entry, main, table

from fedtune.bench import billion
from fedtune.federation.workers import free_bytes
from fedtune.report.tables import size

DONE = RESULTS / "billion.json"  # goes on with what was interrupted; delete it where the program has changed
FREE = {"all weights, 8-bit AdamW": 18_000_000_000}  # bytes; of the others
FREE_FOR_ANY = 9_000_000_000


def rows() -> dict[str, dict[str, Any]]:
    """What `fedtune bench billion` says of each method that there is memory for; kept for next time."""
    done: dict[str, dict[str, Any]] = json.loads(DONE.read_text(encoding="utf-8")) if DONE.exists() else {}
    for case in billion.CASES:
        free, wanted = free_bytes(), FREE.get(case, FREE_FOR_ANY)
        if case in done:
            continue
        if free is not None and free < wanted:
            print(f"{case}: {size(free)} of memory are free, {size(wanted)} are needed", file=sys.stderr)
            continue
        print(case, file=sys.stderr, flush=True)
        (done[case],) = billion.measure(cases=[case])[0]
        DONE.parent.mkdir(parents=True, exist_ok=True)
        new = DONE.with_suffix(".new")
        new.write_text(json.dumps(done, indent=1), encoding="utf-8")
        new.replace(DONE)
    return done


def measured() -> str:
    """The table."""
    header = ["method", "client, ledger / plan", "server", "evaluation", "accounts together"]
    header += ["process", "of it private", "mapped", "beyond the accounts", "run folder"]
    header += ["seconds: set-up", "training", "server", "checkpoint", "evaluation"]
    done, lines = rows(), []
    for case in billion.CASES:
        if (row := done.get(case)) is None:
            lines.append([case, "not run", *([""] * (len(header) - 2))])
            continue
        roles = [
            f"{size(row[f'ledger_{role}'])} ({row[f'ledger_{role}'] / row[f'planned_{role}']:.3f})"
            for role in billion.ROLES
        ]
        process = [
            size(row[name]) for name in ("simulation", "rss", "private", "mapped", "rss_beyond", "folder")
        ]
        parts = ("setup", "training", "aggregation", "checkpoint", "evaluation")
        lines.append([case, *roles, *process, *(f"{row[f'{part}_s']:.0f}" for part in parts)])
    return table(header, lines)


ENTRIES = {"billion": Entry(measured)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
