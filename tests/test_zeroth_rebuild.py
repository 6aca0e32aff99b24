"""Perturb and rebuild: the fast path against the reference bit for bit, half precision, names, bad input."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedtune.errors import InputError
from fedtune.zeroth import (
    KINDS,
    SeedPool,
    delta,
    fast,
    perturb_,
    perturb_all_,
    perturbed_names,
    rebuild_,
    rebuild_all_,
    rebuild_perturbed_,
    rebuild_perturbed_all_,
    reference,
    z,
)


def weights(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.02, size=n).astype(np.float32)


def coefficients(k: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=1e-3, size=k)


def same_bits(one, two) -> bool:
    one, two = np.asarray(one), np.asarray(two)
    return one.dtype == two.dtype and one.tobytes() == two.tobytes()


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    k=st.integers(1, 70),
    n=st.sampled_from([0, 1, 15, 16, 1023, 1024, 1025, 2048, 3000]) | st.integers(0, 5000),
    first=st.sampled_from([0, 1, 1024, 1000, 2**32 - 7]) | st.integers(0, 5000),
    data=st.data(),
)
def test_the_fast_path_is_the_reference_bit_for_bit(kind, k, n, first, data):
    pool = SeedPool(data.draw(st.integers(0, 2**64 - 1)), k, kind)
    a = np.array(data.draw(st.lists(st.floats(-1e3, 1e3), min_size=k, max_size=k)))
    w0 = weights(n)
    w = np.empty_like(w0)
    rebuild_(w, w0, pool, "w", a, first=first)
    assert same_bits(w, w0 + delta(pool, "w", n, a, first=first))


@pytest.mark.parametrize(
    ("kind", "k", "n"),
    [
        ("hadamard4", 1024, 9000),
        ("hadamard4", 1025, 9000),
        ("hadamard4", 4096, 40_000),
        ("hadamard4", 8192, 40_000),
        ("hadamard4", 65_536, 140_000),
        ("rademacher", 4096, 3000),
        ("gaussian", 1024, 3000),
        ("binomial32", 1024, 3000),
    ],
)
def test_the_fast_path_is_the_reference_for_large_pools(kind, k, n):
    pool, a, w0 = SeedPool(11, k, kind), coefficients(k), weights(n)
    w = w0.copy()
    rebuild_(w, w, pool, "w", a)  # w is w0
    assert same_bits(w, w0 + delta(pool, "w", n, a))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_the_kernel_for_processors_without_avx512_gives_the_same_bits(kind, monkeypatch):
    from fedtune.zeroth import kernels

    pool, a, w0 = SeedPool(11, 100, kind), coefficients(100), weights(5000)
    w = np.empty_like(w0)
    monkeypatch.setitem(kernels.KERNELS, kind, kernels.looked_up_plain)
    rebuild_(w, w0, pool, "w", a, first=3)
    assert same_bits(w, w0 + delta(pool, "w", 5000, a, first=3))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize(
    "a", [np.eye(1, 40, 17)[0] * (1 - 2.0**-40), np.full(40, -1.0), np.full(40, 2.0**-900)]
)
def test_the_largest_sums_still_fit_their_digits(kind, a):
    pool = SeedPool(3, 40, kind)
    q, _ = reference.quantised(pool, a)
    assert np.abs(q).sum() * (4.184 if kind == "gaussian" else 1) + 40 < 2**29 - 24_576
    if kind == "rademacher":  # 16 equal signs: the largest sum of a group
        assert np.abs(fast.tabled(pool, a)[1]).max() < 2**29
    n = 100_000
    w = np.zeros(n, np.float32)
    rebuild_(w, w, pool, "w", a)
    assert same_bits(w + np.float32(0), delta(pool, "w", n, a) + np.float32(0))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_tables_hold_what_a_halfword_adds(kind):
    pool, a = SeedPool(3, 40, kind), coefficients(40)
    a[16:32] = 0  # a group of rademacher, sixteen of gaussian
    keys, tables, unit = fast.tabled(pool, a)
    assert tables.shape == (len(keys), 128)
    assert len(keys) == (2 if kind == "rademacher" else 24)
    v, row = 0b10110_01101_110010, tables[-1].astype(np.int64)
    got = (row[v % 64] + row[64 + v // 64 % 32] + row[96 + v // 2048]) * unit
    if kind == "gaussian":
        f0, f1, f2 = reference.gaussian_tables()
        expected = a[39] * float(f0[0b110010] + f1[0b01101] + f2[0b10110])
    else:
        expected = sum(a[32 + bit] * (1 if v >> bit & 1 else -1) for bit in range(8))
    assert got == pytest.approx(expected, abs=20 * unit)


def test_hadamard4_for_processors_without_avx512_gives_the_same_bits(monkeypatch):
    k, n = 1500, 9000
    pool, a, w0 = SeedPool(11, k, "hadamard4"), coefficients(k), weights(n)
    from fedtune.zeroth import vector

    monkeypatch.setattr(vector, "HAS_PERMUTE", False)
    update = fast.Update(pool, a)
    monkeypatch.undo()
    assert update.tables[0].size == 16 * pool.block
    w = np.empty_like(w0)
    fast.run(update.jobs(w, w0, "w", first=3), 1)
    assert same_bits(w, w0 + delta(pool, "w", n, a, first=3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rebuild_is_the_sum_of_the_single_noises(kind):
    k, n = 200, 2500
    pool, a = SeedPool(5, k, kind), coefficients(k)
    dense = sum(a[j] * z(pool, "w", n, j).astype(np.float64) for j in range(k))
    got = delta(pool, "w", n, a)
    # Integer sums keep 30 bits of Σ|a|; hadamard4 rounds H a and three sums to float32.
    assert np.abs(got - dense).max() < 4e-7 * np.abs(a).sum()
    assert np.linalg.norm(got - dense) < 2e-6 * np.linalg.norm(dense)


@pytest.mark.parametrize(
    ("kind", "bound"), [("rademacher", 3e-6), ("gaussian", 2e-5), ("binomial32", 1e-7), ("hadamard4", 1e-7)]
)
def test_what_a_sum_over_4096_seeds_rounds_off(kind, bound):
    k, n = 4096, 200
    pool, a = SeedPool(5, k, kind), coefficients(k)
    got = np.zeros(n, np.float32)
    rebuild_(got, got, pool, "w", a)
    # The sum of single noises in float64, each drawn by the fast path with a scale that it holds exactly.
    dense, one = np.zeros(n), np.zeros(n, np.float32)
    for j in range(k):
        one[:] = 0
        perturb_(one, pool, "w", j, 1.0, threads=1)
        dense += a[j] * one.astype(np.float64)
    assert np.linalg.norm(got - dense) < bound * np.linalg.norm(dense)


@pytest.mark.parametrize("kind", KINDS)
def test_one_perturbation_adds_scale_times_z(kind):
    pool, w0 = SeedPool(5, 77, kind), weights(2000)
    w = w0.copy()
    perturb_(w, pool, "w", 70, 2.0**-11)
    assert same_bits(w, w0 + np.float32(2.0**-11) * z(pool, "w", 2000, 70))
    v = w0.copy()
    perturb_(v, pool, "w", 70, 5e-4)
    np.testing.assert_allclose(v - w0, 5e-4 * z(pool, "w", 2000, 70).astype(np.float64), atol=3e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_pass_is_a_rebuild_with_one_more_term(kind):
    pool, w0, a = SeedPool(5, 60, kind), weights(3000), coefficients(60)
    w, expected = np.empty_like(w0), np.empty_like(w0)
    rebuild_perturbed_(w, w0, pool, "w", a, 33, -5e-4)
    more = a.copy()
    more[33] += -5e-4
    rebuild_(expected, w0, pool, "w", more)
    assert same_bits(w, expected)
    dense = sum(more[j] * z(pool, "w", 3000, j).astype(np.float64) for j in range(60))
    np.testing.assert_allclose(w, w0 + dense, atol=1e-7)
    rebuild_perturbed_(w, w0, pool, "w", a, 33, 0.0)
    rebuild_(expected, w0, pool, "w", a)
    assert same_bits(w, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_pieces_give_the_same_bits(kind, dtype):
    k, n = 33, 150_000
    pool, a = SeedPool(8, k, kind), coefficients(k)
    w0 = torch.from_numpy(weights(n)).to(dtype)
    results = []
    for threads in (1, 2, 5):
        w = torch.empty_like(w0)
        rebuild_(w, w0, pool, "w", a, threads=threads)
        results.append(w)
    cut = torch.empty_like(w0)
    for start, stop in ((0, 1), (1, 1000), (1000, 70_001), (70_001, n)):  # shards of one tensor
        rebuild_(cut[start:stop], w0[start:stop], pool, "w", a, first=start, threads=2)
    for other in (*results[1:], cut):
        assert torch.equal(results[0], other)
    assert not torch.equal(results[0], w0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_one_cast_of_the_float32_sum(kind, dtype):
    pool, a = SeedPool(6, 50, kind), coefficients(50)
    w0 = torch.from_numpy(weights(40_000)).to(dtype).view(200, 200)
    before = w0.clone()
    w = torch.empty_like(w0)
    rebuild_(w, w0, pool, "w", a)
    expected = (w0.float().view(-1) + torch.from_numpy(delta(pool, "w", 40_000, a))).to(dtype).view(200, 200)
    assert torch.equal(w, expected)
    assert torch.equal(w0, before)


def test_bfloat16_rounds_to_nearest_even():
    pool = SeedPool(0, 1, "rademacher")
    sign = torch.from_numpy(z(pool, "w", 64, 0))
    w0 = sign.to(
        torch.bfloat16
    )  # ±1, so that sign · (1 + scale) is what is rounded; the neighbours are 2^-7 apart
    for scale, expected in ((2.0**-8, 1.0), (2.0**-8 + 2.0**-20, 1 + 2.0**-7), (3 * 2.0**-8, 1 + 2.0**-6)):
        w = w0.clone()
        perturb_(w, pool, "w", 0, scale)
        assert torch.equal(w.float(), sign * expected)


def test_tensors_of_any_shape_are_written_where_they_lie():
    pool, a = SeedPool(4, 9, "hadamard4"), coefficients(9)
    parameter = nn.Parameter(torch.zeros(6, 50, 7))
    rebuild_(parameter, parameter, pool, "w", a)
    assert same_bits(parameter.detach().view(-1), delta(pool, "w", 2100, a))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_perturbed_by_name_whatever_the_order(kind):
    pool, a = SeedPool(4, 40, kind), coefficients(40)
    start = {"b.weight": weights(1500, 1), "a.weight": weights(1500, 1), "c.bias": weights(3, 2)}
    one = {name: w.copy() for name, w in start.items()}
    two = {f"module._orig_mod.{name}": one[name].copy() for name in reversed(one)}
    rebuild_all_(one, start, pool, a, threads=2)
    rebuild_all_(two, start, pool, a, threads=1)
    for name, w in one.items():
        assert same_bits(w, two[f"module._orig_mod.{name}"])
        assert same_bits(w, start[name] + delta(pool, name, w.size, a))
    assert not same_bits(one["a.weight"], one["b.weight"])  # equal shapes and values, other names

    three = {name: w.copy() for name, w in start.items()}
    rebuild_perturbed_all_(three, start, pool, a, 7, 5e-4)
    perturb_all_(one, pool, 7, 5e-4)
    for name in start:
        np.testing.assert_allclose(three[name], one[name], atol=2e-8)


def test_tied_tensors_once_and_frozen_and_integer_ones_never():
    table = nn.Parameter(torch.zeros(10, 4))
    model = {
        "lm_head.weight": table,
        "embed.weight": nn.Parameter(table.detach().view(10, 4)),  # the same memory
        "frozen": nn.Parameter(torch.zeros(5), requires_grad=False),
        "ids": torch.arange(5),
        "flags": np.ones(3, bool),
        "empty": torch.zeros(0),
    }
    assert list(perturbed_names(model)) == ["embed.weight", "empty"]
    pool = SeedPool(4, 8, "rademacher")
    perturb_all_(model, pool, 3, 1.0)
    assert same_bits(table.detach().view(-1), z(pool, "embed.weight", 40, 3))
    assert torch.equal(model["frozen"], torch.zeros(5))
    assert torch.equal(model["ids"], torch.arange(5))


def test_names_and_memory_that_clash_are_refused():
    with pytest.raises(InputError, match=r"two tensors are called 'a\.b'"):
        perturbed_names({"a.b": weights(3), "module.a.b": weights(4)})
    memory = torch.zeros(10)
    with pytest.raises(InputError, match="share a part of their memory"):
        perturbed_names({"a": memory[:6], "b": memory[4:]})
    assert list(perturbed_names({"a": memory[:5], "b": memory[5:]})) == ["a", "b"]


def test_a_missing_initial_tensor_is_named_and_nothing_is_written():
    model = {"a": weights(5), "b": weights(5)}
    before = model["a"].copy()
    with pytest.raises(InputError, match="no initial weights for 'b'"):
        rebuild_all_(model, {"a": model["a"]}, SeedPool(0, 4), coefficients(4))
    assert same_bits(model["a"], before)


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (np.zeros(7), r"needs 8 coefficients, got shape \(7,\): is this the accumulator of another pool"),
        (np.zeros((8, 1)), r"got shape \(8, 1\)"),
        ([0, 0, math.nan, 0, 0, 0, 0, 0], r"got nan for seed 2 \(1 of 8 are bad\)"),
        ([0, math.inf, 0, 0, 0, 0, -math.inf, 0], r"got inf for seed 1 \(2 of 8 are bad\)"),
        ([0, 0, 0, 0, 0, 0, 0, 1e31], r"below 2\^100, got 1e\+31 for seed 7"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_coefficients_are_refused_and_named(kind, a, message):
    w = weights(5)
    with pytest.raises(InputError, match=message):
        rebuild_(w, w, SeedPool(0, 8, kind), "w", a)
    assert same_bits(w, weights(5))


def test_initial_weights_may_be_read_only_but_not_what_is_written():
    pool, a, w0 = SeedPool(0, 8, "hadamard4"), coefficients(8), weights(2000)
    w0.flags.writeable = False  # as a memory-mapped file is
    w = np.empty_like(w0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rebuild_(w, w0, pool, "w", a)
    assert same_bits(w, w0 + delta(pool, "w", 2000, a))
    with pytest.raises(InputError, match="w: the array to write is read-only"):
        rebuild_(w0, w0, pool, "w", a)


def test_bad_tensors_scales_and_threads_are_refused():
    pool = SeedPool(0, 8, "rademacher")
    w = torch.zeros(6)
    cases = [
        (torch.zeros(6, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(6, dtype=torch.float64), "got torch.float64"),
        (torch.zeros(4, 6)[:, ::2], "must be contiguous"),
        (torch.zeros(6, device="meta"), "got device meta"),
        (np.zeros(6, np.float32)[::-1], "must be contiguous"),
        (np.zeros(6, ">f4"), "got >f4"),
    ]
    for bad, message in cases:
        with pytest.raises(InputError, match=f"layer.w: .*{message}"):
            perturb_(bad, pool, "layer.w", 0, 1.0)
    with pytest.raises(InputError, match="one size and dtype"):
        rebuild_(w, torch.zeros(5), pool, "w", np.zeros(8))
    with pytest.raises(InputError, match="got nan for seed 3"):
        perturb_(w, pool, "w", 3, math.nan)
    with pytest.raises(InputError, match=r"in \[0, 8\)"):
        perturb_(w, pool, "w", 8, 1.0)
    with pytest.raises(InputError, match="threads must be at least 1, got 0"):
        perturb_(w, pool, "w", 0, 1.0, threads=0)
    assert torch.equal(w, torch.zeros(6))


@pytest.mark.parametrize("kind", KINDS)
def test_no_coefficients_and_tiny_ones_leave_or_move_the_weights(kind):
    pool, w0 = SeedPool(0, 8, kind), weights(2000)
    w = w0.copy()
    rebuild_(w, w0, pool, "w", np.zeros(8))
    assert same_bits(w, w0)
    small = np.full(8, 1e-300)
    assert not delta(pool, "w", 2000, small).any()
    small = np.full(8, 1e-30)
    assert 2e-30 < delta(pool, "w", 2000, small).astype(np.float64).std() < 4e-30  # √8 · 1e-30


def test_importing_the_package_compiles_nothing():
    code = "import sys, fedtune.zeroth; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_kernels_compile_where_nothing_can_be_cached(monkeypatch):
    from fedtune.zeroth import kernels

    asked = []

    def njit(**options):
        asked.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(kernels.numba, "njit", njit)
    assert kernels.jit(len) is len
    assert [options.get("cache", False) for options in asked] == [True, False]


def test_an_update_is_prepared_once_for_many_tensors():
    pool, a = SeedPool(1, 300, "hadamard4"), coefficients(300)
    update = fast.Update(pool, a)
    for name in ("x", "y"):
        w0 = weights(1234)
        w = np.empty_like(w0)
        fast.run(update.jobs(w, w0, name), 1)
        assert same_bits(w, w0 + delta(pool, name, 1234, a))


def test_the_benchmark_compares_every_kind_with_the_loop_and_the_plain_pass():
    from fedtune.bench import rebuild

    before = torch.get_num_threads()
    state = torch.get_rng_state()
    rows, ratios = rebuild.measure(2 * 64**2, large=4 * 64**2, width=64, seeds=(4, 8), threads=(1, 2))
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)
    small = [row for row in rows if row["parameters"] == 8192]
    assert len(small) == 2 * (1 + 2 * (2 + len(KINDS)) + 4)  # and two rows each of bfloat16 and float16
    assert len(rows) - len(small) == 1 + 2 + len(KINDS) + 4
    assert all((row["K"] or 8, row["threads"]) == (8, 2) for row in rows if row["parameters"] == 16_384)
    assert all(row["seconds"] > 0 for row in rows)
    assert {row["case"] for row in rows} >= {"w += 1", "hadamard4", "gaussian (one tensor of 2, scaled)"}
    by_case = {(row["case"].split(" (")[0], row["threads"]): row["seconds"] for row in small if row["K"] != 4}
    for name in ("paper's torch loop", "torch loop in place"):
        assert ratios[f"seconds: {name} / rademacher, K = 8, 1 thread"] == pytest.approx(
            by_case[name, 1] / by_case["rademacher", 1]
        )
    for dtype in ("bfloat16", "float16"):
        assert ratios[f"seconds: hadamard4 / w += 1, {dtype}, K = 8, 2 threads"] == pytest.approx(
            by_case[f"hadamard4, {dtype}", 2] / by_case[f"w += 1, {dtype}", 2]
        )
    assert ratios["seconds: hadamard4 / w += 1, K = 8, 2 threads"] == pytest.approx(
        by_case["hadamard4", 2] / by_case["w += 1", 2]
    )
    # By K: both clocks, and one with 2 threads; in half precision with the last K alone.
    assert len(ratios) == 2 * 3 * (2 * len(KINDS) + 1) + 2 * 3
    cpu = {(row["case"], row["threads"]): row["CPU seconds"] for row in small if row["K"] != 4}
    assert ratios["CPU seconds: hadamard4 / w += 1, K = 8, 1 thread"] == pytest.approx(
        cpu["hadamard4", 1] / cpu["w += 1", 1]
    )


def test_the_benchmark_times_the_papers_update_in_both_forms():
    from fedtune.bench import rebuild

    torch.manual_seed(7)
    z0, z1 = torch.normal(0.0, 1.0, (3, 4)), torch.normal(0.0, 1.0, (5,))
    for step in (rebuild.out_of_place, rebuild.in_place):
        model = {"a": torch.ones(3, 4), "b": torch.ones(5)}
        rebuild.seed_of_loop(model, step)
        torch.testing.assert_close(model["a"], 1 - 1e-6 * z0)
        torch.testing.assert_close(model["b"], 1 - 1e-6 * z1)
