"""What the noise is: published Philox vectors, golden bits, the same by hand in plain Python, and moments."""

from __future__ import annotations

import hashlib
import struct
from statistics import NormalDist

import numpy as np
import pytest

from fedtune.errors import InputError
from fedtune.zeroth import (
    KINDS,
    NOISE_VERSION,
    SeedPool,
    canonical_name,
    delta,
    perturb_,
    reference,
    tensor_id,
    z,
)

NAMES = ("model.embed_tokens.weight", "lm_head.bias")
KEYS = (1, 0xFEDCBA9876543210)
K = 100


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, written from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        one, two = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [two >> 32 ^ c[1] ^ k[0], two & 0xFFFFFFFF, one >> 32 ^ c[3] ^ k[1], one & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def by_hand(kind: str, key: int, name: str, i: int, j: int) -> float:
    """z_j[i] of a pool of 100 seeds as docs/noise.md says it, one element at a time."""
    identity = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")

    def call(number: int, group: int) -> list[int]:
        code = ["gaussian", "rademacher", "binomial32", "hadamard4"].index(kind)
        counter = [number, code * 2**24 + group, identity % 2**32, identity >> 32]
        return philox(counter, [key % 2**32, key >> 32])

    if kind == "hadamard4":
        signs = [word >> i // 32 % 32 & 1 for word in call(i // 1024 * 32 + i % 32, 0)]
        rows = [i % 1024 ^ word % 1024 for word in call(i // 1024, 1)]
        return (
            sum((-1) ** sign * (-1) ** (row & j).bit_count() for sign, row in zip(signs, rows, strict=True))
            / 2
        )
    if kind == "binomial32":
        return (call(i // 1024 * 256 + i % 256, j)[i % 1024 // 256].bit_count() - 16) / 8**0.5
    group = j // 16 if kind == "rademacher" else j
    code = ["gaussian", "rademacher"].index(kind)
    low, high, *_ = philox([group, code * 2**24 + 1, 0, 0], [key % 2**32, key >> 32])
    four = call(i // 64 * 8 + i % 16 // 2, 0)
    half = i // 32 % 2
    x = (four[2 * half] + four[2 * half + 1] * 2**32) ^ (low + high * 2**32)
    x = x * 0xFF51AFD7ED558CCD % 2**64
    x = (x ^ x >> 32) * 0xC4CEB9FE1A85EC53 % 2**64
    x ^= x >> 32
    v = x >> (i % 2 * 32 + i // 16 % 2 * 16) & 0xFFFF
    if kind == "rademacher":
        return 1.0 if v >> j % 16 & 1 else -1.0
    parts = (
        (v % 64, 64, 0.611578, 0.009913),
        (v // 64 % 32, 32, 0.537020, 0.019023),
        (v // 2048, 32, 0.485753, 0.017207),
    )
    units = 0
    for h, n, linear, cubic in parts:
        q = NormalDist().inv_cdf((h + 0.5) / n)
        units += round((linear * q + cubic * q**3) * 65536)
    return units / 65536


def bits(values: np.ndarray) -> str:
    return np.ascontiguousarray(values, dtype=">f4").tobytes().hex(" ", 4)


# fmt: off
GOLDEN = {
    ("gaussian", KEYS[0], NAMES[0], 0, 0):
        "3f658b00 3ec0ec00 3fdb6080 bf4e8200 bf21d800 3fbaae80 3e15d800 3ec54e00",
    ("gaussian", KEYS[0], NAMES[0], 0, 33):
        "bfaf7500 3f169c00 3f14c500 bebf7e00 3ee20800 3f5e6f00 3e420800 3e7c3800",
    ("gaussian", KEYS[0], NAMES[1], 1020, 99):
        "bf6fcf00 3ea82400 3e1b3000 3f159800 3f303700 be845800 beb20400 3f078600",
    ("gaussian", KEYS[1], NAMES[0], 70000, 34):
        "3d679000 3f61c000 be9dba00 bf3c1300 3f418e00 bf0fc300 3ed64800 3e9c0200",
    ("gaussian", KEYS[1], NAMES[1], 5000, 1):
        "3f178700 bec58e00 bf6ff600 3edf3400 be81e400 bf4b5600 beff3a00 bf212700",
    ("gaussian", KEYS[1], NAMES[0], 8589934844, 98):
        "bf90bc80 3fdc7e00 be89f200 3d9f0800 bf6ef100 4000bc00 bf618200 3f22c500",
    ("rademacher", KEYS[0], NAMES[0], 0, 0):
        "bf800000 bf800000 3f800000 bf800000 bf800000 bf800000 bf800000 bf800000",
    ("rademacher", KEYS[0], NAMES[0], 0, 33):
        "bf800000 3f800000 3f800000 bf800000 bf800000 3f800000 bf800000 3f800000",
    ("rademacher", KEYS[0], NAMES[1], 1020, 99):
        "bf800000 3f800000 bf800000 bf800000 bf800000 bf800000 bf800000 bf800000",
    ("rademacher", KEYS[1], NAMES[0], 70000, 34):
        "bf800000 bf800000 3f800000 3f800000 3f800000 3f800000 3f800000 3f800000",
    ("rademacher", KEYS[1], NAMES[1], 5000, 1):
        "3f800000 3f800000 3f800000 bf800000 3f800000 bf800000 bf800000 bf800000",
    ("rademacher", KEYS[1], NAMES[0], 8589934844, 98):
        "3f800000 3f800000 bf800000 bf800000 3f800000 3f800000 bf800000 bf800000",
    ("binomial32", KEYS[0], NAMES[0], 0, 0):
        "3eb504f3 3eb504f3 bfb504f3 3fb504f3 3fb504f3 3f87c3b6 3f87c3b6 00000000",
    ("binomial32", KEYS[0], NAMES[0], 0, 33):
        "3f3504f3 bf3504f3 beb504f3 3f3504f3 c01e6455 3eb504f3 beb504f3 bf3504f3",
    ("binomial32", KEYS[0], NAMES[1], 1020, 99):
        "beb504f3 4007c3b6 3f3504f3 bf3504f3 bfe24630 beb504f3 3eb504f3 beb504f3",
    ("binomial32", KEYS[1], NAMES[0], 70000, 34):
        "3eb504f3 4007c3b6 beb504f3 3fb504f3 00000000 beb504f3 bfb504f3 bf87c3b6",
    ("binomial32", KEYS[1], NAMES[1], 5000, 1):
        "3eb504f3 bf87c3b6 3f87c3b6 bf3504f3 bf3504f3 4007c3b6 beb504f3 bfb504f3",
    ("binomial32", KEYS[1], NAMES[0], 8589934844, 98):
        "3fb504f3 00000000 00000000 3eb504f3 3fe24630 bf87c3b6 bf3504f3 bf3504f3",
    ("hadamard4", KEYS[0], NAMES[0], 0, 0):
        "3f800000 00000000 00000000 3f800000 bf800000 3f800000 bf800000 3f800000",
    ("hadamard4", KEYS[0], NAMES[0], 0, 33):
        "3f800000 40000000 00000000 3f800000 3f800000 bf800000 bf800000 3f800000",
    ("hadamard4", KEYS[0], NAMES[1], 1020, 99):
        "bf800000 3f800000 bf800000 3f800000 00000000 c0000000 bf800000 bf800000",
    ("hadamard4", KEYS[1], NAMES[0], 70000, 34):
        "00000000 40000000 00000000 00000000 40000000 c0000000 bf800000 00000000",
    ("hadamard4", KEYS[1], NAMES[1], 5000, 1):
        "bf800000 00000000 00000000 3f800000 00000000 3f800000 bf800000 bf800000",
    ("hadamard4", KEYS[1], NAMES[0], 8589934844, 98):
        "3f800000 00000000 bf800000 3f800000 bf800000 bf800000 00000000 3f800000",
}
GOLDEN_DELTA = {
    "gaussian": "3f0ca2a7 bea2f992 3f8401df 3e1caaa8 3e374ca0 3eda0e34 be0ed914 bea13d88",
    "rademacher": "bddd8000 bf53b000 3e7fc000 3f201000 3e42c000 3e2fc000 bf263000 3efca000",
    "binomial32": "3f0560c6 3e64653f 3e649280 bf2499e8 3f3fde77 3e4ebd87 3e5958d2 3e890bcf",
    "hadamard4": "be864000 3f077000 bf35c000 3f8c3800 3e8fe000 3e51c000 3f34a000 bf6e5000",
}
# fmt: on


def coefficients() -> np.ndarray:
    """100 numbers of both signs and several sizes, exact in binary."""
    return np.array([(37 * j % 101 - 50) / 2.0 ** (8 + j % 5) for j in range(K)])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, 0xFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, words):
    expected = [int(word, 16) for word in words.split()]
    assert philox([counter] * 4, [key] * 2) == expected
    assert [int(word) for word in reference.philox((counter,) * 4, (key,) * 2)] == expected


def test_philox_gives_the_published_answer_for_the_digits_of_pi():
    got = reference.philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    assert " ".join(f"{int(word):08x}" for word in got) == "d16cfe09 94fdcceb 5001e420 24126ea1"


def test_version_and_kinds_are_those_that_the_golden_values_pin():
    assert NOISE_VERSION == 2
    assert KINDS == ("gaussian", "rademacher", "binomial32", "hadamard4")
    assert {kind for kind, *_ in GOLDEN} == set(KINDS) == set(GOLDEN_DELTA)


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_values_never_change(case):
    kind, key, name, first, j = case
    assert bits(z(SeedPool(key, K, kind), name, 8, j, first=first)) == GOLDEN[case]
    by_the_fast_path = np.zeros(8, np.float32)
    perturb_(by_the_fast_path, SeedPool(key, K, kind), name, j, 1.0, first=first)
    assert bits(by_the_fast_path + 0.0) == bits(z(SeedPool(key, K, kind), name, 8, j, first=first) + 0.0)
    assert bits([by_hand(kind, key, name, first + i, j) for i in range(8)]) == GOLDEN[case]


@pytest.mark.parametrize("kind", KINDS)
def test_golden_sums_never_change(kind):
    got = delta(SeedPool(KEYS[1], K, kind), NAMES[0], 8, coefficients(), first=1020)
    assert bits(got) == GOLDEN_DELTA[kind]
    exact = [
        sum(a * by_hand(kind, KEYS[1], NAMES[0], i, j) for j, a in enumerate(coefficients()))
        for i in range(1020, 1028)
    ]
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-6)


def test_a_tensor_id_is_the_hash_of_its_canonical_name():
    assert tensor_id("a.b") == struct.unpack("<Q", hashlib.blake2b(b"a.b", digest_size=8).digest())[0]
    assert canonical_name("module._orig_mod.layers.0._fsdp_wrapped_module.weight") == "layers.0.weight"
    assert canonical_name("encoder.module.weight") == "encoder.module.weight"
    assert tensor_id("_orig_mod.a.b") == tensor_id("a.b")


# Standard errors over 8 seeds × 50,000 elements: mean 0.0016, variance ≤ 0.0022, fourth moment ≤ 0.016.
@pytest.mark.parametrize(
    ("kind", "kurtosis"),
    [("gaussian", 3.0), ("rademacher", 1.0), ("binomial32", 3 - 2 / 32), ("hadamard4", 2.5)],
)
def test_moments(kind, kurtosis):
    pool = SeedPool(2024, 64, kind)
    values = np.stack([z(pool, "w", 50_000, j) for j in (0, 1, 2, 17, 31, 32, 62, 63)]).astype(np.float64)
    assert abs(values.mean()) < 0.007
    assert abs((values**2).mean() - 1) < 0.009
    assert abs((values**4).mean() - kurtosis) < 0.06
    assert np.abs(np.corrcoef(values) - np.eye(8)).max() < 0.02  # between seeds: standard error 0.0045
    shifted = [
        np.corrcoef(values[:, :-lag].ravel(), values[:, lag:].ravel())[0, 1] for lag in (1, 16, 256, 1024)
    ]
    assert np.abs(shifted).max() < 0.007  # between elements: standard error 0.0016


def test_the_entries_of_hadamard4_are_binomial():
    values = z(SeedPool(5, 300, "hadamard4"), "w", 64_000, 137)
    share = [(values == level).mean() for level in (-2, -1, 0, 1, 2)]
    np.testing.assert_allclose(share, np.array([1, 4, 6, 4, 1]) / 16, atol=0.009)


def test_a_gaussian_value_is_nearly_normal():
    tables = [table.astype(np.float64) for table in reference.gaussian_tables()]
    assert [table.size for table in tables] == [64, 32, 32]
    for table in tables:
        np.testing.assert_array_equal(table, -table[::-1])
        assert np.all(np.diff(table) > 0)
    f0, f1, f2 = tables
    values = np.sort((f0[:, None, None] + f1[:, None] + f2).ravel())
    assert values.size == 65536
    assert np.unique(values).size == 57317
    assert abs((values**2).mean() - 1) < 4e-6
    assert abs((values**4).mean() - 3) < 1e-4
    assert abs((values**6).mean() - 14.79) < 0.01  # the normal's is 15
    assert 4.18 < values[-1] < 4.19 < reference.REACH["gaussian"]
    normal = np.array([NormalDist().cdf(v) for v in values[::16]])
    assert np.abs(normal - (np.arange(0, 65536, 16) + 0.5) / 65536).max() < 0.0014


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_seeds_that_share_a_state_are_unrelated(kind):
    """All pairs, and random triples and quadruples: mixing one state with K/16 or K keys must not show."""
    k, n = 256, 16_384
    pool = SeedPool(31, k, kind)
    zs = np.stack([z(pool, "layers.0.weight", n, j) for j in range(k)])
    pairs = (zs @ zs.T / np.sqrt(n))[np.triu_indices(k, 1)].astype(np.float64)
    assert abs((pairs**2).mean() - 1) < 0.04  # 32,640 squares of nearly normal numbers: standard error 0.008
    assert np.abs(pairs).max() < 5.5
    eigenvalues = np.linalg.eigvalsh(zs @ zs.T / n)  # Marchenko-Pastur: (1 ± √(k/n))² = 0.766, 1.266
    assert 0.74 < eigenvalues[0] < eigenvalues[-1] < 1.30
    chosen = np.random.default_rng(1).integers(0, k // 4, (400, 4)) + np.arange(4) * (k // 4)
    for order in (3, 4):
        products = [float(np.prod(zs[row[:order]], axis=0).mean(dtype=np.float64)) * n**0.5 for row in chosen]
        assert abs(np.square(products).mean() - 1) < 0.35  # standard error 0.07
    # Between elements that share a state (i, i + 1, i + 16, i + 17), over all seeds.
    for lag in (1, 16, 17, 32):
        along = (zs[:, :-lag] * zs[:, lag:]).sum(0, dtype=np.float64) / np.sqrt(k)
        assert abs(np.square(along).mean() - 1) < 0.08


@pytest.mark.parametrize("kind", KINDS)
def test_names_keys_and_kinds_give_unrelated_noise(kind):
    def draw(key: int, name: str) -> np.ndarray:
        return z(SeedPool(key, 8, kind), name, 20_000, 3).astype(np.float64)

    one = draw(1, "layers.0.weight")
    for other in (draw(1, "layers.1.weight"), draw(2, "layers.0.weight"), draw(1 + 2**32, "layers.0.weight")):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_a_part_is_the_part_of_the_noise(kind):
    pool = SeedPool(9, 40, kind)
    whole = z(pool, "w", 3000, 33)
    np.testing.assert_array_equal(z(pool, "w", 1000, 33, first=1700), whole[1700:2700])
    assert z(pool, "w", 0, 33).shape == (0,)
    assert whole.dtype == np.float32


def test_elements_far_into_a_tensor_have_numbers_of_their_own():
    for kind in KINDS:
        pool = SeedPool(3, 2, kind)
        near, far = z(pool, "w", 4096, 1), z(pool, "w", 4096, 1, first=2**34 - 4096)
        assert abs(np.corrcoef(near, far)[0, 1]) < 0.08
        with pytest.raises(InputError, match="2\\^34"):
            z(pool, "w", 4097, 1, first=2**34 - 4096)


@pytest.mark.parametrize("size", [0, -1, 65_537, 1.5, True])
def test_a_pool_that_no_index_can_name_is_refused_with_the_limits(size):
    with pytest.raises(InputError, match=r"1 to 65,536 seeds.*16 bits"):
        SeedPool(0, size, "rademacher")


def test_a_pool_may_hold_one_seed_or_all_that_16_bits_can_name():
    assert SeedPool(0, 1).block == 1024
    assert SeedPool(0, 1025).block == 2048
    assert SeedPool(2**64 - 1, 65_536).block == 65_536


@pytest.mark.parametrize("key", [-1, 2**64, "7"])
def test_a_key_of_more_than_64_bits_is_refused(key):
    with pytest.raises(InputError, match=r"integer in \[0, 2\^64\)"):
        SeedPool(key, 8)


def test_an_unknown_noise_names_the_nearest():
    with pytest.raises(InputError, match='Did you mean "rademacher"'):
        SeedPool(0, 8, "rademach")  # type: ignore[arg-type]


@pytest.mark.parametrize("j", [-1, 8, 1.0])
def test_a_seed_outside_the_pool_is_refused(j):
    with pytest.raises(InputError, match=r"\[0, 8\)"):
        z(SeedPool(0, 8), "w", 4, j)
