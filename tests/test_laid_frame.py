"""Frames that are not joined: the same bytes part by part, read from where the tensors lie."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedtune
from fedtune.core.laid_frame import LaidFrame
from fedtune.core.types import Arrival, Frame, Payload
from fedtune.core.wire import DTYPES, LONG, Content, FrameError, decode, encode, lay_out, meta_of, part_of
from fedtune.transport import messages
from fedtune.transport.in_process import InProcess
from fedtune.transport.messages import Message, is_whole, of_part, receive, send

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4)


def content(shapes: list[list[int]], dtypes: list[str], *, transposed: bool = False) -> Content:
    tensors = {}
    for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False)):
        tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(DTYPES[dtype])
        tensors[f"t{number}"] = tensor.T if transposed and tensor.ndim == 2 else tensor
    return Content(Payload(tensors, {"lr": 0.5}), {"round": 3})


@given(
    shapes=SHAPES,
    dtypes=st.lists(st.sampled_from(sorted(DTYPES)), min_size=4, max_size=4),
    transposed=st.booleans(),
    part=st.integers(1, 300),
)
def test_parts_of_any_length_are_the_frame(
    shapes: list[list[int]], dtypes: list[str], transposed: bool, part: int
) -> None:
    message = content(shapes, dtypes, transposed=transposed)
    laid, whole = lay_out(message), encode(message)
    assert len(laid) == len(whole) and bytes(laid) == whole
    parts = [laid.part(at, at + part) for at in range(0, len(laid), part)]
    assert b"".join(parts) == whole
    assert {len(one) for one in parts[:-1]} <= {part}
    assert meta_of(laid) == meta_of(whole) == {"round": 3}
    found, wanted = decode(laid).payload, decode(whole).payload
    assert found.scalars == wanted.scalars and list(found.tensors) == list(wanted.tensors)
    for name, tensor in found.tensors.items():
        assert tensor.dtype == wanted.tensors[name].dtype and tensor.shape == wanted.tensors[name].shape
        assert torch.equal(tensor, wanted.tensors[name])


def test_a_part_is_copied_and_what_is_laid_out_is_not() -> None:
    tensor = torch.zeros(8, dtype=torch.uint8)
    laid = lay_out(Content(Payload({"w": tensor})))
    before = laid.part(len(laid) - 8, len(laid))
    (piece,) = laid.pieces(len(laid) - 8, len(laid))
    tensor[0] = 7
    assert before == bytes(8) and bytes(piece) == b"\7" + bytes(7)
    assert part_of(laid, len(laid) - 8, len(laid)) == b"\7" + bytes(7)


def test_a_tensor_that_changed_before_it_was_sent_is_noticed() -> None:
    tensor = torch.zeros(8)
    laid = lay_out(Content(Payload({"w": tensor})))
    tensor[3] = 1
    for frame in (laid, bytes(laid)):
        with pytest.raises(FrameError, match="checksum does not match"):
            decode(frame)


def test_what_is_decoded_of_it_is_a_copy() -> None:
    tensor = torch.zeros(8)
    found = decode(lay_out(Content(Payload({"w": tensor})))).payload.tensors["w"]
    tensor.fill_(1)
    assert torch.equal(found, torch.zeros(8))


@pytest.mark.parametrize("size", [0, 5, LONG + 1])
def test_a_process_gets_the_frame_in_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PART_BYTES", 4 << 20)
    here, there = Pipe()
    laid = lay_out(Content(Payload({"w": torch.arange(size, dtype=torch.uint8)}), {"round": 2}))
    asked = Message({"client": 3}, laid, b"kept")
    with here, there, ThreadPoolExecutor(1) as pool:
        got = pool.submit(receive, there)
        send(here, asked)
        found = got.result()
    assert dict(found.fields) == {"client": 3} and found.state == b"kept"
    assert bytes(found.body) == bytes(laid)
    assert isinstance(found.body, mmap.mmap) == (size > LONG)  # which `decode` gives back as it reads it
    assert torch.equal(decode(found.body).payload.tensors["w"], torch.arange(size, dtype=torch.uint8))
    assert is_whole(Message(of_part(bytes(laid)), laid)) and not is_whole(Message({"crc": 1}, laid))


@pytest.mark.parametrize("method", ["fedavg", "fedkseed", "fedcybgd"])
def test_no_frame_of_a_run_in_process_is_joined(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[type] = []
    exchange = InProcess.exchange

    def noted(self: InProcess, round: int, frames: Any, *, in_plan_order: bool) -> Iterator[Arrival]:
        def orders() -> Iterator[tuple[int, Frame]]:
            for client, frame in frames:
                seen.append(type(frame))
                yield client, frame

        for arrival in exchange(self, round, orders(), in_plan_order=in_plan_order):
            seen.append(type(arrival.frame))
            yield arrival

    monkeypatch.setattr(InProcess, "exchange", noted)
    config = {
        "data": {"clients": 2, "max_examples": 4, "max_length": 32},
        "method": {"name": method, "rounds": 1},
        "evaluation": {"tasks": ["loss"], "every": 0},
    }
    fedtune.run(config, out=tmp_path / "run")
    assert seen == [LaidFrame] * 4  # two orders and two replies


MEMORY = """
import os, sys, tempfile
from pathlib import Path
import torch
from fedtune.core.types import Payload
from fedtune.core.wire import Content, decode, lay_out
from fedtune.measure.clock import Clock
from fedtune.transport import messages
from fedtune.transport.acceptance import Acceptance
from fedtune.transport.network import Invitation, RoundExchange
from fedtune.transport.remote import Remote
from fedtune.transport.worker import JoinedRun, Worker

