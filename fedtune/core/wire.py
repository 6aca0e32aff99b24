"""Frames, content as bytes: encoded once, counted once, checked before anything in it is believed.

A frame is

    magic 4 | version 1 | flags 1 | manifest length 4 | tensor length 8 | CRC-32 4      (22 bytes)
    manifest: JSON {"meta", "scalars", "tensors": [[name, dtype, shape], ...]}, deflated if that is shorter
    tensors:  contiguous little-endian data, widest dtype first, then by name (safetensors' order)

The checksum covers the flags, both lengths and everything behind the header. The manifest is JSON and
the dtypes are safetensors' names, so any language can read a frame; bfloat16 travels as it is.

A checksum is no proof of good will: whoever may send can compute it. What a frame costs its receiver is
therefore bounded by its own length, and by what was asked for, before any of it is worked through.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from isal.isal_zlib import crc32  # as zlib's, in a seventh of the time
from torch import Tensor

from fedtune.core.laid_frame import LaidFrame
from fedtune.core.one_pass import extremes
from fedtune.core.types import Frame, Payload, Scalar, TensorSpec

MAGIC = b"FTUN"
VERSION = 1
HEADER = struct.Struct("<4sBBIQI")
_COVERED = struct.Struct("<BIQ")  # the header's fields under the checksum
_DEFLATED = 1
MANIFEST_LIMIT = 16 * 1024 * 1024  # bytes after inflating, of any frame
MANIFEST_FREE = 128 * 1024  # bytes after inflating that any frame may have; more only as it is itself longer
MANIFEST_RATIO = 4  # bytes after inflating for each byte of the frame
RANK_LIMIT = 8  # dimensions of a tensor
SIZE_LIMIT = 2**48  # product of a shape, where a length of 0 counts as 1

LONG = 16 * 1024 * 1024  # bytes of a frame from which on it matters whether it is in memory twice


DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FrameError(ValueError):
    """A frame or its content is not what it has to be. The message says what and what was wanted."""


@dataclass(frozen=True)
class Content:
    """A decoded frame. `meta` is bookkeeping (round, client, metrics) and not counted as payload."""

    payload: Payload
    meta: Mapping[str, Scalar] = field(default_factory=dict)


def encode(content: Content) -> bytes:
    """The frame of a content; the same content gives the same bytes.

    Raises:
        TypeError: A tensor's dtype has no name on the wire.
    """
    return bytes(lay_out(content))


def lay_out(content: Content) -> LaidFrame:
    """The same frame, whose tensors are not copied: they must not change until it is sent or decoded.

    Raises:
        TypeError: As `encode`.
    """
    names, flags, head, length = _planned(content)
    data = [content.payload.tensors[name] for name in names]
    crc = crc32(head, crc32(_COVERED.pack(flags, len(head), length)))
    for piece in LaidFrame(b"", data).pieces(0, length):
        crc = crc32(piece, crc)
    return LaidFrame(HEADER.pack(MAGIC, VERSION, flags, len(head), length, crc) + head, data)


def frame_bytes(content: Content) -> int:
    """How long its frame is; tensors need no numbers.

    Raises:
        TypeError: As `encode`.
    """
    _, _, head, length = _planned(content)
    return HEADER.size + len(head) + length


def _planned(content: Content) -> tuple[list[str], int, bytes, int]:
    """The tensors' names in order, the flags, what stands before the tensors, and the bytes of these."""
    tensors = content.payload.tensors
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in names:
        if tensors[name].dtype not in _NAMES:
            raise TypeError(
                f"tensor {name}: {tensors[name].dtype} cannot be sent; use one of {', '.join(DTYPES)}"
            )
    manifest = json.dumps(
        {
            "meta": dict(content.meta),
            "scalars": dict(content.payload.scalars),
            "tensors": [[name, _NAMES[tensors[name].dtype], list(tensors[name].shape)] for name in names],
        },
        separators=(",", ":"),
    ).encode()
    length = sum(tensor.nbytes for tensor in tensors.values())
    deflated = zlib.compress(manifest, 9)
    fits = len(manifest) <= _manifest_limit(HEADER.size + len(deflated) + length)
    flags = _DEFLATED if len(deflated) < len(manifest) and fits else 0
    return names, flags, deflated if flags else manifest, length


