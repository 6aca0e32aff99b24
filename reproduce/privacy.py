"""What secure aggregation and differential privacy cost.

Table:   what secure aggregation adds to the bytes; docs/privacy.md, block secure-bytes
Command: python reproduce/privacy.py secure-bytes
Time:    two minutes
Needs:   extra `privacy`
Result:  FedAvg's client sends 65.54 kB without masks, and under them 67.15 kB more in 64 bits, 34.38 kB
         in 48; FedKSeed's 30 B, and 34.35 kB or 26.15 kB

Table:   CPU seconds of its parts; docs/privacy.md, block secure-seconds
Command: python reproduce/privacy.py secure-seconds
Time:    5 seconds
Needs:   extra `privacy`
Result:  the server's secrets take 0.02 seconds for 10 clients and 8.31 for 100

Table:   loss against ε; docs/privacy.md, block privacy-utility
Command: python reproduce/privacy.py privacy-utility
Time:    not measured
Needs:   extra `privacy`
Result:  against no privacy the loss is +0.0376 ± 0.0055 at an ε of 4.85 and +0.2050 ± 0.0404 at 0.89
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import RESULTS, Entry, Step, compare, main, run, spread, table

from fedtune.report.tables import size


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
    from fedtune.protection import masking  # its packages are an extra

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


AT_END = ("evaluation.every=0", "evaluation.tasks=[loss]")


def secured() -> dict[Path, Step]:
    """FedAvg and FedKSeed with numbers of either width, by folder."""
    found = {}
    for method in ("fedavg", "fedkseed"):
        for bits in (64, 48):
            out = RESULTS / f"secure-{method}-{bits}"
            if method == "fedavg":
                found[out] = run(
                    "secure_aggregation",
                    out,
                    *AT_END,
                    "method.rounds=2",
                    "method.local_epochs=null",
                    "method.local_steps=1",
                    "federation.simulate.dropout=0",
                    f"federation.secure_aggregation.bits={bits}",
                )
            else:
                found[out] = run(
                    "fedkseed",
                    out,
                    *AT_END,
                    "method.rounds=2",
                    "method.local_steps=5",
                    "federation.clients_per_round=null",
                    f"federation.secure_aggregation={{bits: {bits}}}",
                )
    return found


def protected() -> dict[Path, Step]:
    """The same federation under other noise, by folder; the first has none, and no clip."""
    noise = {"none": "federation.privacy=null", "clip": "federation.privacy.noise_multiplier=0"}
    for value in ("0.5", "1.0", "2.0", "4.0"):
        noise[value] = f"federation.privacy.noise_multiplier={value}"
    found = {}
    for name, setting in noise.items():
        out = RESULTS / f"privacy-{name}"
        own = ("evaluation.every=0", "evaluation.bootstrap=0", setting)
        found[out] = compare(["privacy"], out, *own, references=False)
    return found


PACKAGES = ("cryptography", "dp_accounting", "Crypto")
ENTRIES = {
    "secure-bytes": Entry(lambda: sizes(list(secured())), list(secured().values()), PACKAGES),
    "secure-seconds": Entry(seconds, needs=PACKAGES),
    "privacy-utility": Entry(lambda: utility(list(protected())), list(protected().values()), PACKAGES),
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
