"""Noise added to bfloat16 and float16: the reference's bits for every number there is, wherever it lies."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch

from fedtune.bench import zo_step
from fedtune.zeroth import KINDS, SeedPool, delta, fast, rebuild_, reference, vector

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EVERY = np.arange(2**16, dtype=np.uint16)  # all numbers: zeros, subnormals, the largest, infinities, NaNs


def widened(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def expected(bits: np.ndarray, dtype: str, noise: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return reference.rounded(widened(bits, dtype) + noise, dtype)


def tensor(bits: np.ndarray, dtype: str, start: int = 0) -> torch.Tensor:
    """The numbers of these bits, `start` elements after the beginning of their memory."""
    room = torch.zeros(start + bits.size, dtype=DTYPES[dtype])
    w = room[start:]
    w.copy_(torch.from_numpy(bits.view(np.int16)).view(DTYPES[dtype]))
    return w


def bits_of(w: torch.Tensor) -> np.ndarray:
    return w.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 3e4, 2.0**99])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_gets_the_bits_of_the_reference(kind, dtype, scale):
    pool = SeedPool(6, 24, kind)
    a = np.random.default_rng(0).uniform(-1, 1, 24) * scale
    noise = delta(pool, "w", EVERY.size, a, first=5)
    want = expected(EVERY, dtype, noise)
    for threads in (1, 2):
        w0 = tensor(EVERY, dtype, start=threads)
        w = torch.empty_like(w0)
        rebuild_(w, w0, pool, "w", a, first=5, threads=threads)
        assert np.array_equal(bits_of(w), want)
        rebuild_(w0, w0, pool, "w", a, first=5, threads=threads)
        assert np.array_equal(bits_of(w0), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes_and_starts_touch_nothing_else(kind, dtype):
    pool, a = SeedPool(6, 24, kind), np.random.default_rng(1).normal(scale=1e-2, size=24)
    rng = np.random.default_rng(2)
    for n, first, start in ((0, 7, 1), (1, 0, 3), (31, 1023, 1), (33, 5, 2), (1023, 1, 7), (2049, 1000, 5)):
        bits = rng.integers(0, 2**16, n + start + 9, dtype=np.uint16)
        room = tensor(bits, dtype)
        before = bits_of(room).copy()
        w = room[start : start + n]
        rebuild_(w, w, pool, "w", a, first=first)
        noise = delta(pool, "w", n, a, first=first)
        assert np.array_equal(bits_of(w), expected(before[start : start + n], dtype, noise))
        assert np.array_equal(bits_of(room)[:start], before[:start])
        assert np.array_equal(bits_of(room)[start + n :], before[start + n :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard4_for_processors_without_avx512_gives_the_same_bits(dtype, monkeypatch):
    pool, a = SeedPool(11, 1500, "hadamard4"), np.random.default_rng(1).normal(scale=1e-3, size=1500)
    monkeypatch.setattr(vector, "HAS_PERMUTE", False)
    update = fast.Update(pool, a)
    monkeypatch.undo()
    w = tensor(EVERY, dtype)
    fast.run(update.jobs(w, w, "w", first=3), 1)
    assert np.array_equal(bits_of(w), expected(EVERY, dtype, delta(pool, "w", EVERY.size, a, first=3)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_rounds_as_pytorch_does_and_has_one_nan(dtype):
    rng = np.random.default_rng(3)
    values = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    ties = widened(EVERY, dtype)
    with np.errstate(invalid="ignore"):  # NaNs
        halfway = (ties[:-1].astype(np.float64) / 2 + ties[1:] / 2).astype(np.float32)
    ties = np.concatenate([ties, halfway])
    for some in (values, ties):
        found, real = reference.rounded(some, dtype), ~np.isnan(some)
        cast = bits_of(torch.from_numpy(some).to(DTYPES[dtype]))
        assert np.array_equal(found[real], cast[real])
        assert set(found[~real].tolist()) == {0x7E00 if dtype == "float16" else 0x7FC0}
    by_hand = {"bfloat16": (0x3F80, 0x3F82, 0x7F80), "float16": (0x3C00, 0x3C02, 0x7C00)}[dtype]
    unit = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
    # Half a unit above 1 is a tie that stays, half a unit below the next but one goes up; then an overflow.
    edge = np.array([1 + unit / 2, 1 + 3 * unit / 2, np.finfo(np.float32).max], np.float32)
    assert tuple(reference.rounded(edge, dtype).tolist()) == by_hand


def test_processors_without_instructions_for_float16_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(vector, "HAS_FLOAT16", False)
    wide, narrow = vector.widened, vector.narrowed

    @numba.njit
    def both(bits, up, values, down):
        for i in range(bits.size):
            up[i] = wide(bits[i])
        for i in range(values.size):
            down[i] = narrow(values[i], down[i])

    bits, up = EVERY.view(np.int16), np.empty(EVERY.size, np.float32)
    some = np.random.default_rng(3).integers(0, 2**32, 200_000, dtype=np.uint32)
    some[:100_000] = some[:100_000] % (70 << 23) + (80 << 23)  # from 2^-47 to 2^23: most of float16
    some[0::2] &= np.uint32(0xFFFFF000)  # halfway between two neighbours half of the time
    down = np.empty(some.size, np.int16)
    both(bits, up, some.view(np.float32), down)
    want, real = widened(EVERY, "float16"), ~np.isnan(up)
    assert np.array_equal(np.isnan(want), ~real)
    assert np.array_equal(up.view(np.uint32)[real], want.view(np.uint32)[real])
    assert np.array_equal(down.view(np.uint16), reference.rounded(some.view(np.float32), "float16"))


def test_the_benchmark_holds_half_precision_against_passes_of_its_own(monkeypatch):
    monkeypatch.setattr(zo_step, "REPEATS", 1)
    rows, ratios = zo_step.measure(64, 1, wide=(128, 1), dtypes=("float32", "bfloat16"))
    counts = sorted({row["parameters"] for row in rows})
    assert len(counts) == 2
    kinds = [(row["case"], row["parameters"], row["dtype"]) for row in rows]
    for count in counts:
        for dtype in ("float32", "bfloat16"):
            assert ("two forward passes", count, dtype) in kinds
            assert ("FedKSeed step, hadamard4", count, dtype) in kinds
            of = f"FedKSeed step, hadamard4 / two forward passes, {count:,} parameters, {dtype}"
            assert ratios[f"seconds: {of}"] > 0
            assert ratios[f"CPU seconds: {of}"] > 0
    assert len(kinds) == len(set(kinds)) == 2 * (3 + 2) + 3
