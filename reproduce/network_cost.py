"""What a federation over TLS costs: bytes on the socket beside the ledger's, and seconds beside training.

One machine, real processes, the bundled model.

Table:   bytes on the socket, TLS and Flower's polling included; docs/deployment.md, block network-bytes
Command: python reproduce/network_cost.py network-bytes
Time:    not measured
Needs:   extra `flower`
Result:  of LoRA of rank 64 524,478 framed bytes down and 529,897 on the socket (+1.0 %), of FedKSeed
         2,928 and 11,081 (+278.4 %)

Table:   seconds of a round beside training; docs/deployment.md, block network-seconds
Command: python reproduce/network_cost.py network-seconds
Time:    three minutes
Needs:   extra `flower`
Result:  5.22 seconds a round, 4.91 of them beside training, with nodes that asked every three seconds
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import ROOT, Entry, main

sys.path.insert(0, str(ROOT / "tests"))

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
PROCESS = "import flwr.supernode.runtime.run_clientapp, fedtune.transport.flower"
HERE = {"train": "bundled", "max_examples": 60, "max_length": 64}
THERE = {"train": "clients", "max_length": 64, "holdout": {"source": "bundled"}}


def document(method: dict[str, Any], clients: int) -> dict[str, Any]:
    """A configuration of a site."""
    return {
        "data": {**THERE, "clients": clients},
        "method": method,
        "model": {"device": "cpu"},
        "evaluation": {"tasks": ["loss"], "max_examples": 8, "every": 0},
    }


@contextmanager
def federation(clients: int) -> Iterator[tuple[Site, list[Any]]]:
    """A server and clients with a part of the data each, and a proxy before each client."""
    with tempfile.TemporaryDirectory() as folder:
        names = ",".join(f"client-{number}" for number in range(clients))
        with Site(Path(folder), names, seconds=7200) as site:
            site.split({**document(LORA, clients), "data": {**HERE, "clients": clients}})
            proxies = [site.proxy() for _ in range(clients)]
            for number, proxy in enumerate(proxies):
                site.client(number, port=proxy.port)
            yield site, proxies


def bytes_on_socket() -> str:
    """Every method through proxies that count; socket bytes are those of a round's whole time."""
    with federation(clients=3) as (site, proxies):
        rows = [measure_bytes(site, proxies, name, method) for name, method in CASES.items()]
    header = "| method | framed down | socket down | | framed up | socket up | |"
    return "\n".join([header, "|---|---:|---:|---:|---:|---:|---:|", *rows])


def seconds() -> str:
    """One client, because clients have machines of their own."""
    with federation(clients=1) as (site, _):
        return measure_seconds(site, CASES["LoRA, rank 8"])


def measure_bytes(site: Site, proxies: list[Any], name: str, method: dict[str, Any]) -> str:
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
    return f"| {name} | {' | '.join(shown)} |"


def measure_seconds(site: Site, method: dict[str, Any]) -> str:
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
    rest = _mean(whole) - _mean(training) - _mean(starts)
    rows = {
        "a round": _mean(whole),
        "the client's training": _mean(training),
        "the round beside training": _mean(whole) - _mean(training),
        "… start of the message's process, measured alone": _mean(starts),
        "… the rest: questions for work and for answers, Flower's database": rest,
    }
    return "\n".join(["| | seconds |\n|---|---:|", *(f"| {name} | {s:.2f} |" for name, s in rows.items())])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


ENTRIES = {
    "network-bytes": Entry(bytes_on_socket, needs=["flwr"]),
    "network-seconds": Entry(seconds, needs=["flwr"]),
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