def decode(frame: Frame, *, max_bytes: int | None = None, max_manifest: int = MANIFEST_LIMIT) -> Content:
    """The content of a frame. Tensors are copies: a frame's memory is not aligned, and may be others' too.

    Args:
        frame: The bytes that `encode` gave. A memory map is given back to the system as it is read, so that
            a long frame and its tensors are not in memory together; it cannot be read again.
        max_bytes: Refuse a longer frame unread.
        max_manifest: Refuse a longer manifest unread; bytes after inflating, as `manifest_bytes` bounds them.

    Raises:
        FrameError: The frame is too long, cut short, altered, of another version or not a frame.
    """
    view = frame if isinstance(frame, LaidFrame) else memoryview(frame)
    if max_bytes is not None and len(view) > max_bytes:
        raise FrameError(f"frame of {len(view):,} bytes; at most {max_bytes:,} are allowed here")
    if len(view) < HEADER.size:
        raise FrameError(f"frame cut short: {len(view)} bytes, the header alone has {HEADER.size}")
    magic, version, flags, head_length, length, crc = HEADER.unpack(part_of(view, 0, HEADER.size))
    if magic != MAGIC:
        raise FrameError("not a fedtune frame")
    if version != VERSION:
        raise FrameError(f"frame of version {version}; this program speaks version {VERSION}")
    if len(view) != HEADER.size + head_length + length:
        raise FrameError(
            f"frame of {len(view):,} bytes; its header says {HEADER.size + head_length + length:,}"
        )
    found = crc32(_COVERED.pack(flags, head_length, length))
    for piece in pieces_of(view, HEADER.size, len(view)):
        found = crc32(piece, found)
    if found != crc or flags not in (0, _DEFLATED):
        raise FrameError("checksum does not match: the frame was altered on its way")
    meta, scalars, entries = _manifest(_head(view, flags, head_length, max_manifest))
    tensors: dict[str, Tensor] = {}
    body, at = HEADER.size + head_length, 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * dtype.itemsize
        if at + size > length:
            raise FrameError(f"tensor {name[:80]} of shape {shape} needs more bytes than the frame holds")
        tensors[name] = _copied(pieces_of(view, body + at, body + at + size), size, dtype, shape)
        at += size
        if isinstance(frame, mmap.mmap):
            _give_back(frame, body + at)
    if at != length:
        raise FrameError(f"{length - at} bytes of the frame belong to no tensor")
    return Content(Payload(tensors, scalars), meta)


def meta_of(frame: Frame) -> Mapping[str, Scalar]:
    """The bookkeeping of a frame that this process encoded, without its tensors."""
    view = frame if isinstance(frame, LaidFrame) else memoryview(frame)
    *_, flags, length, _, _ = HEADER.unpack(part_of(view, 0, HEADER.size))
    return _manifest(_head(view, flags, length, MANIFEST_LIMIT))[0]


def part_of(frame: Frame, begin: int, end: int) -> bytes | memoryview:
    """The bytes of a frame from `begin` to before `end`; of one that is laid out a copy of so many."""
    return frame.part(begin, end) if isinstance(frame, LaidFrame) else memoryview(frame)[begin:end]


def pieces_of(frame: Frame, begin: int, end: int) -> Iterable[memoryview]:
    """The same in pieces, which are no copies where that can be."""
    return frame.pieces(begin, end) if isinstance(frame, LaidFrame) else [memoryview(frame)[begin:end]]


def manifest_bytes(expects: Mapping[str, TensorSpec]) -> int:
    """The most bytes that the manifest of these tensors takes, with what is told beside them."""
    return 8192 + sum(len(json.dumps(name)) + 192 for name in expects)


def empty_frame(size: int) -> bytearray | mmap.mmap:
    """Memory for a frame that is still to come; of a long one, such as `decode` gives back."""
    return mmap.mmap(-1, size) if size > LONG else bytearray(size)


def _give_back(frame: mmap.mmap, end: int) -> None:
    """Lets go of the memory behind a map's whole pages before `end`, where the system can do that."""
    pages = end // mmap.PAGESIZE * mmap.PAGESIZE
    if pages and hasattr(mmap, "MADV_DONTNEED"):
        frame.madvise(mmap.MADV_DONTNEED, 0, pages)


