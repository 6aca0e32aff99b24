"""Numba kernels: out[i] = cast(float32(base[i]) + Δ[first + i]) over a range of whole tiles or blocks.

`out` and `base` hold float32, or the bits of bfloat16 as uint16, or the bits of float16 as int16.

Nothing is compiled on import; the first call of a kernel compiles it, and Numba's cache keeps the result
where there is a place to write. A kernel holds no lock (`nogil`) and writes only to its own range, so
threads may share an array. No kernel lets the compiler reassociate or contract floating-point operations
(`fastmath` is off).

Unsigned indices spare the test for negative ones, without which the compiler does not vectorise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from fedtune.zeroth.reference import MIX
from fedtune.zeroth.vector import (
    HAS_PERMUTE,
    add_looked_up,
    add_permuted,
    add_signed,
    narrowed,
    popcount,
    widened,
)

TILE = 1024
_LANES = 256  # Philox calls a tile, for one word an element

_LOW = np.uint64(0xFFFFFFFF)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_HALF = np.uint64(32)
_LOW4 = np.uint64(15)
_MIX0, _MIX1 = np.uint64(MIX[0]), np.uint64(MIX[1])
_SIX, _SIXTEEN, _LOW6, _LOW10 = np.uint64(6), np.uint64(16), np.uint64(63), np.uint64(1023)
_WORD, _SUM, _STATE = np.zeros(0, np.uint32), np.zeros(0, np.int32), np.zeros(0, np.uint64)


def jit(function: Callable[..., Any]) -> Any:
    """Compiles a kernel; kept between runs where there is a place for it."""
    try:
        return numba.njit(nogil=True, cache=True, boundscheck=False)(function)
    except RuntimeError:  # no place for a cache, neither beside this file nor in the user's folder
        return numba.njit(nogil=True, boundscheck=False)(function)


@jit
def _aligned(size, like):  # type: ignore[no-untyped-def]
    """An empty array that begins a cache line: a 64-byte load across two lines costs as much as two loads."""
    room = np.empty(size + 64 // like.itemsize, like.dtype)
    skip = (64 - room.ctypes.data % 64) % 64 // like.itemsize
    return room[skip : skip + size]


@jit
def philox_lanes(out, lanes, call, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """out[w * lanes + l] = word w of call `call + l`; every argument but `out` is a uint64."""
    n = np.int64(lanes)
    out0, out1, out2, out3 = out[:n], out[n : 2 * n], out[2 * n : 3 * n], out[3 * n : 4 * n]
    for lane in range(n):
        x0, x1, x2, x3 = call + np.uint64(lane), c1, c2, c3
        key0, key1 = k0, k1
        for _ in range(10):
            p0 = (x0 & _LOW) * _M0
            p1 = (x2 & _LOW) * _M1
            # The upper halves hold rubbish from here on: only the lower ones are multiplied or kept.
            x0 = (p1 >> _HALF) ^ x1 ^ key0
            x2 = (p0 >> _HALF) ^ x3 ^ key1
            x1, x3 = p1, p0
            key0 = (key0 + _W0) & _LOW
            key1 = (key1 + _W1) & _LOW
        out0[lane] = np.uint32(x0 & _LOW)
        out1[lane] = np.uint32(x1 & _LOW)
        out2[lane] = np.uint32(x2 & _LOW)
        out3[lane] = np.uint32(x3 & _LOW)


@jit
def add_scaled(out, base, total, unit, start, stop):  # type: ignore[no-untyped-def]
    """out[start + i] = base[start + i] + float32(total[i] * unit), all roundings as in the reference."""
    begin, end = max(start, 0), min(stop, out.size)
    new, old, sums = out[begin:end], base[begin:end], total[begin - start : end - start]
    for i in range(new.size):
        new[i] = narrowed(widened(old[i]) + np.float32(np.float64(sums[i]) * unit), old[i])


@jit
def hadamard4(out, base, first, low, high, y, block, stream):  # type: ignore[no-untyped-def]
    """Blocks low … high − 1.

    `y` is there once (`block` long), or 16 times, the low 4 bits of its index XORed with 0, 1, …, 15.
    `stream` holds c1, c2, c3, k0, k1 of the sign planes as uint64; the offsets' c1 is one more.
    """
    c1, c2, c3, k0, k1 = stream[0], stream[1], stream[2], stream[3], stream[4]
    signs = _aligned(128, _WORD)
    drawn = np.empty(4, np.uint32)
    start = np.empty(4, np.uint64)
    scratch = np.zeros(TILE, out.dtype)
    mask = np.uint64(block - 1)
    for b in range(low, high):
        philox_lanes(drawn, np.uint64(1), np.uint64(b), c1 + np.uint64(1), c2, c3, k0, k1)
        for t in range(4):
            start[t] = np.uint64(drawn[t]) & mask
            if y.size != block:
                # Copy r mod 16 begins at (r mod 16) B, and B is a power of two: the sum is an XOR as well.
                start[t] = (start[t] & _LOW4) * np.uint64(block) + (start[t] & ~_LOW4)
        for tile in range(b * block // TILE, (b + 1) * block // TILE):
            at = tile * TILE - first
            if at >= out.size or at + TILE <= 0:
                continue
            philox_lanes(signs, np.uint64(32), np.uint64(tile * 32), c1, c2, c3, k0, k1)
            inside = np.uint64(tile * TILE) & mask
            if at >= 0 and at + TILE <= out.size:
                _hadamard_tile(out, base, at, signs, y, inside, start, block)
            else:
                begin, end = max(at, 0), min(at + TILE, out.size)
                scratch[begin - at : end - at] = base[begin:end]
                _hadamard_tile(scratch, scratch, 0, signs, y, inside, start, block)
                out[begin:end] = scratch[begin - at : end - at]


@jit
def _hadamard_tile(out, base, at, signs, y, inside, start, block):  # type: ignore[no-untyped-def]
    t0, t1, t2, t3 = start[0], start[1], start[2], start[3]
    if y.size != block:
        add_signed(out, base, np.uint64(at), y, inside, t0, t1, t2, t3, signs)
    elif HAS_PERMUTE:  # a constant: elsewhere the compiler never meets the instruction
        add_permuted(out, base, np.uint64(at), y, inside, t0, t1, t2, t3, signs)


@jit
def draw_states(words, first, last, stream):  # type: ignore[no-untyped-def]
    """The states of tiles first … last − 1, in the order of `reference.states`."""
    c1, c2, c3, k0, k1 = stream[0], stream[1], stream[2], stream[3], stream[4]
    states = _aligned((last - first) * TILE // 4, _STATE)
    calls = TILE // 8
    for tile in range(first, last):
        philox_lanes(words, np.uint64(calls), np.uint64(tile * calls), c1, c2, c3, k0, k1)
        row = states[(tile - first) * TILE // 4 : (tile - first + 1) * TILE // 4]
        for eight in range(0, calls, 8):
            for half in range(2):
                low, high = words[2 * half * calls + eight :], words[(2 * half + 1) * calls + eight :]
                eights = row[2 * eight + 8 * half : 2 * eight + 8 * half + 8]
                for call in range(8):
                    eights[call] = np.uint64(low[call]) | np.uint64(high[call]) << _HALF
    return states


@jit
def looked_up(out, base, first, low, high, keys, digits, unit, stream):  # type: ignore[no-untyped-def]
    """`rademacher` and `gaussian`, tiles low … high − 1; a row of keys and digits for each group of seeds."""
    words = _aligned(TILE // 2, _WORD)
    states = draw_states(words, low, high, stream)
    total = _aligned((high - low) * TILE, _SUM)
    total[:] = 0
    for g in range(keys.size):
        add_looked_up(total, states, keys[g], digits[g], np.uint64(total.size))
    add_scaled(out, base, total, unit, low * TILE - first, high * TILE - first)


@jit
def looked_up_plain(out, base, first, low, high, keys, digits, unit, stream):  # type: ignore[no-untyped-def]
    """The same for processors without AVX-512: two loads for each halfword."""
    words = _aligned(TILE // 2, _WORD)
    states = draw_states(words, low, high, stream)
    total = _aligned((high - low) * TILE, _SUM)
    total[:] = 0
    six, ten = np.empty(64, np.int32), np.empty(1024, np.int32)
    mixed = _aligned(TILE // 4, _STATE)
    for g in range(keys.size):
        key = keys[g]
        row = digits[g]
        for value in range(64):
            six[value] = _entry(row, value)
        for value in range(1024):
            ten[value] = _entry(row, 64 + value % 32) + _entry(row, 96 + value // 32)
        for at in range(0, states.size, mixed.size):
            part = states[at : at + mixed.size]
            for n in range(mixed.size):
                x = (part[n] ^ key) * _MIX0
                x = (x ^ x >> _HALF) * _MIX1
                mixed[n] = x ^ x >> _HALF
            sums = total[4 * at : 4 * at + TILE]
            for n in range(mixed.size):
                x = mixed[n]
                i = n // 8 * 32 + n % 8 * 2
                for place in (i, i + 16, i + 1, i + 17):
                    sums[np.uint64(place)] += six[x & _LOW6] + ten[x >> _SIX & _LOW10]
                    x >>= _SIXTEEN
    add_scaled(out, base, total, unit, low * TILE - first, high * TILE - first)


@jit
def _entry(row, value):  # type: ignore[no-untyped-def]
    return np.int32(row[value]) + (np.int32(row[128 + value]) << np.int32(14))


@jit
def binomial32(out, base, first, low, high, groups, q, unit, stream):  # type: ignore[no-untyped-def]
    """Tiles low … high − 1. Seed `groups[g]` has the integer coefficient q[g]."""
    c1, c2, c3, k0, k1 = stream[0], stream[1], stream[2], stream[3], stream[4]
    words = _aligned(TILE, _WORD)
    total = np.zeros((high - low) * TILE, np.int64)
    for g in range(groups.size):
        factor = q[g]
        for tile in range(low, high):
            philox_lanes(words, np.uint64(_LANES), np.uint64(tile * _LANES), c1 + groups[g], c2, c3, k0, k1)
            row = total[(tile - low) * TILE : (tile - low + 1) * TILE]
            for i in range(TILE):
                row[i] += factor * (np.int64(popcount(words[i])) - 16)
    add_scaled(out, base, total, unit, low * TILE - first, high * TILE - first)


KERNELS = {
    "hadamard4": hadamard4,
    "rademacher": looked_up if HAS_PERMUTE else looked_up_plain,
    "gaussian": looked_up if HAS_PERMUTE else looked_up_plain,
    "binomial32": binomial32,
}
