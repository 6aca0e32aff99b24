"""Memory that a large frame takes on its way over TLS, at either side, beyond the tensors themselves.

Counts the resident memory of all processes of a side together, twenty times a second; from the peak go what
they had before, and the tensors once.

Table:   memory of a frame of 2,000 MB; docs/deployment.md, block network-memory
Command: python reproduce/network_memory.py network-memory
Time:    twelve minutes for the frames (the table's seconds) on a busy machine, and starting
Needs:   extra `flower`; 5 GB of memory, and of disk
Result:  2,000 MB down take 630 MB at the server, 73 MB of them in its own process, and 497 MB at the
         client, 206 MB of them in its own; up, 153 MB and 268 MB
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from common import ROOT, Entry, main

sys.path.insert(0, str(ROOT / "tests"))

from deployed import HERE, Site, descendants  # type: ignore[import-not-found]

from fedtune.config.file import parse_config
from fedtune.core.types import Arrival, Payload
from fedtune.core.wire import Content, decode, lay_out
from fedtune.deploy.server import Server
from fedtune.measure.clock import Clock
from fedtune.transport.network import Invitation, RoundExchange, invite_clients
from fedtune.transport.remote import Remote

MB = 1_000_000
MEGABYTES = 2000
DOCUMENT = {
    "data": {"train": "clients", "clients": 1, "holdout": {"source": "bundled"}},
    "transport": {"name": "flower"},
}


class Peak:
    """The most that the processes of both sides have had together, each side for itself."""

    def __init__(self, server: int, client: int) -> None:
        self._sides, self._over = {"server": server, "client": client}, threading.Event()
        self.before = self._now()
        self.peak = dict(self.before)
        threading.Thread(target=self._watch, daemon=True).start()

    def end(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes beyond what there was before: of each side, and of the process itself that is named."""
        self._over.set()
        beyond = {name: self.peak[name] - self.before[name] for name in self.peak}
        return (
            {side: beyond[side] for side in self._sides},
            {side: beyond[f"{side} alone"] for side in self._sides},
        )

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for side, size in self._now().items():
                self.peak[side] = max(self.peak[side], size)

    def _now(self) -> dict[str, int]:
        of_client = {self._sides["client"], *descendants(self._sides["client"])}
        of_server = {self._sides["server"], *descendants(self._sides["server"])} - of_client
        both = {"server": of_server, "client": of_client}
        return {side: sum(map(_resident, pids)) for side, pids in both.items()} | {
            f"{side} alone": _resident(pid) for side, pid in self._sides.items()
        }


def tell(text: str) -> None:
    """What the server says."""
    print(text, file=sys.stderr)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


@dataclass(frozen=True)
class Way:
    """What a frame took: seconds, and bytes beyond the tensors by side, of all its processes and of ours."""

    name: str
    seconds: float
    beyond: Mapping[str, int]
    ours: Mapping[str, int]


def measured(size: int) -> list[Way]:
    """One order of so many bytes with a small reply, then the other way round."""
    ways = []
    with tempfile.TemporaryDirectory() as folder, Site(Path(folder), "north", seconds=3600) as site:
        example = {"instruction": "a", "output": "b"}
        (site.folder / "data-0.jsonl").write_text(json.dumps(example) + "\n")
        site.client(0, program=(sys.executable, str(HERE / "echo_client.py")))
        keys = site.folder / "keys/server"
        with Server(parse_config(DOCUMENT, "test"), keys, site.port, tell) as server:
            channel = server.start()
            invitation = Invitation("ab12", "{}", "")
            joined = invite_clients(channel, invitation, {0: "north"}, wait_s=300, log_line=lambda text: None)
            exchange = RoundExchange(invitation, joined, {}, limit=lambda client: 2 * size)
            remote = Remote(channel, exchange, window=None, deadline_s=None, clock=Clock())
            for round, (way, down, up) in enumerate((("down", size, 0), ("up", 0, size)), start=1):
                tensors = {f"layer.{i}": torch.full((down // 64,), i, dtype=torch.float32) for i in range(16)}
                payload = Payload(tensors if down else {}, {"answer_bytes": up})
                peak, began = Peak(os.getpid(), site.pid("north")), time.monotonic()
                (arrival,) = remote.exchange(round, _order(payload, round), in_plan_order=False)
                reply = _read(arrival)
                seconds = time.monotonic() - began
                found = peak.end()
                # the side that receives holds the tensors now, and the client's makes those that it sends
                held = {"client": size, "server": sum(t.nbytes for t in reply.tensors.values())}
                beyond, ours = (
                    {side: taken[side] - count for side, count in held.items()} for taken in found
                )
                ways.append(Way(way, seconds, beyond, ours))
                del arrival, reply, tensors, payload
    return ways


def memory() -> str:
    """A row for each way."""
    rows = []
    for way in measured(MEGABYTES * MB):
        sides = (way.beyond, way.ours)
        cells = " | ".join(f"{of[side] / MB:,.0f} MB" for side in ("server", "client") for of in sides)
        rows.append(f"| {MEGABYTES:,} MB {way.name} | {way.seconds:,.0f} | {cells} |")
    header = (
        "| | seconds | server, beyond the tensors | … `fedtune server` alone | client, beyond the tensors "
        "| … `fedtune client` alone |\n|---|---:|---:|---:|---:|---:|"
    )
    return "\n".join([header, *rows])


def _order(payload: Payload, round: int):  # type: ignore[no-untyped-def]
    yield 0, lay_out(Content(payload, {"round": round}))


def _read(arrival: Arrival) -> Payload:
    assert not arrival.fault, arrival.fault
    return decode(arrival.frame).payload


ENTRIES = {"network-memory": Entry(memory, needs=["flwr"])}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
