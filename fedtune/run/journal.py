"""Replies of the round in progress, kept on disk, so that a killed run does not train them again.

One-shot fine-tuning has one long round; without this, a kill at its end would lose all of it. Each
arrival is appended as it comes. A tail that was cut by the kill fails its checksum and is dropped.
Resumed, the round first folds in what is kept, in its old order, and then goes on.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, MutableMapping
from itertools import chain
from pathlib import Path

from fedtune.core.loop import Arrival, Transport
from fedtune.core.types import Payload
from fedtune.core.wire import Message, decode, encode
from fedtune.run.files import disk_errors

_ENTRY = struct.Struct("<qQQQI")  # client, bytes of fault, reply, state; CRC-32 of the three


class Journal:
    """A transport that writes down what another transport brings.

    Args:
        inner: The transport that reaches the clients.
        folder: Where the journal of the round lies.
        states: What clients keep between rounds, where it is this process that keeps it.
    """

    def __init__(self, inner: Transport, folder: Path, states: MutableMapping[int, Payload]) -> None:
        self._inner, self._folder, self._states = inner, folder, states

    def exchange(
        self, round: int, frames: Iterable[tuple[int, bytes]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        """First the arrivals kept from before a kill, then new ones, each written before it is yielded."""
        kept = self._read(round)
        waiting = dict(kept)
        frames, others = iter(frames), []
        while waiting:
            client, frame = next(frames)
            if waiting.pop(client, None) is None:
                others.append((client, frame))
        for client, (arrival, state) in kept.items():
            if state is not None:
                self._states[client] = state
            yield arrival
        for arrival in self._inner.exchange(round, chain(others, frames), in_plan_order=in_plan_order):
            self._write(round, arrival)
            yield arrival

    def clear(self) -> None:
        """Forgets the rounds: their checkpoint is written."""
        for path in self._folder.glob("round-*.replies"):
            path.unlink()

    def _path(self, round: int) -> Path:
        return self._folder / f"round-{round:04d}.replies"

    def _write(self, round: int, arrival: Arrival) -> None:
        state = self._states.get(arrival.client)
        parts = (arrival.fault.encode(), arrival.frame, encode(Message(state)) if state is not None else b"")
        with disk_errors(f"the reply of client {arrival.client}"), self._path(round).open("ab") as file:
            file.write(_ENTRY.pack(arrival.client, *map(len, parts), zlib.crc32(b"".join(parts))))
            for part in parts:
                file.write(part)

    def _read(self, round: int) -> dict[int, tuple[Arrival, Payload | None]]:
        path = self._path(round)
        if not path.exists():
            return {}
        kept: dict[int, tuple[Arrival, Payload | None]] = {}
        data, at = path.read_bytes(), 0
        while at + _ENTRY.size <= len(data):
            client, *lengths, crc = _ENTRY.unpack_from(data, at)
            body = data[at + _ENTRY.size : at + _ENTRY.size + sum(lengths)]
            if len(body) < sum(lengths) or zlib.crc32(body) != crc:
                break
            fault, frame = body[: lengths[0]].decode(), body[lengths[0] : lengths[0] + lengths[1]]
            state = body[lengths[0] + lengths[1] :]
            kept[client] = (Arrival(client, frame, fault), decode(state).payload if state else None)
            at += _ENTRY.size + len(body)
        with path.open("r+b") as file:
            file.truncate(at)
        return kept
