"""The definition of every kind of noise in plain NumPy: slow, readable, equal to the fast path bit for bit.

Philox4x32-10 (Salmon et al., SC 2011) maps a 128-bit counter and a 64-bit key to four 32-bit words. Here

    key     = (pool key, low 32 bits; high 32 bits)
    counter = (call, kind << 24 | group, tensor id low, tensor id high)

and which call, group, word and bit belong to element i and seed j is said at each kind below. Tiles of
1,024 elements keep the lanes of one call apart by a fixed stride, so that vector registers load neighbours.

A rebuild is w = float32(w0) + Δ with Δ[i] = Σ_j a_j z_j[i] for a float64 K-vector a; a single perturbation
is the same with a = scale · e_j. For the kinds drawn independently by seed, a_j is quantised with one
power-of-two scale, so that the sum is one of integers: no order, no fused multiply-add and no chunking can
change it.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import InputError
from fedtune.zeroth.pool import KINDS, MAX_ELEMENTS, SeedPool, tensor_id

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]

TILE = 1024  # elements
ROOT_EIGHTH = 0.35355339059327379  # 1/√8: the standard deviation of 32 coin flips is √8
GAUSSIAN_ENTRIES = 4096
_GAUSSIAN_UNIT = 65536.0
_GAUSSIAN_GAIN = 1.0001603147040454  # brings the variance of the rounded table to 1
_GAUSSIAN_DIGEST = "1894a50f82ae47fb"

OFFSETS_GROUP = 1  # hadamard4: sign planes are group 0, XOR offsets group 1


def philox(counter: tuple[object, object, object, object], key: tuple[int, int]) -> tuple[U32, U32, U32, U32]:
    """Philox4x32-10 of counters given as four broadcastable arrays or integers."""
    x0, x1, x2, x3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = key
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * x0
        p1 = np.uint64(0xCD9E8D57) * x2
        x0 = (p1 >> np.uint64(32)) ^ x1 ^ np.uint64(k0)
        x2 = (p0 >> np.uint64(32)) ^ x3 ^ np.uint64(k1)
        x1, x3 = p1 & low, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    y0, y1, y2, y3 = (x.astype(np.uint32) for x in np.broadcast_arrays(x0, x1, x2, x3))
    return y0, y1, y2, y3


def stream(pool: SeedPool, name: str, calls: I64, group: int) -> tuple[U32, U32, U32, U32]:
    """The four words of each call for one tensor and group."""
    identity = tensor_id(name)
    tagged = KINDS.index(pool.noise) << 24 | group
    key = (pool.key & 0xFFFFFFFF, pool.key >> 32)
    return philox((calls, tagged, identity & 0xFFFFFFFF, identity >> 32), key)


def words(pool: SeedPool, name: str, elements: I64, group: int) -> U32:
    """One word an element: a call serves the elements l, l + 256, l + 512, l + 768 of a tile, l < 256."""
    inside = elements % TILE
    four = stream(pool, name, elements // TILE * 256 + inside % 256, group)
    return np.choose(inside // 256, four).astype(np.uint32)


@lru_cache(1)
def gaussian_table() -> F32:
    """The standard normal's quantiles at (h + ½)/4096, h < 4096, in units of 2^-16, with variance 1.

    Raises:
        RuntimeError: This platform's logarithm is so far off that a value came out another: it cannot take
            part.
    """
    quantile = NormalDist().inv_cdf
    upper = [quantile((h + 0.5) / GAUSSIAN_ENTRIES) for h in range(GAUSSIAN_ENTRIES // 2, GAUSSIAN_ENTRIES)]
    rounded = np.rint(np.array(upper) * (_GAUSSIAN_GAIN * _GAUSSIAN_UNIT))
    table = (np.concatenate([-rounded[::-1], rounded]) / _GAUSSIAN_UNIT).astype(np.float32)
    digest = hashlib.blake2b(table.astype("<f4").tobytes(), digest_size=8).hexdigest()
    if digest != _GAUSSIAN_DIGEST:
        raise RuntimeError(
            f"the Gaussian table came out as {digest}, not {_GAUSSIAN_DIGEST}: use another noise"
        )
    table.setflags(write=False)
    return table


def z(pool: SeedPool, name: str, n: int, j: int, *, first: int = 0) -> F32:
    """The noise of seed j for elements [first, first + n) of a flattened tensor.

    rademacher: bit j mod 32 of the word of group ⌊j/32⌋: 1 is +1, 0 is −1.
    gaussian: the word of group ⌊j/2⌋; its low 12 bits (j even) or high 12 bits (j odd) index the table.
    binomial32: (bits set in the word of group j − 16) / √8.
    hadamard4: ½ Σ_{t<4} D_t[i] H[(i mod B) ⊕ r_t(⌊i/B⌋), j], with H[m, j] = −1 where m & j has odd parity.

    Raises:
        InputError: j is not a seed of the pool, or the range is outside what the format can hold.
    """
    j = pool.check_seed(j)
    elements = indices(first, n)
    if pool.noise == "rademacher":
        bit = words(pool, name, elements, j // 32) >> np.uint32(j % 32) & np.uint32(1)
        return np.where(bit == 1, np.float32(1), np.float32(-1))
    if pool.noise == "gaussian":
        word = words(pool, name, elements, j // 2)
        return gaussian_table()[word >> 20 if j % 2 else word & 0xFFF]
    if pool.noise == "binomial32":
        ones = np.bitwise_count(words(pool, name, elements, j)).astype(np.float64)
        return ((ones - 16.0) * ROOT_EIGHTH).astype(np.float32)
    one = np.zeros(pool.size)
    one[j] = 1.0
    return delta(pool, name, n, one, first=first)


def delta(pool: SeedPool, name: str, n: int, a: F64, *, first: int = 0) -> F32:
    """Δ = Σ_j a_j z_j for elements [first, first + n): what a rebuild adds to w0.

    Args:
        pool: The pool.
        name: The tensor's name.
        n: Elements.
        a: K coefficients, float64.
        first: Where the elements begin in the flattened tensor.

    Raises:
        InputError: `a` is not K finite numbers, or the range is outside what the format can hold.
    """
    a = coefficients(pool, a)
    elements = indices(first, n)
    if pool.noise == "hadamard4":
        return _hadamard_delta(pool, name, elements, transformed(pool, a))
    q, unit = quantised(pool, a)
    if pool.noise == "gaussian":
        total = np.zeros(n, np.int64)
        for j in np.flatnonzero(q):
            word = words(pool, name, elements, int(j) // 2)
            total += contributions(q[j])[word >> 20 if j % 2 else word & 0xFFF]
        return (total * unit).astype(np.float32)
    total = np.zeros(n, np.int64)
    for j in np.flatnonzero(q):
        if pool.noise == "rademacher":
            bit = words(pool, name, elements, int(j) // 32) >> np.uint32(j % 32) & np.uint32(1)
            total += int(q[j]) * (2 * bit.astype(np.int64) - 1)
        else:
            total += int(q[j]) * (np.bitwise_count(words(pool, name, elements, int(j))).astype(np.int64) - 16)
    return (total * unit).astype(np.float32)


def quantised(pool: SeedPool, a: F64) -> tuple[F64, float]:
    """Coefficients in units of a power of two, and the float64 unit of the integer sum.

    rademacher: integers q with Σ|q_j| ≤ 2^30 + K/2, so every partial sum fits an int32.
    gaussian: unrounded, Σ|q_j| < 2^29; what is rounded is each q_j · z (`contributions`), with |z| < 4.
    binomial32: integers with |q_j| ≤ 2^30, summed in int64; the unit holds the 1/√8.
    """
    sizes = np.abs(a)
    # fsum is exact, so the scale does not depend on the order of the seeds.
    total = float(sizes.max(initial=0.0)) if pool.noise == "binomial32" else math.fsum(sizes)
    if total == 0.0:
        return np.zeros_like(a), 1.0
    bits = (29 if pool.noise == "gaussian" else 30) - math.frexp(total)[1]
    bits = min(bits, 1000)
    q = np.ldexp(a, bits)
    unit = math.ldexp(1.0, -bits)
    if pool.noise == "gaussian":
        return q, unit
    return np.rint(q), unit * ROOT_EIGHTH if pool.noise == "binomial32" else unit


def contributions(q: float) -> I64:
    """gaussian: the integer that one seed adds, for each of the table's 4,096 values."""
    return np.rint(q * gaussian_table().astype(np.float64)).astype(np.int64)


