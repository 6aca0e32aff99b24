"""The definition of every kind of noise in plain NumPy: slow, readable, equal to the fast path bit for bit.

Philox4x32-10 (Salmon et al., SC 2011) maps a 128-bit counter and a 64-bit key to four 32-bit words. Here

    key     = (pool key, low 32 bits; high 32 bits)
    counter = (call, kind << 24 | group, tensor id low, tensor id high)

and which call, group, word and bit belong to element i and seed j is said at each kind below. Elements share
a call in an order that lets vector registers load and store neighbours.

`rademacher` and `gaussian` need K numbers an element, too many for ten rounds each. They draw one
64-bit state for 4 elements and one 64-bit key for each group of seeds by Philox, and mix the two by two
multiplications (`halfwords`). For one seed alone the mixing is a bijection of the states, which leaves it as
good as Philox.

A rebuild is w = cast(float32(w0) + Δ) with Δ[i] = Σ_j a_j z_j[i] for a float64 K-vector a, the cast to
bfloat16 and float16 being `rounded`; a single perturbation is the same with a = scale · e_j. For the kinds
drawn independently by seed, a_j is quantised with one power-of-two scale, so that the sum is one of integers:
no order, no fused multiply-add and no chunking can change it.
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
U16 = NDArray[np.uint16]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

TILE = 1024  # elements
ROOT_EIGHTH = 0.35355339059327379  # 1/√8: the standard deviation of 32 coin flips is √8

MIX = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53  # the multipliers of MurmurHash3's 64-bit finaliser
FIELDS = ((0, 6), (6, 5), (11, 5))  # first bit and width of the three parts of a halfword
GROUP = {"rademacher": 16, "gaussian": 1}  # seeds a halfword
# Σ|a| times this has room in 29 bits and a sign: a halfword's sum is of two digits, 14 and 16 bits wide.
REACH = {"rademacher": 1 + 2**-10, "gaussian": 4.25}

_GAUSSIAN_UNIT = 65536.0
# Factors of Q and Q³, Q a standard normal quantile, for variances near 0.40, 0.33 and 0.27 and kurtosis 3.
_GAUSSIAN_CURVES = (0.611578, 0.009913), (0.537020, 0.019023), (0.485753, 0.017207)
_GAUSSIAN_DIGEST = "8910fa607b3415cb"

OFFSETS_GROUP = 1  # hadamard4: sign planes are group 0, XOR offsets group 1
KEYS_GROUP = 1  # rademacher, gaussian: states are group 0, keys of groups 1


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


def states(pool: SeedPool, name: str, elements: I64) -> U64:
    """rademacher, gaussian: the 64 bits that element i = 64 t + 32 r + 16 h + 2 l + s shares for all h and s.

    They are words 2r (low) and 2r + 1 (high) of call 8 t + l of group 0, with r, h, s < 2 and l < 8.
    """
    four = stream(pool, name, elements // 64 * 8 + elements // 2 % 8, 0)
    r = elements // 32 % 2
    low, high = np.choose(r, four[::2]), np.choose(r, four[1::2])
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


def group_keys(pool: SeedPool, groups: I64) -> U64:
    """rademacher, gaussian: 64 bits a group of seeds, words 0 (low) and 1 of call `group`."""
    key = (pool.key & 0xFFFFFFFF, pool.key >> 32)
    low, high, _, _ = philox((groups, KINDS.index(pool.noise) << 24 | KEYS_GROUP, 0, 0), key)
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


def halfwords(state: U64, key: np.uint64, elements: I64) -> I64:
    """16 bits an element: of state ⊕ key, mixed, bits 32 s + 16 h and up (s and h as in `states`).

    x ← (S ⊕ G)·MIX₀, x ← (x ⊕ ⌊x/2³²⌋)·MIX₁, x ← x ⊕ ⌊x/2³²⌋, all modulo 2⁶⁴.
    """
    half = np.uint64(32)
    x = (state ^ key) * np.uint64(MIX[0])
    x = (x ^ x >> half) * np.uint64(MIX[1])
    x ^= x >> half
    shift = 32 * (elements % 2) + 16 * (elements // 16 % 2)
    return (x >> shift.astype(np.uint64) & np.uint64(0xFFFF)).astype(np.int64)


@lru_cache(1)
def gaussian_tables() -> tuple[F32, F32, F32]:
    """f_0 (64 entries), f_1 and f_2 (32 each), in units of 2^-16: a Gaussian value is the sum of one of each.

    f_t[h] = α_t Q + β_t Q³ where Q is the standard normal's quantile at (h + ½)/n: each table's kurtosis,
    and so the sum's, is 3.

    Raises:
        RuntimeError: This platform's logarithm is so far off that a value came out another: it cannot take
            part.
    """
    tables = []
    for (_, bits), (linear, cubic) in zip(FIELDS, _GAUSSIAN_CURVES, strict=True):
        n = 2**bits
        q = np.array([NormalDist().inv_cdf((h + 0.5) / n) for h in range(n // 2, n)])
        upper = np.rint((linear * q + cubic * (q * q * q)) * _GAUSSIAN_UNIT) / _GAUSSIAN_UNIT
        tables.append(np.concatenate([-upper[::-1], upper]).astype(np.float32))
    together = np.concatenate(tables)
    digest = hashlib.blake2b(together.astype("<f4").tobytes(), digest_size=8).hexdigest()
    if digest != _GAUSSIAN_DIGEST:
        raise RuntimeError(
            f"the Gaussian tables came out as {digest}, not {_GAUSSIAN_DIGEST}: use another noise"
        )
    for table in tables:
        table.setflags(write=False)
    return tables[0], tables[1], tables[2]


def z(pool: SeedPool, name: str, n: int, j: int, *, first: int = 0) -> F32:
    """The noise of seed j for elements [first, first + n) of a flattened tensor.

    rademacher: bit j mod 16 of the halfword of group ⌊j/16⌋: 1 is +1, 0 is −1.
    gaussian: the halfword v of group j gives f_0[v mod 64] + f_1[⌊v/64⌋ mod 32] + f_2[⌊v/2048⌋].
    binomial32: (bits set in the word of group j − 16) / √8.
    hadamard4: ½ Σ_{t<4} D_t[i] H[(i mod B) ⊕ r_t(⌊i/B⌋), j], with H[m, j] = −1 where m & j has odd parity.

    Raises:
        InputError: j is not a seed of the pool, or the range is outside what the format can hold.
    """
    j = pool.check_seed(j)
    elements = indices(first, n)
    if pool.noise in GROUP:
        group = j // GROUP[pool.noise]
        v = halfwords(states(pool, name, elements), group_keys(pool, np.array([group]))[0], elements)
        if pool.noise == "rademacher":
            return (2 * (v >> j % 16 & 1) - 1).astype(np.float32)
        f0, f1, f2 = gaussian_tables()  # multiples of 2^-16 below 8: their sums are exact
        return f0[v % 64] + f1[v // 64 % 32] + f2[v // 2048]
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
    total = np.zeros(n, np.int64)
    if pool.noise == "binomial32":
        for j in np.flatnonzero(q):
            total += int(q[j]) * (np.bitwise_count(words(pool, name, elements, int(j))).astype(np.int64) - 16)
        return (total * unit).astype(np.float32)
    state = states(pool, name, elements)
    keys = group_keys(pool, np.arange(pool.size) // GROUP[pool.noise])
    for j in np.flatnonzero(q):
        v = halfwords(state, keys[j], elements)
        if pool.noise == "rademacher":
            total += int(q[j]) * (2 * (v >> j % 16 & 1) - 1)
        else:
            for (bit, width), table in zip(FIELDS, contributions(q[j]), strict=True):
                total += table[v >> bit & 2**width - 1]
    return (total * unit).astype(np.float32)


def quantised(pool: SeedPool, a: F64) -> tuple[F64, float]:
    """Coefficients in units of a power of two, and the float64 unit of the integer sum.

    rademacher: integers q with Σ|q_j| < 2^29, so every partial sum fits 30 bits and any sum an int32.
    gaussian: unrounded; what is rounded is each q_j · f_t (`contributions`). Σ|q_j z_j| < 2^29 likewise.
    binomial32: integers with |q_j| ≤ 2^30, summed in int64; the unit holds the 1/√8.
    """
    sizes = np.abs(a)
    if pool.noise == "binomial32":
        bits, total = 30, float(sizes.max(initial=0.0))
    else:  # fsum is exact, so the scale does not depend on the order of the seeds
        bits, total = 29, math.fsum(sizes) * REACH[pool.noise]
    if total == 0.0:
        return np.zeros_like(a), 1.0
    bits = min(bits - math.frexp(total)[1], 1000)
    q = np.ldexp(a, bits)
    unit = math.ldexp(1.0, -bits)
    if pool.noise == "gaussian":
        return q, unit
    return np.rint(q), unit * ROOT_EIGHTH if pool.noise == "binomial32" else unit


def contributions(q: float) -> tuple[I64, I64, I64]:
    """gaussian: the integers that one seed adds, for each value of the three tables."""
    one, two, three = (np.rint(q * f.astype(np.float64)).astype(np.int64) for f in gaussian_tables())
    return one, two, three


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


def rounded(values: F32, dtype: str) -> U16:
    """The bits of the `bfloat16` or `float16` nearest to each value, ties to even.

    What is beyond the largest number rounds to an infinity; any NaN is 0x7FC0 or 0x7E00.
    """
    if dtype == "float16":
        with np.errstate(over="ignore", invalid="ignore"):
            bits = values.astype(np.float16).view(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7E00), bits)
    wide = values.view(np.uint32).astype(np.uint64)
    bits = (wide + 0x7FFF + (wide >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), bits)


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
