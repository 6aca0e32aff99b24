"""Learning rates for a comparison: each configuration at rates half a decade apart, one seed, held-out loss.

    python reproduce/search_rates.py FOLDER CONFIG... [--set KEY=VALUE ...]

A configuration begins at its own rate, rounded to the grid, and at the rates beside it; while the best is at
the end of what was tried, the next rate beyond is tried too, up to MOST in all. The runs are in FOLDER, and
those that are done are taken over. Prints a Markdown table of all that are there. No comparison has the seed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from common import finished

from fedtune.config.file import load_config
from fedtune.federation.progress import Silent
from fedtune.federation.run import run

SEED = 7
MOST = 5  # rates of one configuration


def rate(place: int) -> float:
    """The grid: 1e-4, 3e-4, 1e-3, ... at places -8, -7, -6, ..."""
    return (3 if place % 2 else 1) * 10.0 ** (place // 2)


def search(loss: Callable[[float], float], start: float) -> None:
    """Tries rates around `start` and on towards the best."""
    middle = round(2 * math.log10(start))
    found = {place: loss(rate(place)) for place in (middle - 1, middle, middle + 1)}
    while len(found) < MOST:
        best = min(found, key=lambda place: found[place])
        beyond = best + (1 if best == max(found) else -1)
        if beyond in found:
            break
        found[beyond] = loss(rate(beyond))


def final_loss(config: Path, folder: Path, settings: list[str], lr: float) -> float:
    """Held-out loss of a run at this rate; infinite where that is not finite."""
    path = folder / f"{config.stem}-{lr:.0e}"
    if not finished(path / "summary.json"):
        fixed = [f"seed={SEED}", f"method.lr={lr}", "evaluation.bootstrap=0", "evaluation.tasks=[loss]"]
        run(load_config(config, [*settings, *fixed]), path, Silent(), resume=path.exists())
    return loss_of(path)


def loss_of(run: Path) -> float:
    """Held-out loss of a run that is done."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    found = summary["evaluation"]["loss"]["loss"]
    return math.inf if found is None else float(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Search learning rates.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    arguments = parser.parse_args()
    results: dict[str, dict[float, float]] = {}
    for config in arguments.configs:
        search(
            partial(final_loss, config, arguments.folder, arguments.settings),
            cast(Any, load_config(config, arguments.settings).method).lr,
        )
        done = [path.parent for path in arguments.folder.glob(f"{config.stem}-?e[-+]??/summary.json")]
        results[config.stem] = {float(run.name[-5:]): loss_of(run) for run in done}
    rates = sorted({lr for each in results.values() for lr in each})
    print("| configuration | " + " | ".join(f"{lr:.0e}".replace("e-0", "e-") for lr in rates) + " | best |")
    print("| --- |" + " ---: |" * (len(rates) + 1))
    for name, each in results.items():
        best = min(each, key=lambda lr: each[lr])
        cells = [f"{each[lr]:.4f}" if lr in each else "" for lr in rates]
        print(f"| {name} | " + " | ".join(cells) + f" | {best:.0e} |".replace("e-0", "e-"))


if __name__ == "__main__":
    main()
