"""A client's side of a federation over a network: the process that stays and holds the model.

Every message from the server reaches it through a short-lived process of the transport, over a local socket.
It knows one run at a time. What it has to remember if it is killed lies in its folder: the invitation to
the run, what the method keeps between rounds (of the newest rounds, because a server that was killed goes on
from its checkpoint), and what the client was sent to hold.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from isal.isal_zlib import crc32

from fedtune.core.client import ClientRunner
from fedtune.core.faults import faults
from fedtune.core.store import Store, digests_in
from fedtune.core.types import ClientError, Frame, Payload
from fedtune.core.wire import Content, FrameError, decode, empty_frame, encode, part_of
from fedtune.errors import InputError, ProgramError
from fedtune.transport.acceptance import Acceptance, NotAccepted, check_bytes
from fedtune.transport.messages import HERE, PART_BYTES, Field, Message, fault, is_whole, of_part

EVERY_S = 60.0  # between two lines of an order's steps
KEPT_ROUNDS = 3  # of what the method keeps: the newest is the server's, or its checkpoint's one before


@dataclass(frozen=True)
class JoinedRun:
    """A run that this client takes part in.

    Attributes:
        runner: Does its orders.
        examples: How many examples it trains on.
        method: The method's name, for the log.
        notes: What else the log says: what was cut of its examples.
    """

    runner: ClientRunner
    examples: int
    method: str
    notes: tuple[str, ...] = ()


@dataclass
class _Incoming:
    """The parts of an order so far."""

    round: int
    buffer: bytearray | mmap.mmap
    at: int = 0


@dataclass(frozen=True)
class _Done:
    """The newest order's reply: parts are fetched from it, and the same order once more gets it again."""

    round: int
    order_crc: int
    state_before: int
    reply: Frame
    state: int


