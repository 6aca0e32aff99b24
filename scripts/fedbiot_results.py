"""The table of FedBiOT's part of docs/results.md, from a folder that `fedtune compare` made.

    python scripts/fedbiot_results.py FOLDER

`fedtune compare` shows one model a run, AdapFu; here AdapEmu stands beside it, and both references are taken
from each run with the same seed. scripts/results.sh makes the folders and inserts the output.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.report.tables import size

BySeed = dict[int, float]
REFERENCES = ("zero-shot", "standalone")  # rows that fedtune compare adds


def rows(folder: Path) -> dict[str, list[Mapping[str, Any]]]:
    """The summaries of a comparison by configuration, in its order."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in json.loads((folder / "compare.json").read_text(encoding="utf-8"))["rows"]:
        found[row["config"]].append(row)
    return dict(found)


def loss(row: Mapping[str, Any]) -> float:
    """Held-out loss of a run's result; AdapFu's where there are two."""
    return float(row["evaluation"]["loss"]["loss"])


def emulated(folder: Path, row: Mapping[str, Any]) -> float | None:
    """Held-out loss of AdapEmu after the last round; None for a run without an emulator."""
    run = folder / f"{row['config']}-seed{row['seed']}" / "rounds.jsonl"
    if not run.exists():  # zero-shot rows are taken from other runs
        return None
    last = json.loads(run.read_text(encoding="utf-8").splitlines()[-1])
    models = last.get("eval_clients", {})
    return float(models["adapemu"]["loss"]["loss"]) if "adapemu" in models else None


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and, of several values, their sample standard deviation."""
    mean = f"{statistics.fmean(values):{sign}.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def page(folder: Path) -> str:
    """The table as Markdown."""
    found = rows(folder)
    losses: dict[str, BySeed] = {
        name: {row["seed"]: loss(row) for row in group} for name, group in found.items()
    }
    header = ["configuration", "AdapFu", *(f"less {name}" for name in REFERENCES), "AdapEmu"]
    header += ["payload a client and round", "client memory"]
    lines = []
    for name, group in found.items():
        line = [name, spread(list(losses[name].values()))]
        for other in REFERENCES:
            pairs = [value - losses[other][seed] for seed, value in losses[name].items()]
            line.append("" if name == other else spread(pairs, "+"))
        own = [value for row in group if (value := emulated(folder, row)) is not None]
        line.append(spread(own) if own else "")
        line.append(size(statistics.fmean(row["payload_bytes_per_client_round"] for row in group)))
        line.append(size(max(row["peak_memory_bytes"]["client"] for row in group)))
        lines.append(line)
    seeds = len(next(iter(found.values())))
    table = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    body = "\n".join("| " + " | ".join(line) + " |" for line in table)
    return f"Held-out loss a token, mean ± standard deviation over {seeds} seeds:\n\n{body}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(page(Path(sys.argv[1])))
