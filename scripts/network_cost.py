"""What a federation over TLS costs: bytes on the socket beside the ledger's, and seconds beside training.

    python scripts/network_cost.py bytes [CASE ...]
    python scripts/network_cost.py seconds

One machine, real processes. `bytes`: three clients, each through a proxy that counts, on the bundled model;
socket bytes are those of a round's whole time, TLS and Flower's polling included. `seconds`: one client,
because clients have machines of their own. Prints a Markdown table.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from command import lines, write_config  # type: ignore[import-not-found]
from deployed import Site  # type: ignore[import-not-found]

LORA = {"name": "fedavg", "rounds": 5, "batch_size": 4, "lr": 0.01}
SEEDS = {"name": "fedkseed", "rounds": 5, "seeds": 4096, "local_steps": 200, "batch_size": 1, "lr": 1e-5}
CASES: dict[str, dict[str, Any]] = {
    "LoRA, rank 8": {**LORA, "lora": {"rank": 8}},
    "LoRA, rank 64": {**LORA, "lora": {"rank": 64}},
    "all weights": {**LORA, "trainable": "full"},
    "FedKSeed, K = 4096": SEEDS,
    "FedKSeed-Pro, K = 4096": {**SEEDS, "name": "fedkseed-pro"},
}
NODE_ASKS_S = 3.0  # a constant of Flower's
PROCESS = "import flwr.supernode.runtime.run_clientapp, fedtune.transport.flower"
HERE = {"train": "bundled", "max_examples": 60, "max_length": 64}
THERE = {"train": "clients", "max_length": 64, "holdout": {"source": "bundled"}}


def document(method: dict[str, Any], clients: int) -> dict[str, Any]:
    return {
        "data": {**THERE, "clients": clients},
        "method": method,
        "model": {"device": "cpu"},
        "evaluation": {"tasks": ["loss"], "max_examples": 8, "every": 0},
    }


def main(what: str, *cases: str) -> None:
    clients = 3 if what == "bytes" else 1
    with tempfile.TemporaryDirectory() as folder:
        names = ",".join(f"client-{number}" for number in range(clients))
        with Site(Path(folder), names, seconds=7200) as site:
            site.split({**document(LORA, clients), "data": {**HERE, "clients": clients}})
            proxies = [site.proxy() for _ in range(clients)]
            for number, proxy in enumerate(proxies):
                site.client(number, port=proxy.port)
            if what == "bytes":
                print("| method | framed down | socket down | | framed up | socket up | |")
                print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
                for name in cases or CASES:
                    measure_bytes(site, proxies, name, CASES[name])
            else:
                measure_seconds(site, CASES["LoRA, rank 8"])


def measure_bytes(site: Site, proxies: list[Any], name: str, method: dict[str, Any]) -> None:
    """Means over clients and the rounds after the first, in which everyone is sent everything."""
    write_config(site.folder / "c.yaml", document(method, len(proxies)))
    run = re.sub(r"\W+", "-", name)
    site.server("c.yaml", "--out", run, "--quiet")
    site.wait(lambda: len(site.rounds(run)) >= 2, "the first round")
    before = [(proxy.down, proxy.up) for proxy in proxies]
    site.wait(lambda: len(site.rounds(run)) >= method["rounds"] + 1, "the last round")
    after = [(proxy.down, proxy.up) for proxy in proxies]
    assert site.status("server") == 0, site.logs()
    rounds = method["rounds"] - 1
    shown = []
    for index, way in enumerate(("down", "up")):
        entries = [
            e for e in lines(site.folder / run / "wire.jsonl") if e["round"] > 1 and e["direction"] == way
        ]
        framed = sum(e["framed_bytes"] for e in entries) / len(entries)
        socket = sum(a[index] - b[index] for a, b in zip(after, before, strict=True)) / len(proxies) / rounds
        shown += [f"{framed:,.0f}", f"{socket:,.0f}", f"{100 * (socket / framed - 1):+.1f} %"]
    print(f"| {name} | {' | '.join(shown)} |", flush=True)


def measure_seconds(site: Site, method: dict[str, Any]) -> None:
    """Means over the rounds after the first."""
    write_config(site.folder / "c.yaml", document({**method, "rounds": 9}, 1))
    site.server("c.yaml", "--out", "seconds", "--quiet")
    assert site.status("server") == 0, site.logs()
    log = site.log("client-0").read_text()
    training = [float(s) for s in re.findall(r"reply of [\d,]+ bytes after ([\d.]+) s", log)][1:]
    whole = [entry["seconds"] for entry in site.rounds("seconds")][2:]
    starts = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", PROCESS], check=True)
        starts.append(time.perf_counter() - began)
    rest = _mean(whole) - _mean(training) - _mean(starts) - NODE_ASKS_S / 2
    print("| | seconds |\n|---|---:|")
    print(f"| a round | {_mean(whole):.2f} |")
    print(f"| the client's training | {_mean(training):.2f} |")
    print(f"| the round beside training | {_mean(whole) - _mean(training):.2f} |")
    print(f"| … until the node asks for work, every 3 s: half of that | {NODE_ASKS_S / 2:.2f} |")
    print(f"| … start of the message's process, measured alone | {_mean(starts):.2f} |")
    print(f"| … the rest: Flower's other questions and its database | {rest:.2f} |")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main(*sys.argv[1:])