def transformed(pool: SeedPool, a: F64) -> F32:
    """½ H a, padded to B: butterflies in float64 with strides 1, 2, 4, …, then one rounding to float32."""
    y = np.zeros(pool.block)
    y[: pool.size] = a
    stride = 1
    while stride < pool.block:
        pairs = y.reshape(-1, 2, stride)
        y = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        stride *= 2
    return (y * 0.5).astype(np.float32)


def planes(pool: SeedPool, name: str, elements: I64) -> tuple[U32, U32, U32, U32]:
    """hadamard4: bit ⌊i/32⌋ mod 32 of the words of call 32 ⌊i/1024⌋ + i mod 32; a 1 means D_t = −1."""
    four = stream(pool, name, elements // TILE * 32 + elements % 32, 0)
    shift = (elements // 32 % 32).astype(np.uint32)
    return tuple(word >> shift & np.uint32(1) for word in four)  # type: ignore[return-value]


def offsets(pool: SeedPool, name: str, blocks: I64) -> tuple[I64, I64, I64, I64]:
    """hadamard4: r_t(b), the low bits of the four words of call b."""
    four = stream(pool, name, blocks, OFFSETS_GROUP)
    return tuple(word.astype(np.int64) % pool.block for word in four)  # type: ignore[return-value]


def _hadamard_delta(pool: SeedPool, name: str, elements: I64, y: F32) -> F32:
    inside = elements % pool.block
    s = []
    for sign, offset in zip(
        planes(pool, name, elements), offsets(pool, name, elements // pool.block), strict=True
    ):
        value = y[inside ^ offset]
        s.append(np.where(sign == 1, -value, value))
    result: F32 = (s[0] + s[1]) + (s[2] + s[3])
    return result


def indices(first: int, n: int) -> I64:
    """The element numbers first … first + n − 1."""
    check_range(first, n)
    return np.arange(first, first + n, dtype=np.int64)


def check_range(first: int, n: int) -> None:
    """Refuses elements that the counters cannot number."""
    if first < 0 or n < 0 or first + n > MAX_ELEMENTS:
        raise InputError(
            f"elements {first} to {first + n} asked for; a tensor has 2^34 at most: split it by name"
        )


def coefficients(pool: SeedPool, a: object) -> F64:
    """K finite float64 numbers that float32 weights can take.

    Raises:
        InputError: Another length, or a number that is NaN, infinite or far beyond float32.
    """
    vector = np.asarray(a, dtype=np.float64)
    if vector.shape != (pool.size,):
        raise InputError(
            f"the pool has {pool.size} seeds, so it needs {pool.size} coefficients, got shape "
            f"{vector.shape}: is this the accumulator of another pool?"
        )
    # Checked one by one before they are added: a sum of infinities would name no seed.
    bad = np.flatnonzero(~(np.abs(vector) < 2.0**100))
    if bad.size:
        raise InputError(
            f"coefficients must be finite and below 2^100, got {vector[bad[0]]} for seed {bad[0]} "
            f"({bad.size} of {pool.size} are bad)"
        )
    return vector
