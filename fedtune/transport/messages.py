"""Messages: what crosses between the server's and a client's side, and the local sockets that hand them on.

A message is a few fields and one flat run of bytes. A frame that is longer than a message may be travels in
parts; to a process of this machine it goes piece by piece from where its tensors lie. No pickle: fields are
JSON, and the rest is bytes.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from typing import cast

from isal.isal_zlib import crc32

from fedtune.core.temporary import temporary_folder
from fedtune.core.types import Frame
from fedtune.core.wire import empty_frame, pieces_of
from fedtune.errors import FederationError, foreign

Field = int | float | str | bool
PART_BYTES = 64 * 1024 * 1024  # of a frame in one message; Flower's own limit with a database is 256 MB
_LENGTH = struct.Struct("<Q")
_FIELDS_LIMIT = 1 << 20  # bytes of JSON in a socket: a message's fields may stand inside another's as text
HERE = "here"  # what a client is asked to see whether it is there, in the field `do`; it answers nothing
FOREIGN_LIMIT = 400 * 1024  # bytes of JSON of another party's fields: a configuration is the longest there is


@dataclass(frozen=True)
class Message:
    """One message between the two sides.

    Attributes:
        fields: What it is about. `fault` in an answer says why there is nothing else in it.
        body: A frame, or a part of one.
        state: What a simulated client keeps between rounds, as a frame; a real client keeps it itself.
    """

    fields: Mapping[str, Field] = field(default_factory=dict)
    body: Frame = b""
    state: bytes = b""

    def number(self, name: str) -> int:
        """A field that has to be a whole number of 0 or more.

        Raises:
            ValueError: It is missing or something else.
        """
        value = self.fields.get(name)
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} of a message must be a whole number, got {foreign(repr(value), 80)}")
        return value

    def text(self, name: str) -> str:
        """A field that has to be text. Raises ValueError if it is missing or something else."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise ValueError(f"{name} of a message must be text, got {foreign(repr(value), 80)}")
        return value


def checked(fields: Mapping[object, object], *parts: object) -> Message:
    """A message from what another party sent: its fields, body and state.

    Raises:
        ValueError: It is not one: fields are numbers, flags and text with short names, the rest is bytes.
    """
    taken: dict[str, Field] = {}
    for name, value in fields.items():
        if not isinstance(name, str) or len(name) > 80 or not isinstance(value, int | float | str):
            what = f"{foreign(str(name), 80)} of a message is {type(value).__name__}"
            raise ValueError(f"{what}; a field is a number, a flag or text under a short name")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{foreign(name, 80)} of a message is {value}")
        taken[name] = value
    if len(json.dumps(taken)) > FOREIGN_LIMIT:
        raise ValueError(f"the fields of a message are longer than {FOREIGN_LIMIT:,} bytes")
    if not all(isinstance(part, bytes) for part in parts):
        raise ValueError("the body of a message must be bytes")
    return Message(taken, *cast(tuple[bytes, ...], parts))


def of_part(part: bytes | memoryview) -> dict[str, Field]:
    """What a message says of the part of a frame that it holds: its CRC-32."""
    return {"crc": crc32(part)}


def is_whole(message: Message) -> bool:
    """Whether a part came as it was sent. The frame has a checksum too: one that says nothing is taken."""
    found = 0
    for piece in pieces_of(message.body, 0, len(message.body)):
        found = crc32(piece, found)
    return message.fields.get("crc", None) in (None, found)


def fault(reason: str) -> Message:
    """An answer that says why there is no other."""
    return Message({"fault": reason})


def broken(reason: str, traceback: str) -> Message:
    """An answer of a process of the run's own that cannot go on, nor could any other: the run has to end.

    Args:
        reason: One sentence.
        traceback: Where it came from, as Python shows it.
    """
    return Message({"broken": reason, "traceback": traceback})


def send(connection: Connection, message: Message) -> None:
    """Hands a message to the process at the other end."""
    connection.send_bytes(json.dumps(dict(message.fields)).encode())
    for frame in (message.body, message.state):
        connection.send_bytes(_LENGTH.pack(len(frame)))
        for piece in pieces_of(frame, 0, len(frame)):
            for at in range(0, len(piece), PART_BYTES):
                connection.send_bytes(piece[at : at + PART_BYTES])


def receive(connection: Connection) -> Message:
    """The next message of the process at the other end. Raises EOFError when there will be none.

    A long body is memory such as `decode` gives back as it reads it, and so can be decoded once.
    """
    fields = json.loads(connection.recv_bytes(_FIELDS_LIMIT))
    body = _received(connection)
    return Message(fields, body, bytes(_received(connection)))


def _received(connection: Connection) -> bytes | mmap.mmap:
    """The bytes that come, a piece at a time."""
    (size,) = _LENGTH.unpack(connection.recv_bytes(_LENGTH.size))
    frame, at = empty_frame(size), 0
    with memoryview(frame) as whole:
        while at < size:
            at += connection.recv_bytes_into(whole, at)
    return bytes(frame) if isinstance(frame, bytearray) else frame


@contextmanager
def listening() -> Iterator[tuple[Listener, str]]:
    """A local socket that this user alone can reach, and its address; gone at the end.

    Raises:
        FederationError: The folder for temporary files has too long a name for a socket.
    """
    with temporary_folder() as folder:
        path = str(folder / "socket")
        if len(os.fsencode(path)) > 100:
            raise FederationError(
                f"{path} is too long a name for a local socket; set TMPDIR to a shorter one"
            )
        with Listener(path, family="AF_UNIX") as listener:
            yield listener, path


def connect(address: str) -> Connection:
    """A connection to the process that listens at `address`. Raises OSError if there is none."""
    return Client(address, family="AF_UNIX")
