"""Memory that a large frame takes on its way over TLS, at either side, beyond the tensors themselves.

    python scripts/network_memory.py [MEGABYTES]

One order of that size (default 1,000) with a small reply, then the other way round. Counts the resident
memory of all processes of a side together, twenty times a second; from the peak go what they had before, and
the tensors once. Prints a Markdown table.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from deployed import HERE, Site, descendants  # type: ignore[import-not-found]

from fedtune.config.file import parse_config
from fedtune.core.types import Arrival, Payload
from fedtune.core.wire import Content, decode, encode
from fedtune.deploy.server import Server
from fedtune.measure.clock import Clock
from fedtune.transport.network import Invitation, RoundExchange, invite_clients
from fedtune.transport.remote import Remote

MB = 1_000_000
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

    def end(self) -> dict[str, int]:
        """Bytes beyond what there was before."""
        self._over.set()
        return {side: self.peak[side] - self.before[side] for side in self._sides}

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for side, size in self._now().items():
                self.peak[side] = max(self.peak[side], size)

    def _now(self) -> dict[str, int]:
        of_client = {self._sides["client"], *descendants(self._sides["client"])}
        of_server = {self._sides["server"], *descendants(self._sides["server"])} - of_client
        return {"server": sum(map(_resident, of_server)), "client": sum(map(_resident, of_client))}


def tell(text: str) -> None:
    print(text, file=sys.stderr)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def main(megabytes: int) -> None:
    size = megabytes * MB
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
            print("| | seconds | server, beyond the tensors | client, beyond the tensors |")
            print("|---|---:|---:|---:|", flush=True)
            for round, (way, down, up) in enumerate((("down", size, 0), ("up", 0, size)), start=1):
                tensors = {f"layer.{i}": torch.full((down // 64,), i, dtype=torch.float32) for i in range(16)}
                payload = Payload(tensors if down else {}, {"answer_bytes": up})
                peak, began = Peak(os.getpid(), site.pid("north")), time.monotonic()
                (arrival,) = remote.exchange(round, _order(payload, round), in_plan_order=False)
                reply = _read(arrival)
                seconds = time.monotonic() - began
                beyond = peak.end()
                # the side that receives holds the tensors now, and the client's makes those that it sends
                beyond["client"] -= size
                beyond["server"] -= sum(t.nbytes for t in reply.tensors.values())
                cells = " | ".join(f"{beyond[side] / MB:,.0f} MB" for side in ("server", "client"))
                print(f"| {megabytes:,} MB {way} | {seconds:,.0f} | {cells} |", flush=True)
                del arrival, reply, tensors, payload


def _order(payload: Payload, round: int):  # type: ignore[no-untyped-def]
    yield 0, encode(Content(payload, {"round": round}))


def _read(arrival: Arrival) -> Payload:
    assert not arrival.fault, arrival.fault
    return decode(arrival.frame).payload


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