SIZE = 160_000_000  # bytes of the tensors

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

class Watch:  # what this process had at most, of what the system counts; begins anew
    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self.before = resident()
        return self
    def __exit__(self, *error):
        status = Path("/proc/self/status").read_text()
        self.beyond = int(status.split("VmHWM:")[1].split()[0]) * 1024 - self.before

def tensors():
    return {f"layer.{i}": torch.full((SIZE // 64,), float(i)) for i in range(16)}

class Runner:  # reads its order, and answers with as much
    states, store = {}, None
    def handle(self, client, frame):
        held = decode(frame).payload.tensors
        return lay_out(Content(Payload(held), {"round": 1, "client": client}))

def serve(connection):
    folder = Path(tempfile.mkdtemp())
    worker = Worker(lambda fields: JoinedRun(Runner(), 1, "echo"), Acceptance(), folder, print)
    with Watch() as watch:
        try:
            while True:
                messages.send(connection, worker.answer(messages.receive(connection)))
        except EOFError:
            pass
    print("client", watch.beyond, flush=True)

class Post:
    def __init__(self, connection):
        self.connection, self.waiting = connection, {}
    def push(self, client, message, *, lifetime_s):
        messages.send(self.connection, message)
        return "it"
    def pull(self, ids):
        yield "it", messages.receive(self.connection)

from multiprocessing import Pipe
near, far = Pipe()
if os.fork() == 0:
    near.close()
    serve(far)
    os._exit(0)
far.close()
torch.set_num_threads(1)
sent = tensors()
exchange = RoundExchange(Invitation("ab12", "{}", ""), {0: 1}, {}, limit=lambda client: 2 * SIZE)
remote = Remote(Post(near), exchange, window=None, deadline_s=None, clock=Clock())
with Watch() as down:
    frames = [(0, lay_out(Content(Payload(sent), {"round": 1})))]
    (arrival,) = remote.exchange(1, frames, in_plan_order=False)
    assert not arrival.fault, arrival.fault
    back = decode(arrival.frame).payload.tensors
assert all(torch.equal(back[name], tensor) for name, tensor in sent.items())
near.close()
os.wait()
print("server", down.beyond, flush=True)
"""


def test_neither_side_has_more_than_the_tensors_and_some_parts(tmp_path: Path) -> None:
    """160 MB there and back between two processes: joined, a frame would be 160 MB more at either side."""
    script = tmp_path / "sides.py"
    script.write_text(MEMORY)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    beyond = {side: int(count) for side, count in map(str.split, done.stdout.splitlines()[-2:])}
    size, part = 160_000_000, 64 * 1024 * 1024
    # the server gets as much back as it sent; the client has its order, and answers with the same tensors
    # joined at both sides it is 298 MB and 199 MB
    assert beyond["server"] - size < 3 * part
    assert beyond["client"] - size < 2.5 * part
    assert min(beyond.values()) > size
