"""The frame: exact bytes, every dtype, and no cut, altered or random frame that crashes or passes."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch
from hostile_frames import EXPECTS, REPLY, cost, costly, framed, frames, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.types import Payload, TensorSpec
from fedtune.core.wire import DTYPES, HEADER, Content, FrameError, check, decode, encode, manifest_bytes

EXAMPLE = Content(
    Payload(
        {"b": torch.tensor([1.5, -2.0]), "a": torch.tensor([[1, 2]], dtype=torch.int64)}, {"k": 3, "on": True}
    ),
    {"round": 2},
)


def test_bytes_of_a_frame_worked_out_by_hand() -> None:
    frame = encode(Content(Payload({"x": torch.tensor([1.0, 2.0])})))
    manifest = b'{"meta":{},"scalars":{},"tensors":[["x","F32",[2]]]}'
    deflated = zlib.compress(manifest, 9)
    head, flag = (deflated, 1) if len(deflated) < len(manifest) else (manifest, 0)
    data = struct.pack("<2f", 1.0, 2.0)
    crc = zlib.crc32(struct.pack("<BIQ", flag, len(head), 8) + head + data)
    assert frame == b"FTUN" + struct.pack("<BBIQI", 1, flag, len(head), 8, crc) + head + data


def test_payload_bytes_count_content_alone() -> None:
    # 2 float32 + 2 int64 + an int of 4 + a flag of 1
    assert EXAMPLE.payload.nbytes == 2 * 4 + 2 * 8 + 4 + 1
    assert Payload({}, {"name": "añ", "x": 0.5}).nbytes == 3 + 4


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_with_the_same_bits(name: str) -> None:
    raw = (
        torch.arange(48, dtype=torch.uint8).remainder(2)
        if name == "BOOL"
        else torch.arange(48, dtype=torch.uint8)
    )
    tensor = raw.view(DTYPES[name]).reshape(2, -1)
    back = decode(encode(Content(Payload({"t": tensor, "empty": tensor[:0]})))).payload.tensors
    assert back["t"].dtype == tensor.dtype and back["t"].shape == tensor.shape
    assert torch.equal(back["t"].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert back["empty"].shape == tensor[:0].shape


def test_views_and_order_do_not_change_a_frame() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    one = Content(Payload({"a": whole.T, "b": whole[:, 1]}))
    two = Content(Payload({"b": whole[:, 1].clone(), "a": whole.T.contiguous()}))
    assert encode(one) == encode(two)
    assert torch.equal(decode(encode(one)).payload.tensors["a"], whole.T)


def test_what_comes_back_does_not_share_the_frames_memory() -> None:
    frame = bytearray(encode(EXAMPLE))
    back = decode(frame)
    frame[-16:] = bytes(16)
    assert back.payload.tensors["b"].tolist() == [1.5, -2.0]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode(data)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(encode(EXAMPLE)) - 1))
def test_a_cut_frame_is_refused(length: int) -> None:
    with pytest.raises(FrameError):
        decode(encode(EXAMPLE)[:length])


@settings(max_examples=500, deadline=None)
@given(st.integers(0, len(encode(EXAMPLE)) - 1), st.integers(1, 255))
def test_an_altered_byte_is_refused(at: int, change: int) -> None:
    frame = bytearray(encode(EXAMPLE))
    frame[at] ^= change
    with pytest.raises(FrameError):
        decode(frame)


def _forged(manifest: bytes, data: bytes = b"", flags: int = 0) -> bytes:
    crc = zlib.crc32(struct.pack("<BIQ", flags, len(manifest), len(data)) + manifest + data)
    return HEADER.pack(b"FTUN", 1, flags, len(manifest), len(data), crc) + manifest + data


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["meta", "scalars", "tensors", "x"]), inner, max_size=4)
        ),
        max_leaves=12,
    ),
    st.binary(max_size=16),
)
def test_a_manifest_with_a_right_checksum_still_has_to_make_sense(document: object, data: bytes) -> None:
    import json

    try:
        message = decode(_forged(json.dumps(document).encode(), data))
    except FrameError:
        return
    assert sum(t.nbytes for t in message.payload.tensors.values()) == len(data)


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (b'{"meta":{},"scalars":{},"tensors":[["x","F32",[9000000000]]]}', "needs more bytes"),
        (b'{"meta":{},"scalars":{},"tensors":[["x","F32",[-1]]]}', "name, dtype and shape"),
        (b'{"meta":{},"scalars":{},"tensors":[["x","PICKLE",[1]]]}', "name, dtype and shape"),
        (b'{"meta":{},"scalars":{},"tensors":[["x","F32",[0]],["x","F32",[0]]]}', "one name"),
        (b'{"meta":{},"scalars":{"a":[1]},"tensors":[]}', "a number, a flag or text"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
    ],
)
def test_forged_manifests_are_refused_by_name(manifest: bytes, says: str) -> None:
    with pytest.raises(FrameError, match=says):
        decode(_forged(manifest))


def test_a_manifest_that_inflates_without_end_is_refused() -> None:
    bomb = zlib.compress(b" " * (65 * 1024 * 1024), 9)
    with pytest.raises(FrameError, match="longer than"):
        decode(_forged(bomb, flags=1))


def test_too_long_and_foreign_frames() -> None:
    frame = encode(EXAMPLE)
    with pytest.raises(FrameError, match=f"frame of {len(frame)} bytes; at most 50"):
        decode(frame, max_bytes=50)
    with pytest.raises(FrameError, match="version 9"):
        decode(frame[:4] + b"\x09" + frame[5:])
    with pytest.raises(FrameError, match="belong to no tensor"):
        decode(_forged(b'{"meta":{},"scalars":{},"tensors":[]}', b"abc"))


F32 = TensorSpec(torch.float32, (2,))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "missing x"),
        ({"x": torch.zeros(2), "y": torch.zeros(1)}, "not asked for y"),
        ({"x": torch.zeros(3)}, r"shape \(3,\)"),
        ({"x": torch.zeros(2, 1)}, r"shape \(2, 1\)"),
        ({"x": torch.zeros(2, dtype=torch.float64)}, "float64"),
        ({"x": torch.tensor([0.0, float("nan")])}, "tensor x holds NaN or infinite"),
        ({"x": torch.tensor([0.0, float("inf")])}, "tensor x holds NaN or infinite"),
        ({"x": torch.tensor([0.0, -300.0])}, "values of 256 or more"),
    ],
)
def test_a_payload_is_held_to_the_order(tensors: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(FrameError, match=says):
        check(Payload(tensors), {"x": TensorSpec(torch.float32, (2,), limit=256.0)})


def test_values_below_the_least_are_refused() -> None:
    expects = {"x": TensorSpec(torch.int32, (2,), limit=8, at_least=0)}
    check(Payload({"x": torch.tensor([0, 7], dtype=torch.int32)}), expects)
    with pytest.raises(FrameError, match="tensor x holds values below 0"):
        check(Payload({"x": torch.tensor([0, -1], dtype=torch.int32)}), expects)


def test_an_open_dimension_may_have_any_length() -> None:
    for n in (0, 1, 7):
        check(Payload({"x": torch.zeros(n, 3)}), {"x": TensorSpec(torch.float32, (None, 3))})
    with pytest.raises(FrameError):
        check(Payload({"x": torch.zeros(2, 4)}), {"x": TensorSpec(torch.float32, (None, 3))})
    with pytest.raises(FrameError, match="scalar loss is nan"):
        check(Payload({}, {"loss": float("nan")}), {})


def test_an_unsendable_dtype_is_named() -> None:
    with pytest.raises(TypeError, match=r"tensor z: torch\.complex64"):
        encode(Content(Payload({"z": torch.zeros(1, dtype=torch.complex64)})))


def test_framing_of_a_lora_update_is_under_one_percent() -> None:
    # 4 layers of width 128, rank 16, query and value: what one client of the bundled model sends
    tensors = {
        f"model.layers.{layer}.self_attn.{part}_proj.lora_{factor}.weight": torch.randn(16, 128)
        for layer in range(4)
        for part in "qv"
        for factor in "AB"
    }
    payload = Payload(tensors)
    frame = encode(Content(payload, {"train_loss": 1.2345678901234, "steps": 60, "round": 1, "client": 7}))
    assert len(frame) - payload.nbytes < 0.01 * payload.nbytes


FORGED = {
    "a tensor whose strides pass 64 bits": b'{"meta":{},"scalars":{},"tensors":[["a","F32",[0,%d,%d]]]}'
    % (2**47, 2**47),
    "nine dimensions": b'{"meta":{},"scalars":{},"tensors":[["a","F32",[1,1,1,1,1,1,1,1,1]]]}',
    "a tensor's name": b'{"meta":{},"scalars":{},"tensors":[["\\ud800","F32",[0]]]}',
    "a metric of 400 digits": b'{"meta":{"train_loss":1' + b"0" * 400 + b'},"scalars":{},"tensors":[]}',
    "a scalar that is no text": b'{"meta":{},"scalars":{"a":"\\ud800"},"tensors":[]}',
    "a scalar's name": b'{"meta":{},"scalars":{"\\udfff":1},"tensors":[]}',
    "an infinite measure": b'{"meta":{"peak_bytes":1e999},"scalars":{},"tensors":[]}',
    "no number": b'{"meta":{"peak_bytes":NaN},"scalars":{},"tensors":[]}',
    "null": b'{"meta":{"how":null},"scalars":{},"tensors":[]}',
}


@pytest.mark.parametrize("manifest", FORGED.values(), ids=FORGED)
def test_hostile_content_under_a_right_checksum_is_refused(manifest: bytes) -> None:
    with pytest.raises(FrameError) as caught:
        decode(framed(manifest))
    str(caught.value).encode()  # can be written to a log


def test_a_hundred_thousand_hostile_frames_raise_frame_errors_alone() -> None:
    taken = [frame for frame in frames(100_000) if not refused(frame)]
    # what passes is an order's reply in form: no forged manifest names both tensors with their shapes by luck
    for frame in taken:
        assert set(decode(frame).payload.tensors) == set(EXPECTS)
    assert len(taken) < 100
    assert not refused(REPLY)


@pytest.mark.parametrize("frame", [pytest.param(frame, id=name) for name, frame in costly()])
def test_no_short_frame_costs_more_than_it_is_long(frame: bytes) -> None:
    seconds, peak = cost(frame)  # of the processor's time, which other programs do not lengthen
    assert seconds < 0.05 and peak < 10e6


def test_a_manifest_is_as_long_as_the_order_needs_and_no_longer() -> None:
    expects = {f"model.layers.{i}.ü.lora_A.weight": TensorSpec(torch.float64, (1,) * 8) for i in range(300)}
    payload = Payload({name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in expects.items()})
    frame = encode(Content(payload, {"round": 2**62, "client": 2**62, "train_loss": -1 / 3, "how": "x" * 60}))
    limit = manifest_bytes(expects)
    check(decode(frame, max_manifest=limit).payload, expects)
    with pytest.raises(FrameError, match=r"longer than the 8,192 bytes"):
        decode(frame, max_manifest=manifest_bytes({}))


def test_names_that_deflate_too_well_travel_as_they_are() -> None:
    names = [f"{'the same long name ' * 40}{i}" for i in range(500)]  # 380 kB that deflate to a few
    frame = encode(Content(Payload({name: torch.zeros(0) for name in names})))
    assert len(frame) > 380_000
    assert list(decode(frame).payload.tensors) == sorted(names)
