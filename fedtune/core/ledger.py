"""The ledger: every message's bytes and every measured peak of memory, written as it happens.

`payload_bytes` is the tensor and scalar content as the papers count it, `framed_bytes` what the socket
carries. Totals are sums of the written entries, so a resumed run continues the same account.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedtune.measure.memory import COLUMNS

Write = Callable[[dict[str, Any]], None]
EVALUATED = "evaluation"  # kind of messages in which clients are asked for scores


class Ledger:
    """Account of one run. Entries go out through two writers, one a file."""

    def __init__(self, write_wire: Write, write_memory: Write) -> None:
        self._write_wire, self._write_memory = write_wire, write_memory
        self.payload_bytes = Counter(down=0, up=0)
        self.framed_bytes = Counter(down=0, up=0)
        self.evaluation_bytes = Counter(down=0, up=0)  # payload that asks for scores: a part of the above
        self.peak_memory_bytes = {"client": 0, "server": 0, "evaluation": 0}
        self.peaks_by_device: dict[str, dict[str, int]] = {where: {} for where in self.peak_memory_bytes}
        self._client_rounds: set[tuple[int, int]] = set()

    def restore(self, wire: Iterable[dict[str, Any]], memory: Iterable[dict[str, Any]]) -> None:
        """Takes up the account of the entries written before, without writing them again."""
        for entry in wire:
            self._count_message(entry)
        for entry in memory:
            self._count_memory(entry)

    def message(
        self, *, round: int, client: int, direction: str, kind: str, payload_bytes: int, framed_bytes: int
    ) -> None:
        """Enters one message. `direction` is `down` (to the client) or `up`."""
        entry = {
            "round": round,
            "client": client,
            "direction": direction,
            "kind": kind,
            "payload_bytes": payload_bytes,
            "framed_bytes": framed_bytes,
        }
        self._count_message(entry)
        self._write_wire(entry)

    def memory(
        self,
        *,
        round: int,
        where: str,
        client: int | None,
        peak_bytes: int,
        how: str,
        by_device: Mapping[str, int] = {},
    ) -> None:
        """Enters the peak of one measured scope.

        Args:
            round: Of the run.
            where: `client`, `server` or `evaluation`.
            client: Which.
            peak_bytes: Wherever they lay.
            how: They were measured.
            by_device: With a GPU, as `MemoryMeter.by_device`.
        """
        entry = {"round": round, "where": where, "client": client, "peak_bytes": peak_bytes, "how": how}
        entry |= by_device
        self._count_memory(entry)
        self._write_memory(entry)

    def payload_bytes_per_client_round(self) -> float:
        """Mean payload, down and up together, of a client in a round; 0 where nothing was sent.

        Without what clients are sent for scores, which they are on other occasions.
        """
        training = self.payload_bytes.total() - self.evaluation_bytes.total()
        return training / len(self._client_rounds) if self._client_rounds else 0.0

    def _count_message(self, entry: dict[str, Any]) -> None:
        self.payload_bytes[entry["direction"]] += entry["payload_bytes"]
        self.framed_bytes[entry["direction"]] += entry["framed_bytes"]
        if entry["kind"] == EVALUATED:
            self.evaluation_bytes[entry["direction"]] += entry["payload_bytes"]
            return
        self._client_rounds.add((entry["round"], entry["client"]))

    def _count_memory(self, entry: dict[str, Any]) -> None:
        where = entry["where"]
        self.peak_memory_bytes[where] = max(self.peak_memory_bytes[where], entry["peak_bytes"])
        apart = self.peaks_by_device[where]
        apart |= {column: max(apart.get(column, 0), entry[column]) for column in COLUMNS if column in entry}
