"""Frames that whoever holds a key can send: hostile content under a right checksum, and altered bytes.

By hand, a longer run than the test's: python tests/hostile_frames.py 10000000
"""

from __future__ import annotations

import json
import random
import sys
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress

import torch

from fedtune.core.types import Payload, TensorSpec
from fedtune.core.wire import HEADER, Content, FrameError, check, decode, encode, manifest_bytes

EXPECTS = {
    "layer.0.lora_A.weight": TensorSpec(torch.float32, (4, 8)),
    "seeds": TensorSpec(torch.int16, (None,)),
}
REPLY = encode(
    Content(
        Payload(
            {
                "layer.0.lora_A.weight": torch.ones(4, 8),
                "seeds": torch.arange(6, dtype=torch.int16),
            },
            {"crc32": 7},
        ),
        {"round": 3, "client": 1, "train_loss": 2.5, "peak_bytes": 1000, "how": "tensors held"},
    )
)
NUMBERS = [
    0,
    -1,
    1,
    8,
    2**31,
    2**47,
    2**48,
    2**63,
    2**64,
    10**400,
    -(10**400),
    1e308,
    -5e300,
    1.5,
    True,
    None,
]
TEXTS = [
    "",
    "a",
    "\ud800",
    "\x1b[2J",
    "é" * 3,
    "round",
    "client",
    "layer.0.lora_A.weight",
    "seeds",
    "x" * 5000,
]
DTYPES = ["F32", "I16", "F64", "BOOL", "PICKLE", "", 3, None]


def framed(manifest: bytes, data: bytes = b"", *, deflate: bool = False) -> bytes:
    """A frame with a right checksum around any manifest."""
    head = zlib.compress(manifest, 9) if deflate else manifest
    crc = zlib.crc32(head, zlib.crc32(HEADER.pack(b"FTUN", 1, deflate, len(head), len(data), 0)[5:18]))
    return HEADER.pack(b"FTUN", 1, deflate, len(head), len(data), zlib.crc32(data, crc)) + head + data


def costly() -> Iterator[tuple[str, bytes]]:
    """Frames under 64 kB that once cost seconds or gigabytes, and their like."""

    def tensors(text: str) -> bytes:
        return b'{"meta":{},"scalars":{},"tensors":[' + text.encode() + b"]}"

    yield "160,000 dimensions", framed(tensors(f'["a","F32",[{",".join(["1"] * 160_000)}]]'), deflate=True)
    yield "50,000 dimensions", framed(tensors(f'["a","F32",[{",".join(["1"] * 50_000)}]]'), deflate=True)
    yield "strides beyond 64 bits", framed(tensors(f'["a","F32",[0,{2**47},{2**47}]]'))
    yield "20 million lists", framed(tensors(",".join(["[]"] * 20_000_000)), deflate=True)
    yield "lists that fit", framed(tensors(",".join(["[]"] * 15_000)))
    many = ",".join(f'["{i:x}","U8",[0]]' for i in range(100_000))
    yield "100,000 empty tensors", framed(tensors(many), deflate=True)
    few = ",".join(f'["{i:x}","U8",[0]]' for i in range(3_800))
    yield "3,800 empty tensors", framed(tensors(few))
    yield "deep lists", framed(tensors("[" * 60_000))
    for name, value in (("digits", "9" * 60_000), ("exponent", "1e99999999"), ("zeros", "0" * 60_000)):
        yield name, framed(b'{"meta":{"a":' + value.encode() + b'},"scalars":{},"tensors":[]}')
    keys = ",".join(f'"{i:x}":0' for i in range(6_000))
    yield "6,000 scalars", framed(b'{"meta":{},"scalars":{' + keys.encode() + b'},"tensors":[]}')
    yield "zeros that inflate", framed(b" " * 50_000_000, deflate=True)
    yield "escapes", framed(b'{"meta":{"a":"' + b"\\u0000" * 10_000 + b'"},"scalars":{},"tensors":[]}')


def frames(count: int, seed: int = 0) -> Iterator[bytes]:
    """Random frames: altered bytes, and hostile manifests of which half have a right checksum."""
    draw = random.Random(seed)
    for number in range(count):
        kind = number % 4
        if kind == 0:
            yield _altered(bytearray(REPLY), draw)
        elif kind == 1:
            yield _altered(
                bytearray(framed(_manifest(draw), draw.randbytes(draw.choice([0, 12, 140])))), draw
            )
        else:
            data = draw.randbytes(draw.choice([0, 12, 140, 1000]))
            yield framed(_manifest(draw), data, deflate=draw.random() < 0.5)


def _altered(frame: bytearray, draw: random.Random) -> bytes:
    for _ in range(draw.randint(1, 4)):
        frame[draw.randrange(len(frame))] = draw.randrange(256)
    return bytes(frame[: draw.randrange(len(frame))] if draw.random() < 0.3 else frame)


def _manifest(draw: random.Random) -> bytes:
    def scalars() -> dict[str, object]:
        return {
            draw.choice(TEXTS): draw.choice([*NUMBERS, *TEXTS, [], {}]) for _ in range(draw.randint(0, 3))
        }

    def shape() -> object:
        return [draw.choice([4, 8, 6, *NUMBERS]) for _ in range(draw.choice([0, 1, 2, 2, 9]))]

    document: dict[str, object] = {
        "meta": {"round": 3, "client": 1, **scalars()},
        "scalars": scalars(),
        "tensors": [[draw.choice(TEXTS), draw.choice(DTYPES), shape()] for _ in range(draw.randint(0, 3))],
    }
    if draw.random() < 0.1:
        document[draw.choice(["meta", "tensors", "more"])] = draw.choice([[], {}, None, "x", [[[]]]])
    return json.dumps(document).encode()


def refused(frame: bytes) -> bool:
    """What a server does with a reply; any exception but a FrameError goes on."""
    try:
        check(decode(frame, max_bytes=1 << 20, max_manifest=manifest_bytes(EXPECTS)).payload, EXPECTS)
    except FrameError as error:
        str(error).encode()  # it must be possible to write it down
        return True
    return False


def cost(frame: bytes) -> tuple[float, int]:
    """Seconds of CPU, the least of three, and bytes at the peak, of decoding a frame with no other bounds."""
    seconds = []
    for _ in range(3):
        began = time.process_time()
        with suppress(FrameError):
            decode(frame)
        seconds.append(time.process_time() - began)
    tracemalloc.start()
    with suppress(FrameError):
        decode(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return min(seconds), peak


if __name__ == "__main__":
    for name, frame in costly():
        seconds, peak = cost(frame)
        print(f"{name:24} {len(frame):8,} bytes {1e3 * seconds:8.2f} ms {peak / 1e6:8.2f} MB")
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    worst, began, through = 0.0, time.perf_counter(), 0
    for frame in frames(total):
        start = time.process_time()
        through += not refused(frame)
        worst = max(worst, time.process_time() - start)
    took = time.perf_counter() - began
    print(f"{total:,} frames, {through:,} taken, worst {1e3 * worst:.1f} ms, {took:.0f} s")
