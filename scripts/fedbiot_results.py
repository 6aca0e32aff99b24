"""The tables of FedBiOT's part of docs/results.md, from run folders.

    python scripts/fedbiot_results.py compare FOLDER   one that `fedtune compare` made
    python scripts/fedbiot_results.py sweep RUN...     one line a run, by settings

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

import yaml

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


def emulated(run: Path) -> float | None:
    """Held-out loss of AdapEmu after the last round; None for a run without an emulator."""
    rounds = run / "rounds.jsonl"
    if not rounds.exists():  # zero-shot rows are taken from other runs
        return None
    last = json.loads(rounds.read_text(encoding="utf-8").splitlines()[-1])
    models = last.get("eval_clients", {})
    return float(models["adapemu"]["loss"]["loss"]) if "adapemu" in models else None


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and, of several values, their sample standard deviation."""
    mean = f"{statistics.fmean(values):{sign}.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    whole = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in whole)


def sweep(runs: Sequence[Path]) -> str:
    """What was tried: the settings that were varied, and both results."""
    lines = []
    for run in runs:
        method = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["method"]
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        alignment, emu = method.get("alignment"), emulated(run)
        line = [method["name"], f"{method['lr']:g}"]
        line += [f"{alignment['lr']:g}", str(alignment["steps_before"])] if alignment else ["", ""]
        line += [f"{method[key]:g}" if emu is not None else "" for key in ("proximal", "distill_weight")]
        line += [f"{loss(summary):.4f}", "" if emu is None else f"{emu:.4f}"]
        lines.append(line)
    header = ["method", "lr", "alignment.lr", "steps_before", "ε", "λ", "AdapFu", "AdapEmu"]
    return table(header, lines)


def compare(folder: Path) -> str:
    """A comparison's configurations with both results and AdapFu's differences from the references."""
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
        own = [
            value for row in group if (value := emulated(folder / f"{name}-seed{row['seed']}")) is not None
        ]
        line.append(spread(own) if own else "")
        line.append(size(statistics.fmean(row["payload_bytes_per_client_round"] for row in group)))
        line.append(size(max(row["peak_memory_bytes"]["client"] for row in group)))
        lines.append(line)
    seeds = len(next(iter(found.values())))
    caption = f"Held-out loss a token, mean ± standard deviation over {seeds} seeds:"
    return f"{caption}\n\n{table(header, lines)}"


if __name__ == "__main__":
    what, *paths = sys.argv[1], *map(Path, sys.argv[2:])
    if what == "compare":
        print(compare(paths[0]))
    elif what == "sweep":
        print(sweep(paths))
    else:
        raise SystemExit(__doc__)