def check(payload: Payload, expects: Mapping[str, TensorSpec]) -> None:
    """Holds a payload to what was asked for.

    Raises:
        FrameError: Tensors are missing or not asked for, a shape or dtype differs, or a value is NaN
            or infinite. The message names the tensor.
    """
    missing, foreign = expects.keys() - payload.tensors.keys(), payload.tensors.keys() - expects.keys()
    if missing or foreign:
        raise FrameError(
            "tensors do not match the order:"
            + (f" missing {some(missing)};" if missing else "")
            + (f" not asked for {some(foreign)};" if foreign else "")
        )
    for name, tensor in payload.tensors.items():
        spec = expects[name]
        fits = len(spec.shape) == tensor.ndim and all(
            wanted in (None, got) for wanted, got in zip(spec.shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != spec.dtype:
            raise FrameError(
                f"tensor {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                f"{spec.dtype} of shape {spec.shape} was asked for"
            )
        if not tensor.numel():
            continue
        low, high = extremes(tensor)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise FrameError(f"tensor {name} holds NaN or infinite values")
        if not -spec.limit < low <= high < spec.limit:
            raise FrameError(f"tensor {name} holds values of {spec.limit:,.0f} or more")
        if low < spec.at_least:
            raise FrameError(f"tensor {name} holds values below {spec.at_least:,.0f}")
    for name, value in payload.scalars.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FrameError(f"scalar {name} is {value}")


def _copied(pieces: Iterable[memoryview], size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not size:
        return torch.empty(shape, dtype=dtype)
    data = bytearray()
    for piece in pieces:  # of host memory it is one
        data += piece
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _manifest_limit(frame_bytes: int) -> int:
    """Bytes that the manifest of a frame of this length may have after inflating."""
    return min(MANIFEST_LIMIT, MANIFEST_FREE + MANIFEST_RATIO * frame_bytes)


def _head(view: Frame, flags: int, length: int, most: int) -> bytes:
    """The manifest's JSON; not read where it is longer than `most` or out of proportion to its frame."""
    most = min(most, _manifest_limit(len(view)))
    head = part_of(view, HEADER.size, HEADER.size + length)
    if not flags:
        if length > most:
            raise FrameError(f"manifest of {length:,} bytes; at most {most:,} are allowed here")
        return bytes(head)
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(head, most + 1)
    except zlib.error as error:
        raise FrameError(f"manifest cannot be inflated: {error}") from None
    if len(text) > most:
        raise FrameError(f"manifest is longer than the {most:,} bytes that are allowed here")
    if not inflater.eof or inflater.unused_data:
        raise FrameError("manifest is cut short, or something follows it")
    return text


Entries = list[tuple[str, torch.dtype, tuple[int, ...]]]


def _manifest(text: bytes) -> tuple[dict[str, Scalar], dict[str, Scalar], Entries]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"manifest is not JSON: {str(error)[:80]}") from None
    if not isinstance(document, dict) or document.keys() != {"meta", "scalars", "tensors"}:
        raise FrameError('manifest must hold "meta", "scalars" and "tensors", and nothing else')
    for part in ("meta", "scalars"):
        if not isinstance(document[part], dict):
            raise FrameError(f'"{part}" of the manifest must map names to numbers, flags or text')
        for name, value in document[part].items():
            _check_scalar(part, name, value)
    if not isinstance(document["tensors"], list):
        raise FrameError('"tensors" of the manifest must be a list')
    entries = [_entry(entry) for entry in document["tensors"]]
    if len({name for name, _, _ in entries}) != len(entries):
        raise FrameError("two tensors of the frame have one name")
    return document["meta"], document["scalars"], entries


def _check_scalar(part: str, name: str, value: object) -> None:
    """Holds what is told beside the tensors to numbers that 64 bits hold, flags and Unicode text."""
    if not _is_text(name):
        raise FrameError(f'a name in "{part}" of the manifest is not Unicode text')
    what = f'"{name[:80]}" in "{part}" of the manifest'
    match value:
        case str() if not _is_text(value):
            raise FrameError(f"{what} is not Unicode text")
        case float() if not math.isfinite(value):
            raise FrameError(f"{what} is {value}")
        case int() if not -(2**63) <= value < 2**63:
            raise FrameError(f"{what} is a number of more than 64 bits")
        case str() | float() | int():
            return
    raise FrameError(f"{what} must be a number, a flag or text")


def _is_text(value: str) -> bool:
    """Whether a string is Unicode text: JSON can write half of a surrogate pair, which no file can hold."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _entry(entry: object) -> tuple[str, torch.dtype, tuple[int, ...]]:
    match entry:
        case [str(name), str(dtype), list(shape)] if (
            dtype in DTYPES
            and _is_text(name)
            and len(shape) <= RANK_LIMIT
            and all(type(n) is int and 0 <= n < SIZE_LIMIT for n in shape)
            and math.prod(max(n, 1) for n in shape) < SIZE_LIMIT
        ):
            return name, DTYPES[dtype], tuple(shape)
    raise FrameError(
        f"not a tensor's name, dtype and shape of at most {RANK_LIMIT} lengths: {_start(entry)!a}"
    )


def _start(entry: object) -> str:
    """The first characters of what may be very long, without writing out the whole."""
    if isinstance(entry, list):
        return "[" + ", ".join(_start(part) for part in entry[:3]) + (", ..." if len(entry) > 3 else "") + "]"
    return str(entry)[:40] if isinstance(entry, str) else type(entry).__name__


def some(names: set[str]) -> str:
    """The first three of some names."""
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
