"""Replies of the round in progress, kept on disk, so that a killed run does not train them again.

One-shot fine-tuning has one long round; without this, a kill at its end would lose all of it. Each
arrival is appended as it comes. A tail that was cut by the kill fails its checksum and is dropped.
Resumed, the round first folds in what is kept, in its old order, and then goes on. Each entry tells how
many orders had been sent when it came, so that the ledger's lines fall in their old order too. A round whose
clients come in turn has an exchange for each of them; an entry says which it belongs to. It holds what each
client sent, so only the user can read it.

Writing costs time and room: a reply of all weights is as long as the model. Where the clients are of this
run, they can train once more, and in `auto` they do where that costs less than `WORTH_S`, as the round before
tells: then nothing is written, and a round that is run again for another reason asks them again, with what
they kept before it. The bits are the same.

An arrival is written before anybody has looked into it, so that a reply that ends the server would be met
again. None does: decoding raises nothing but a FrameError, and what the round refused once it refuses again.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections import Counter
from collections.abc import Iterable, Iterator, MutableMapping
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from isal.isal_zlib import crc32

from fedtune.config.schema import RunConfig
from fedtune.core.permissions import append_private
from fedtune.core.types import Arrival, Frame, Payload, Transport
from fedtune.core.wire import Content, FrameError, decode, encode, pieces_of
from fedtune.errors import foreign
from fedtune.federation.files import disk_errors

log = logging.getLogger("fedtune")

# exchange of the round, client, orders sent so far, bytes of fault, reply, state; their CRC-32
_ENTRY = struct.Struct("<QqQQQQI")


WORTH_S = 30.0  # seconds of a round from which on its replies are worth their room on disk


Written = Literal["auto", "always", "never"]


def written(config: RunConfig) -> Written:
    """`checkpoints.journal`; always, where a client is not of this run or would not reply the same again."""
    federation = config.federation
    strict = config.transport.name == "flower" or federation.secure_aggregation or federation.privacy
    return "always" if strict else config.checkpoints.journal


class Journal:
    """A transport that writes down what another transport brings.

    Args:
        inner: The transport that reaches the clients.
        folder: Where the journal of the round lies.
        states: What clients keep between rounds, where it is this process that keeps it.
        keep: Which rounds' replies are written: all, none, or (auto) the first's, and those after a round of
            `WORTH_S` seconds. But for `always`, clients must answer an order that comes again as before.
    """

    def __init__(
        self,
        inner: Transport,
        folder: Path,
        states: MutableMapping[int, Payload],
        keep: Written = "always",
    ) -> None:
        self._inner, self._folder, self._states, self._keep = inner, folder, states, keep
        self._exchanges = Counter[int]()  # of each round, so far
        self._began, self._took = 0.0, WORTH_S  # this round, the round before; seconds
        self._before: dict[int, Payload] = {}  # what clients kept before this round

    def exchange(
        self, round: int, frames: Iterable[tuple[int, Frame]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        """First the arrivals kept from before a kill, then new ones, each written before it is yielded."""
        if not self._exchanges:
            self._began, self._before = time.monotonic(), dict(self._states)
        sent, turn = 0, self._exchanges[round]
        self._exchanges[round] += 1

        def counted() -> Iterator[tuple[int, Frame]]:
            nonlocal sent
            for order in frames:
                sent += 1
                yield order

        orders, unanswered = counted(), dict[int, Frame]()
        for sent_before, arrival, state in self.kept(round, turn):
            unanswered.update(islice(orders, sent_before - sent))
            unanswered.pop(arrival.client, None)
            if state is not None:
                self._states[arrival.client] = state
            yield arrival
        rest = chain(unanswered.items(), orders)
        for arrival in self._inner.exchange(round, rest, in_plan_order=in_plan_order):
            if self._writes:
                self._write(round, turn, sent, arrival)
            given = [arrival]
            del arrival  # whoever takes it decides how long its frame is in memory
            yield given.pop()

    def again(self, round: int, behind: int = 0) -> None:
        """Lets a round be run once more from the replies that are kept, or by who gave them.

        Args:
            round: Which.
            behind: Exchanges that went before it and are not made again.
        """
        del self._exchanges[round]
        if behind:
            self._exchanges[round] = behind
        self._states.clear()
        self._states.update(self._before)

    @property
    def _writes(self) -> bool:
        return self._keep == "always" or (self._keep == "auto" and self._took >= WORTH_S)

    def clear(self) -> None:
        """Forgets the rounds: their checkpoint is written, or they are to be asked again."""
        for path in self._folder.glob("round-*.replies"):
            path.unlink()
        if self._exchanges:
            self._took = time.monotonic() - self._began
        self._exchanges.clear()

    def _path(self, round: int) -> Path:
        return self._folder / f"round-{round:04d}.replies"

    def _write(self, round: int, turn: int, sent: int, arrival: Arrival) -> None:
        state = self._states.get(arrival.client)
        parts: tuple[Frame, ...] = (
            foreign(arrival.fault).encode(),
            arrival.frame,
            encode(Content(state)) if state is not None else b"",
        )
        with disk_errors(f"the reply of client {arrival.client}"), append_private(self._path(round)) as file:
            crc = 0
            for piece in (piece for part in parts for piece in pieces_of(part, 0, len(part))):
                crc = crc32(piece, crc)
            file.write(_ENTRY.pack(turn, arrival.client, sent, *map(len, parts), crc))
            for piece in (piece for part in parts for piece in pieces_of(part, 0, len(part))):
                file.write(piece)

    def kept(self, round: int, turn: int) -> Iterator[tuple[int, Arrival, Payload | None]]:
        """The whole entries of an exchange, one in memory at a time; what follows all entries is cut off."""
        path = self._path(round)
        if not path.exists():
            return
        with path.open("r+b") as file:
            end, size = 0, path.stat().st_size
            while len(head := file.read(_ENTRY.size)) == _ENTRY.size:
                of, client, sent, *lengths, crc = _ENTRY.unpack(head)
                if sum(lengths) > size - end - _ENTRY.size:
                    break
                if of < turn:  # folded in already, and its checksum held
                    end = file.seek(sum(lengths), os.SEEK_CUR)
                    continue
                body = file.read(sum(lengths))
                if crc32(body) != crc:
                    break
                if of > turn:
                    return
                try:
                    fault, state = body[: lengths[0]].decode(), body[lengths[0] + lengths[1] :]
                    kept = decode(state).payload if state else None
                except (UnicodeDecodeError, FrameError):
                    break
                end = file.tell()
                yield sent, Arrival(client, body[lengths[0] : lengths[0] + lengths[1]], fault), kept
            if end < size:
                log.warning(
                    "round %d: the last %s bytes of %s are cut short or damaged; whose they are is asked",
                    round,
                    f"{size - end:,}",
                    path.name,
                )
            file.truncate(end)
