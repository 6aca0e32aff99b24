"""Triton kernels: out[i] = cast(float32(base[i]) + Δ[first + i]) for a whole tensor or a shard of one.

They give the bits of `fedtune.zeroth.reference`; `fedtune.zeroth.gpu` prepares what they read and launches
them. A program writes one tile of 1,024 elements. Sums are of integers, or of float32 in the order written;
no float product is added to anything before it is rounded, so nothing could be fused.

bfloat16 comes and goes as its bits in uint16, and is rounded here by integer operations: Triton's
interpreter truncates where a GPU rounds. Words of 2^31 and more come as negative int32, because the
interpreter takes them for int64.

Only Triton's own operations are used, nothing of its library of compiled helpers, so that this file can be
loaded for the interpreter in a process where Triton is already loaded for a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedtune.zeroth.reference import MIX

_TILE = tl.constexpr(1024)
_LANES = tl.constexpr(256)  # Philox calls a tile, for one word an element
_CALLS = tl.constexpr(128)  # Philox calls a tile, for one state to four elements
_M0, _M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_W0, _W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
_MIX0, _MIX1 = tl.constexpr(MIX[0]), tl.constexpr(MIX[1])
_WORDS = ["count", "shift", "c1", "c2", "c3", "k0", "k1"]
_SCALARS = ["n", "first", *_WORDS]


@triton.jit
def _philox(x0, x1, x2, x3, k0, k1):  # type: ignore[no-untyped-def]
    """The four words of a call; all arguments are uint32."""
    for _ in tl.static_range(10):
        upper0, lower0 = tl.umulhi(x0, _M0), x0 * _M0
        upper1, lower1 = tl.umulhi(x2, _M1), x2 * _M1
        x0, x1, x2, x3 = upper1 ^ x1 ^ k0, lower1, upper0 ^ x3 ^ k1, lower0
        k0 += _W0
        k1 += _W1
    return x0, x1, x2, x3


@triton.jit
def _bits(value):  # type: ignore[no-untyped-def]
    return value.to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def _add(out, base, at, n, delta):  # type: ignore[no-untyped-def]
    """out[at] = cast(float32(base[at]) + delta) where `at` is inside; `at` is int64."""
    inside = (at >= 0) & (at < n)
    old = tl.load(base + at, mask=inside, other=0)
    if old.dtype == tl.uint16:  # bfloat16
        w = (old.to(tl.uint32) << 16).to(tl.float32, bitcast=True) + delta
        bits = w.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # ties to even
        # A GPU's own NaN has all bits set and would round to a zero.
        new = tl.where(w != w, 0x7FC0, nearest).to(tl.uint16)
    else:
        new = (old.to(tl.float32) + delta).to(old.dtype)
    tl.store(out + at, new, mask=inside)


# Where n and first are multiples of 16, which the compiler is told, a thread takes four weights at a time.
@triton.jit(do_not_specialize=_WORDS)
def hadamard4(out, base, n, first, y, shift, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Tile `first` // 1,024 + program. `y` has 1,024 << shift entries."""
    c1, c2, c3, k0, k1 = _bits(c1), _bits(c2), _bits(c3), _bits(k0), _bits(k1)
    tile = (first // _TILE + tl.program_id(0)).to(tl.int64)
    # A word's 32 bits belong to 32 rows of the tile. A warp draws each once, and hands it to its threads.
    lane = tl.arange(0, 32)
    row = tl.arange(0, 32)[:, None]
    p0, p1, p2, p3 = _philox((tile * 32 + lane).to(tl.uint32), c1, c2, c3, k0, k1)
    r0, r1, r2, r3 = _philox(
        tl.full([1], 0, tl.uint32) + (tile >> shift).to(tl.uint32), c1 + 1, c2, c3, k0, k1
    )
    inside = row * 32 + lane[None, :]  # of the tile
    start = (tile & ((1 << shift) - 1)).to(tl.int32) * _TILE  # of the tile in its block
    last = (_TILE << shift) - 1
    s0 = _signed(y, inside, (start ^ r0.to(tl.int32)) & last, p0, lane, row)
    s1 = _signed(y, inside, (start ^ r1.to(tl.int32)) & last, p1, lane, row)
    s2 = _signed(y, inside, (start ^ r2.to(tl.int32)) & last, p2, lane, row)
    s3 = _signed(y, inside, (start ^ r3.to(tl.int32)) & last, p3, lane, row)
    # Four at a time: of 8 a thread would hold more words than rows.
    at = tl.max_contiguous(tile * _TILE - first + inside, [1, 4])
    _add(out, base, at, n, (s0 + s1) + (s2 + s3))


@triton.jit
def _signed(y, inside, start, plane, lane, row):  # type: ignore[no-untyped-def]
    """±y[(i ⊕ r) mod B] of a tile that begins at `start`: − where the plane has bit `row` set."""
    sign = tl.gather(plane, lane, 0)[None, :] << (31 - row).to(tl.uint32) & 0x80000000
    return (tl.load(y + (start ^ inside)).to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _add_scaled(out, base, at, n, total, unit):  # type: ignore[no-untyped-def]
    """`_add` of integer sums: float64(total) · unit, rounded to float32 as in the reference."""
    _add(out, base, at, n, (total.to(tl.float64) * tl.load(unit)).to(tl.float32))


@triton.jit
def _ones(word):  # type: ignore[no-untyped-def]
    """The number of bits set, as int64; compilers know this form and use one instruction."""
    word = word - (word >> 1 & 0x55555555)
    word = (word & 0x33333333) + (word >> 2 & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101 >> 24).to(tl.int64)


@triton.jit(do_not_specialize=_SCALARS)
def binomial32(out, base, n, first, groups, q, count, unit, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Tile `first` // 1,024 + program. Seed groups[g] has the integer coefficient q[g], g < count."""
    c1, c2, c3, k0, k1 = _bits(c1), _bits(c2), _bits(c3), _bits(k0), _bits(k1)
    tile = (first // _TILE + tl.program_id(0)).to(tl.int64)
    call = (tile * _LANES + tl.arange(0, _LANES)).to(tl.uint32)
    t0 = tl.full([_LANES], 0, tl.int64)
    t1, t2, t3 = t0, t0, t0
    for g in range(count):
        factor = tl.load(q + g).to(tl.int64)
        w0, w1, w2, w3 = _philox(call, c1 + _bits(tl.load(groups + g)), c2, c3, k0, k1)
        t0 += factor * (_ones(w0) - 16)
        t1 += factor * (_ones(w1) - 16)
        t2 += factor * (_ones(w2) - 16)
        t3 += factor * (_ones(w3) - 16)
    at = tile * _TILE - first + tl.arange(0, _LANES)
    _add_scaled(out, base, at, n, t0, unit)
    _add_scaled(out, base, at + _LANES, n, t1, unit)
    _add_scaled(out, base, at + 2 * _LANES, n, t2, unit)
    _add_scaled(out, base, at + 3 * _LANES, n, t3, unit)


@triton.jit(do_not_specialize=_SCALARS)
def looked_up(out, base, n, first, keys, tables, count, unit, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """`rademacher` and `gaussian`, tile `first` // 1,024 + program.

    Group g < count of the seeds has keys[g] (uint64) and 128 partial sums from tables[128 g] on.
    """
    c1, c2, c3, k0, k1 = _bits(c1), _bits(c2), _bits(c3), _bits(k0), _bits(k1)
    tile = (first // _TILE + tl.program_id(0)).to(tl.int64)
    lane = tl.arange(0, _CALLS)
    w0, w1, w2, w3 = _philox((tile * _CALLS + lane).to(tl.uint32), c1, c2, c3, k0, k1)
    state0 = w0.to(tl.uint64) | w1.to(tl.uint64) << 32
    state1 = w2.to(tl.uint64) | w3.to(tl.uint64) << 32
    # Call 8 t + l has elements 64 t + 32 r + 16 h + 2 l + s: of state 0 those at 0, 1, 16 and 17 from its
    # first, of state 1 those 32 further on.
    t0 = tl.full([_CALLS], 0, tl.int32)
    t1, t16, t17, t32, t33, t48, t49 = t0, t0, t0, t0, t0, t0, t0
    for g in range(count):
        key, row = tl.load(keys + g), tables + g * 128
        low, high = _mixed(state0 ^ key)
        t0 += _entries(row, low)
        t1 += _entries(row, high)
        t16 += _entries(row, low >> 16)
        t17 += _entries(row, high >> 16)
        low, high = _mixed(state1 ^ key)
        t32 += _entries(row, low)
        t33 += _entries(row, high)
        t48 += _entries(row, low >> 16)
        t49 += _entries(row, high >> 16)
    at = tile * _TILE - first + lane // 8 * 64 + lane % 8 * 2
    at = at[:, None] + tl.arange(0, 2)[None, :]
    _add_scaled(out, base, at, n, tl.join(t0, t1), unit)
    _add_scaled(out, base, at + 16, n, tl.join(t16, t17), unit)
    _add_scaled(out, base, at + 32, n, tl.join(t32, t33), unit)
    _add_scaled(out, base, at + 48, n, tl.join(t48, t49), unit)


@triton.jit
def _mixed(x):  # type: ignore[no-untyped-def]
    """The two halves of the mixed 64 bits, low and high."""
    x = x * _MIX0
    x = (x ^ x >> 32) * _MIX1
    high = (x >> 32).to(tl.uint32)
    return x.to(tl.uint32) ^ high, high


@triton.jit
def _entries(row, v):  # type: ignore[no-untyped-def]
    """What the halfword in the low 16 bits of v adds."""
    one = tl.load(row + (v & 63).to(tl.int32))
    two = tl.load(row + 64 + (v >> 6 & 31).to(tl.int32))
    return one + two + tl.load(row + 96 + (v >> 11 & 31).to(tl.int32))


KERNELS = {
    "hadamard4": hadamard4,
    "rademacher": looked_up,
    "gaussian": looked_up,
    "binomial32": binomial32,
}
