"""Tables of docs/privacy.md, from run folders.

    python scripts/privacy_results.py utility FOLDER...   scores against ε, a folder of fedtune compare a row
    python scripts/privacy_results.py bytes FOLDER...     what secure aggregation adds, a run a row
    python scripts/privacy_results.py seconds             CPU seconds of its parts, by size of the cohort

scripts/results.sh makes the folders and puts what this prints into the page.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedtune.protection import masking
from fedtune.report.tables import size


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.fmean(values):{sign}.4f} ± {statistics.stdev(values):.4f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def utility(folders: Sequence[Path]) -> str:
    """Loss against ε; the first folder is what the others are compared to, seed by seed."""
    rows, first = [], dict[int, float]()
    settings: dict[str, Any] = {}
    for folder in folders:
        runs = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["rows"]
        config = yaml.safe_load(
            (folder / f"{runs[0]['config']}-seed{runs[0]['seed']}" / "config.yaml").read_text("utf-8")
        )
        privacy = config["federation"]["privacy"]
        settings = settings or privacy or {}
        losses = {run["seed"]: float(run["evaluation"]["loss"]["loss"]) for run in runs}
        if not first:
            before = [float(run["zero_shot"]["loss"]["loss"]) for run in runs]
            rows.append(["untrained", "0", spread(before), ""])
            first = losses
        spent = runs[0]["privacy"]["epsilon"] if privacy else None
        name = f"noise {privacy['noise_multiplier']:g} × clip" if privacy else "no privacy"
        if privacy and not privacy["noise_multiplier"]:
            name = "clipping alone"
        apart = "" if losses is first else spread([losses[seed] - first[seed] for seed in losses], "+")
        rows.append([name, f"{spent:.2f}" if spent else "∞", spread(list(losses.values())), apart])
    caption = (
        f"Held-out loss after the last round, mean ± standard deviation over {len(first)} seeds; clip "
        f"{settings['clip']:g}, ε at δ = {settings['delta']:g}:"
    )
    return f"{caption}\n\n{table(['', 'ε', 'loss', 'against no privacy'], rows)}"


def sizes(folders: Sequence[Path]) -> str:
    """Mean payload of a client and round, by kind and way, and the server's time for the sum."""
    rows = []
    for folder in folders:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        lines = (folder / "wire.jsonl").read_text(encoding="utf-8").splitlines()
        found, rounds = Counter[tuple[str, str]](), set()
        for entry in map(json.loads, lines):
            found[entry["kind"], entry["direction"]] += entry["payload_bytes"]
            rounds.add((entry["round"], entry["client"]))
        mean = {key: size(total / len(rounds)) for key, total in found.items()}
        secure = config["federation"]["secure_aggregation"]
        rows.append(
            [config["method"]["name"], str(config["data"]["clients"]), str(secure["bits"])]
            + [
                mean.get((kind, way), "0 B")
                for kind in ("train", "secure-aggregation")
                for way in ("down", "up")
            ]
        )
    header = ["method", "clients", "bits", "train, down", "train, up", "secure-aggregation, down", "up"]
    return table(header, rows)


def seconds() -> str:
    """What splitting, putting together and masking take of one core; the best of three tries."""

    def best(work: Callable[[], object]) -> float:
        found = []
        for _ in range(3):
            before = time.process_time()
            work()
            found.append(time.process_time() - before)
        return min(found)

    vector, key = np.zeros(10**6, dtype=np.uint64), masking.fresh(masking.KEY)
    mask = best(lambda: masking.add_mask(vector, key, 64))
    rows = []
    for clients in (4, 10, 30, 100):
        threshold = math.ceil(0.6 * clients)
        secret = masking.fresh(masking.SECRET)
        shares = dict(enumerate(masking.split_secret(secret, threshold, clients)[:threshold]))
        deal = 2 * best(lambda n=clients, t=threshold, s=secret: masking.split_secret(s, t, n))  # type: ignore[misc]
        combine = clients * best(lambda some=shares: masking.join_shares(some))  # type: ignore[misc]
        rows.append([str(clients), f"{deal:.3f}", f"{clients * mask:.3f}", f"{combine:.2f}"])
    header = ["clients", "a client's shares", "a client's masks, a million numbers", "the server's secrets"]
    return table(header, rows)


if __name__ == "__main__":
    what, *paths = sys.argv[1], *map(Path, sys.argv[2:])
    if what == "utility":
        print(utility(paths))
    elif what == "bytes":
        print(sizes(paths))
    elif what == "seconds":
        print(seconds())
    else:
        raise SystemExit(__doc__)
