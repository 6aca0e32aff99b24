"""Triton kernels: out[i] = cast(float32(base[i]) + Δ[first + i]) for a whole tensor or a shard of one.

They give the bits of `fedtune.zeroth.reference`; `fedtune.zeroth.gpu` prepares what they read and launches
them. A program writes one tile of 1,024 elements. Sums are of integers, or of float32 in the order written.
Where a product meets a sum of its own type, the launch forbids fusing the two.

bfloat16 comes and goes as its bits in uint16, and is rounded here by integer operations: Triton's
interpreter truncates where a GPU rounds. Words of 2^31 and more come as negative int32, because the
interpreter takes them for int64.

Only Triton's own operations are used, nothing of its library of compiled helpers, so that this file can be
loaded for the interpreter in a process where Triton is already loaded for a GPU.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

_TILE = tl.constexpr(1024)
_LANES = tl.constexpr(256)  # Philox calls a tile, for one word an element
_M0, _M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_W0, _W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
_SCALARS = ["n", "first", "count", "shift", "c1", "c2", "c3", "k0", "k1"]


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


@triton.jit(do_not_specialize=_SCALARS)
def hadamard4(out, base, n, first, y, shift, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Tile `first` // 1,024 + program. `y` has 1,024 << shift entries."""
    c1, c2, c3, k0, k1 = _bits(c1), _bits(c2), _bits(c3), _bits(k0), _bits(k1)
    tile = (first // _TILE + tl.program_id(0)).to(tl.int64)
    # A word's 32 bits belong to 32 rows of the tile, so one thread draws it once.
    lane = tl.arange(0, 32)
    row = tl.arange(0, 32)[:, None]
    p0, p1, p2, p3 = _philox((tile * 32 + lane).to(tl.uint32), c1, c2, c3, k0, k1)
    r0, r1, r2, r3 = _philox(
        tl.full([1], 0, tl.uint32) + (tile >> shift).to(tl.uint32), c1 + 1, c2, c3, k0, k1
    )
    element = tile * _TILE + row * 32 + lane[None, :]
    last = (_TILE << shift) - 1
    s0 = _signed(y, element, r0, last, p0, row)
    s1 = _signed(y, element, r1, last, p1, row)
    s2 = _signed(y, element, r2, last, p2, row)
    s3 = _signed(y, element, r3, last, p3, row)
    _add(out, base, element - first, n, (s0 + s1) + (s2 + s3))


@triton.jit
def _signed(y, element, offset, last, plane, row):  # type: ignore[no-untyped-def]
    """±y[(i ⊕ r) mod B]: − where the plane has bit `row` set."""
    place = (element.to(tl.int32) ^ offset.to(tl.int32)) & last
    sign = (plane[None, :] >> row.to(tl.uint32)) << 31
    return (tl.load(y + place).to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _add_scaled(out, base, n, first, tile, t0, t1, t2, t3, unit):  # type: ignore[no-untyped-def]
    """The integer sums of a tile's quarters, float64(sum) · unit rounded to float32 as in the reference."""
    at = tile * _TILE - first + tl.arange(0, _LANES)
    scale = tl.load(unit)
    _add(out, base, at, n, (t0.to(tl.float64) * scale).to(tl.float32))
    _add(out, base, at + _LANES, n, (t1.to(tl.float64) * scale).to(tl.float32))
    _add(out, base, at + 2 * _LANES, n, (t2.to(tl.float64) * scale).to(tl.float32))
    _add(out, base, at + 3 * _LANES, n, (t3.to(tl.float64) * scale).to(tl.float32))


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
    _add_scaled(out, base, n, first, tile, t0, t1, t2, t3, unit)


@triton.jit(do_not_specialize=_SCALARS)
def rademacher(out, base, n, first, groups, tables, count, unit, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Tile `first` // 1,024 + program. tables[g]: 8 × 16 partial sums, a nibble of group groups[g] a row."""
    c1, c2, c3, k0, k1 = _bits(c1), _bits(c2), _bits(c3), _bits(k0), _bits(k1)
    tile = (first // _TILE + tl.program_id(0)).to(tl.int64)
    call = (tile * _LANES + tl.arange(0, _LANES)).to(tl.uint32)
    t0 = tl.full([_LANES], 0, tl.int32)
    t1, t2, t3 = t0, t0, t0
    for g in range(count):
        w0, w1, w2, w3 = _philox(call, c1 + _bits(tl.load(groups + g)), c2, c3, k0, k1)
        for nibble in tl.static_range(8):
            sums = tables + g * 128 + 16 * nibble
            t0 += tl.load(sums + (w0 >> 4 * nibble & 15).to(tl.int32))
            t1 += tl.load(sums + (w1 >> 4 * nibble & 15).to(tl.int32))
            t2 += tl.load(sums + (w2 >> 4 * nibble & 15).to(tl.int32))
            t3 += tl.load(sums + (w3 >> 4 * nibble & 15).to(tl.int32))
    _add_scaled(out, base, n, first, tile, t0, t1, t2, t3, unit)


@triton.jit(do_not_specialize=_SCALARS)
def gaussian(out, base, n, first, groups, q, table, count, unit, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Tile `first` // 1,024 + program. q[g]: the coefficients of the two seeds of group groups[g]."""
    c1, c2, c3, k0, k1 = _bits(c1), _bits(c2), _bits(c3), _bits(k0), _bits(k1)
    tile = (first // _TILE + tl.program_id(0)).to(tl.int64)
    call = (tile * _LANES + tl.arange(0, _LANES)).to(tl.uint32)
    t0 = tl.full([_LANES], 0, tl.int32)
    t1, t2, t3 = t0, t0, t0
    for g in range(count):
        even, odd = tl.load(q + 2 * g), tl.load(q + 2 * g + 1)
        w0, w1, w2, w3 = _philox(call, c1 + _bits(tl.load(groups + g)), c2, c3, k0, k1)
        t0 += _pair(table, w0, even, odd)
        t1 += _pair(table, w1, even, odd)
        t2 += _pair(table, w2, even, odd)
        t3 += _pair(table, w3, even, odd)
    _add_scaled(out, base, n, first, tile, t0, t1, t2, t3, unit)


@triton.jit
def _pair(table, word, even, odd):  # type: ignore[no-untyped-def]
    one = _nearest(even * tl.load(table + (word & 4095).to(tl.int32)))
    return one + _nearest(odd * tl.load(table + (word >> 20).to(tl.int32)))


@triton.jit
def _nearest(x):  # type: ignore[no-untyped-def]
    """Float64 below 2^31 to the nearest int32, ties to even: it stands in the low bits of x + 1.5 · 2^52."""
    return (x + 6755399441055744.0).to(tl.int64, bitcast=True).to(tl.int32)