class Worker:
    """Answers the server's messages.

    Args:
        join: (invitation's fields) -> the run; raises NotAccepted, or InputError for what is wrong here.
        acceptance: The operator's limits.
        folder: Where what must outlive this process is kept; made when it is needed.
        log_line: Gets a line for everything that a person wants to see.
    """

    def __init__(
        self,
        join: Callable[[Mapping[str, Field]], JoinedRun],
        acceptance: Acceptance,
        folder: Path,
        log_line: Callable[[str], None],
    ) -> None:
        self._join, self._acceptance, self._folder, self._log_line = join, acceptance, folder, log_line
        self.broken: ProgramError | None = None  # whoever runs it ends with it, once the answer is sent
        self._run, self._client = "", -1
        self.joined: JoinedRun | None = None
        self._incoming: _Incoming | None = None
        self._done: _Done | None = None
        self._told = 0.0  # when its log had a line of its steps

    def answer(self, message: Message) -> Message:
        """The answer to a message. Whatever goes wrong becomes an answer that says so.

        What this machine's own files say stays here: of errors that may name them only the kind is told.
        After a fault of the program or the machine `broken` is set: the next order would end in the same way.
        """
        try:
            with faults("answering the server", passing=(NotAccepted, ClientError, ValueError)):
                do = message.text("do")
                if do == HERE:
                    return Message({})
                if do == "join":
                    return self._invited(message.fields)
                if not self._knows(message.text("run")):
                    return Message({"unknown": True})
                return self._order(message) if do == "order" else self._fetch(message)
        except (NotAccepted, ClientError, ValueError) as error:  # a FrameError is one
            self._log_line(f"left out: {error}")
            return fault(str(error))
        except InputError as error:
            self._log_line(str(error))
            return fault("it cannot take part as it is set up; its own log says why")
        except ProgramError as error:
            self.broken = error
            return fault(f"it failed: {type(error.__cause__ or error).__name__}; its own log says more")

    def _invited(self, fields: Mapping[str, Field]) -> Message:
        self._take(fields)
        assert self.joined is not None
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "run.json", json.dumps(dict(fields)).encode())
        self._log_line(f"joined run {self._run} ({self.joined.method}) with {self.joined.examples} examples")
        for note in self.joined.notes:
            self._log_line(note)
        return Message({"examples": self.joined.examples})

    def _knows(self, run: str) -> bool:
        """Whether this client has joined a run, if need be as its folder remembers it."""
        if self.joined is not None and self._run == run:
            return True
        path = self._folder / "run.json"
        if not path.is_file():
            return False
        try:
            fields = json.loads(path.read_bytes())
            if fields["run"] != run:
                return False
        except (ValueError, KeyError, TypeError):
            return False  # as good as not there: the server invites it again
        self._take(fields)
        return True

    def _take(self, fields: Mapping[str, Field]) -> None:
        message = Message(fields)
        run, client = message.text("run"), message.number("client")
        if not re.fullmatch(r"[0-9a-f]{1,64}", run):
            raise ValueError("a run's name must be hexadecimal")  # it becomes a folder's name
        if self.joined is None or (run, client) != (self._run, self._client):
            self.joined = None  # frees the model of the run before
        with faults("joining the run", passing=(NotAccepted, ValueError)):
            self.joined = self._join(fields)
        for old in self._folder.glob("*/"):
            if old.name != run and re.fullmatch(r"[0-9a-f]{1,64}", old.name):
                shutil.rmtree(old)  # of a run before this one
        self._run, self._client = run, client
        self.joined.runner.store = Store(self._states() / "held")
        self._incoming = self._done = None

    def _order(self, message: Message) -> Message:
        round, size, at = message.number("round"), message.number("bytes"), message.number("at")
        if at == 0:
            check_bytes(self._acceptance, size, "order")
            if self._done is not None and self._done.round != round:
                self._done = None  # a long reply is not kept beside a long order
            try:
                self._incoming = _Incoming(round, empty_frame(size))
            except (MemoryError, OSError, OverflowError):  # what the server says is not this machine's fault
                raise ValueError(f"it has no room for an order of {size:,} bytes") from None
        incoming, end = self._incoming, at + len(message.body)
        if incoming is None and self._done is not None and self._done.round == round and end == size:
            return self._answer(self._done)  # the last part, once more: its answer was lost
        if incoming is None or incoming.round != round:
            return Message({"at": 0})  # this process was started anew between two parts
        if 0 < end <= incoming.at or incoming.at != at or not is_whole(message):
            return Message({"at": incoming.at})  # there already, or not what comes next: that is asked for
        if end > len(incoming.buffer):
            raise ValueError(f"the order of round {round} is longer than it said")
        incoming.buffer[at:end] = part_of(message.body, 0, len(message.body))
        incoming.at = end
        if end < len(incoming.buffer):
            return Message({"at": end})
        self._incoming = None
        return self._train(round, incoming.buffer, message.number("state"))

    def _train(self, round: int, frame: bytearray | mmap.mmap, state: int) -> Message:
        crc, done = crc32(frame), self._done
        if done is None or (done.round, done.order_crc, done.state_before) != (round, crc, state):
            assert self.joined is not None
            runner, client = self.joined.runner, self._client
            before = self._load_state(state)
            runner.states = {client: before} if before is not None else {}
            self._done = None
            self._log_line(f"round {round}: order of {len(frame):,} bytes")
            began = self._told = time.monotonic()
            runner.on_step = self._stepped
            reply = runner.handle(client, frame)
            check_bytes(self._acceptance, len(reply), "reply")
            now = runner.states.get(client)
            kept = state if before is not None else 0
            if now is not None and now is not before:
                kept = max(round, 1)  # 0 says that nothing is; masked scores are asked for in round 0 too
                self._save_state(kept, now)
            self._done = done = _Done(round, crc, state, reply, kept)
            took = time.monotonic() - began
            self._log_line(f"round {round}: reply of {len(reply):,} bytes after {took:.2f} s")
        return self._answer(done)

    def _stepped(self, client: int, done: int, total: int) -> None:
        """Says how far an order's training is, a line a minute."""
        if time.monotonic() - self._told >= EVERY_S:
            self._told = time.monotonic()
            self._log_line(f"step {done} of {total}")

    def _answer(self, done: _Done) -> Message:
        fields: dict[str, Field] = {"bytes": len(done.reply), "state": done.state}
        part = part_of(done.reply, 0, PART_BYTES)
        return Message({**fields, **of_part(part)}, part)

    def _fetch(self, message: Message) -> Message:
        round, at = message.number("round"), message.number("at")
        if self._done is None or self._done.round != round:
            return Message({"gone": True})  # this process was started anew
        part = part_of(self._done.reply, at, at + PART_BYTES)
        return Message(of_part(part), part)

    def _states(self) -> Path:
        return self._folder / self._run

    def _load_state(self, round: int) -> Payload | None:
        """What the method kept after a round; None if it kept nothing, or it is lost."""
        if round == 0:
            return None
        path = self._states() / f"round-{round:06d}"
        try:
            return decode(path.read_bytes()).payload
        except (OSError, FrameError):
            self._log_line(f"what the method kept after round {round} is lost; it goes on without")
            return None

    def _save_state(self, round: int, state: Payload) -> None:
        folder = self._states()
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"round-{round:06d}", encode(Content(state)))
        for old in sorted(folder.glob("round-*"))[:-KEPT_ROUNDS]:
            if old.name != f"round-{round:06d}":  # a run that was rolled back has newer ones
                old.unlink()
        if self.joined is not None and digests_in([state.scalars]):
            rounds = [int(path.name.removeprefix("round-")) for path in folder.glob("round-*")]
            kept = [found.scalars for found in map(self._load_state, rounds) if found is not None]
            self.joined.runner.store.retain(digests_in(kept))


def _write(path: Path, content: bytes) -> None:
    """Writes a file whole, for this user alone."""
    new = path.with_name(f".{path.name}.new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    os.replace(new, path)
