"""The GPU path bit for bit against the reference: in Triton's interpreter, as compiled code, and on a GPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune import zeroth
from fedtune.errors import InputError
from fedtune.zeroth import (
    KINDS,
    Prepared,
    SeedPool,
    delta,
    fast,
    gpu,
    perturb_,
    perturb_all_,
    rebuild_,
    rebuild_all_,
    rebuild_perturbed_,
    rebuild_perturbed_all_,
    reference,
    tensors,
    z,
)

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
KERNELS = "fedtune.zeroth.triton_kernels"


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """The kernels, loaded a second time for Triton's interpreter, which runs them on CPU tensors."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read while a kernel is loaded
        spec = importlib.util.find_spec(KERNELS)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        patch.setitem(sys.modules, KERNELS, module)
        patch.setattr(zeroth, "triton_kernels", module, raising=False)
        yield


@pytest.fixture
def taken_for_gpu(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's tensors go the way of those on a GPU; arrays stay on the CPU."""
    monkeypatch.setattr(tensors, "on_gpu", lambda w: isinstance(w, torch.Tensor))


def weights(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    drawn = np.random.default_rng(seed).normal(scale=0.02, size=n)
    return torch.from_numpy(drawn.astype(np.float32)).to(dtype)


def coefficients(k: int, used: int | None = None) -> np.ndarray:
    """K numbers, all of them or only the first, the last and some between not zero."""
    a = np.random.default_rng(1).normal(scale=1e-3, size=k)
    if used is not None:
        kept = np.unique(np.linspace(0, k - 1, used).astype(int))
        a[np.setdiff1d(np.arange(k), kept)] = 0.0
    return a


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return one.dtype == two.dtype and torch.equal(one.reshape(-1).view(bits), two.reshape(-1).view(bits))


def by_kernel(w0: torch.Tensor, pool: SeedPool, a: object, first: int = 0) -> torch.Tensor:
    w = torch.empty_like(w0)
    for launch in gpu.Update(pool, a).jobs(w, w0, "w", first=first):
        launch()
    return w


def by_reference(w0: torch.Tensor, pool: SeedPool, a: np.ndarray, first: int = 0) -> torch.Tensor:
    return (w0.float() + torch.from_numpy(delta(pool, "w", w0.numel(), a, first=first))).to(w0.dtype)


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    n=st.sampled_from([1, 31, 1023, 1024, 1025, 2100]) | st.integers(0, 1500),
    first=st.sampled_from([0, 1, 1024, 1000, 2**32 - 7, 2**34 - 2100]) | st.integers(0, 5000),
    data=st.data(),
)
def test_the_kernels_are_the_reference_bit_for_bit(interpreter, kind, dtype, n, first, data):
    k = data.draw(st.integers(1, {"hadamard4": 2000, "rademacher": 50}.get(kind, 5)))
    pool = SeedPool(data.draw(st.integers(0, 2**64 - 1)), k, kind)
    a = coefficients(k) * data.draw(st.sampled_from([0.0, 1e-30, 1.0, 1e5]))
    w0 = weights(n, dtype)
    assert same_bits(by_kernel(w0, pool, a, first), by_reference(w0, pool, a, first))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "first"), [(4096, 4000), (65_536, 2**16 - 300)])
def test_large_pools(interpreter, kind, k, first):
    pool, w0 = SeedPool(2**63 + 5, k, kind), weights(800)
    a = coefficients(k, None if kind == "hadamard4" else 9)
    assert same_bits(by_kernel(w0, pool, a, first), by_reference(w0, pool, a, first))


@pytest.mark.parametrize(
    ("kind", "seeds"),
    [
        ("rademacher", (0, 5, 6, 10, 11, 15, 16, 39)),  # the ends of a halfword's three parts; other groups
        ("gaussian", (0, 1, 39)),
        ("binomial32", (0, 1, 39)),
        ("hadamard4", (0, 1, 39)),
    ],
)
def test_one_seed_alone_is_its_noise(interpreter, kind, seeds):
    pool = SeedPool(3, 40, kind)
    for j in seeds:
        assert same_bits(
            by_kernel(torch.zeros(130), pool, np.eye(40)[j], 1000),
            torch.from_numpy(z(pool, "w", 130, j, first=1000)) + 0.0,  # a weight of 0 and −0 make 0
        )


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_every_entry_of_the_tables_counts(interpreter, monkeypatch, kind):
    """One look-up of each of 128 entries, in a group whose key and tables are given by hand."""
    pool, key = SeedPool(6, 16, kind), np.array([0x0123456789ABCDEF], np.uint64)
    elements = reference.indices(0, 2048)
    v = reference.halfwords(reference.states(pool, "w", elements), key[0], elements)
    parts = v % 64, 64 + v // 64 % 32, 96 + v // 2048
    assert {int(entry) for part in parts for entry in part} == set(range(128))
    table = np.random.default_rng(0).integers(-(2**28), 2**28, (1, 128)).astype(np.int32)
    monkeypatch.setattr(fast, "tabled", lambda pool, a: (key, table, 2.0**-29))
    expected = sum(table[0, part].astype(np.int64) for part in parts) * 2.0**-29
    got = by_kernel(torch.zeros(2048), pool, np.ones(16))
    assert same_bits(got, torch.from_numpy(expected.astype(np.float32)))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_sums_near_the_limit_of_2_to_the_29(interpreter, kind):
    """One coefficient takes most of the room, and leaves a few units to each of the others."""
    pool, w0 = SeedPool(3, 20, kind), torch.zeros(1100)
    a = np.full(20, 2.0**-24)
    a[17] = 1 - 2.0**-16
    table = np.abs(fast.tabled(pool, a)[1])
    largest = table[:, :64].max(1) + table[:, 64:96].max(1) + table[:, 96:].max(1)
    assert 2**28 - 2**14 < largest.max() < 2**29 and 4 <= largest.min() < 2**10
    assert same_bits(by_kernel(w0, pool, a), by_reference(w0, pool, a))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy's, to infinity in float16
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cast_is_pytorchs(interpreter, dtype):
    """To nearest even, also for halves of a unit, the smallest, the largest, zeros and what is not finite."""
    pool = SeedPool(0, 1, "rademacher")
    sign = torch.from_numpy(z(pool, "w", 12, 0))
    limits = torch.finfo(dtype)
    w0 = torch.tensor(
        [1, 1, 1, -1, 0, -0.0, limits.max, limits.min, limits.tiny, math.inf, -math.inf, math.nan]
    ).to(dtype)
    w0[:3] *= sign[:3].to(dtype)
    for scale in (2.0**-8, 2.0**-8 + 2.0**-20, 3 * 2.0**-8, 2.0**-11, 3 * 2.0**-11, 1e-40, 1e5, 1e30):
        expected = by_reference(w0, pool, np.array([scale]))
        got = by_kernel(w0, pool, np.array([scale]))
        assert same_bits(got[:-1], expected[:-1])
        assert got[-1].isnan()
    if dtype == torch.bfloat16:  # neighbours of 1 are 2^-7 apart
        for scale, value in ((2.0**-8, 1.0), (2.0**-8 + 2.0**-20, 1 + 2.0**-7), (3 * 2.0**-8, 1 + 2.0**-6)):
            assert torch.equal(by_kernel(w0, pool, np.array([scale]))[:3].float(), sign[:3] * value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_are_the_whole_in_pieces(interpreter, kind, dtype):
    pool, a, w0 = SeedPool(8, 3, kind), coefficients(3), weights(1800, dtype)
    whole, cut = by_kernel(w0, pool, a), w0.clone()
    update = gpu.Update(pool, a)
    for start, stop in ((0, 1), (1, 1000), (1000, 1000), (1000, 1800)):
        piece = cut[start:stop]
        for launch in update.jobs(piece, piece, "w", first=start):  # w is w0
            launch()
    assert same_bits(cut, whole)
    assert not same_bits(cut, w0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_tensor_by_each_operation(taken_for_gpu, kind):
    pool, a, w0 = SeedPool(5, 40, kind), coefficients(40, 3), weights(1200).view(30, 40)
    more = a.copy()
    more[33] -= 5e-4
    w = torch.empty_like(w0)
    rebuild_(w, w0, pool, "w", torch.from_numpy(a))
    assert same_bits(w, by_reference(w0.view(-1), pool, a))
    rebuild_perturbed_(w, w0, pool, "w", a, 33, -5e-4, first=7)
    assert same_bits(w, by_reference(w0.view(-1), pool, more, 7))
    parameter = torch.nn.Parameter(w0.clone())
    perturb_(parameter, pool, "module.w", 33, 2.0**-11)
    expected = w0.view(-1) + np.float32(2.0**-11) * torch.from_numpy(z(pool, "w", 1200, 33))
    assert same_bits(parameter.detach(), expected)


def test_a_model_on_cpu_and_gpu_is_that_of_the_cpu(taken_for_gpu, monkeypatch):
    pool, a = SeedPool(4, 40, "hadamard4"), coefficients(40)
    table = weights(1500, torch.bfloat16)
    model = {
        "module.lm_head": table.clone(),
        "array": weights(1500).numpy(),  # stays with the CPU's kernels
        "frozen": torch.nn.Parameter(torch.zeros(5), requires_grad=False),
        "ids": torch.arange(5),
        "empty": torch.zeros(0),
    }
    model["embed"] = model["module.lm_head"].view(30, 50)  # tied: written once, as "embed"
    initial = {"embed": table, "array": model["array"].copy(), "empty": model["empty"]}
    rebuild_all_(model, initial, pool, a)
    monkeypatch.undo()  # and everything on the CPU
    again = {"embed": torch.empty_like(table), "array": np.empty(1500, np.float32), "empty": model["empty"]}
    rebuild_all_(again, initial, pool, a)
    assert same_bits(model["embed"], again["embed"])
    assert model["array"].tobytes() == again["array"].tobytes()
    assert torch.equal(model["frozen"], torch.zeros(5)) and torch.equal(model["ids"], torch.arange(5))


def test_whole_models_are_perturbed_and_rebuilt_in_one_pass(taken_for_gpu):
    pool, a = SeedPool(4, 12, "rademacher"), coefficients(12)
    start = {"b": weights(1100, seed=1), "a": weights(900, torch.float16, seed=2)}
    fused = {name: torch.empty_like(w) for name, w in start.items()}
    rebuild_perturbed_all_(fused, start, pool, a, 7, 5e-4)
    more = a.copy()
    more[7] += 5e-4
    for name, w0 in start.items():
        added = torch.from_numpy(delta(pool, name, w0.numel(), more))
        assert same_bits(fused[name], (w0.float() + added).to(w0.dtype))
    moved = {name: w.clone() for name, w in start.items()}
    perturb_all_(moved, pool, 7, 2.0**-9)
    for name, w0 in start.items():
        added = 2.0**-9 * torch.from_numpy(z(pool, name, w0.numel(), 7))
        assert same_bits(moved[name], (w0.float() + added).to(w0.dtype))


def test_coefficients_are_prepared_and_uploaded_once(taken_for_gpu, monkeypatch):
    pool, w0 = SeedPool(1, 300, "hadamard4"), weights(1100)
    prepared, uploads = Prepared(pool, coefficients(300)), []
    upload = torch.from_numpy
    monkeypatch.setattr(gpu.torch, "from_numpy", lambda y: (uploads.append(y.size), upload(y))[1])
    for name in ("w", "v", "u"):
        prepared.write(torch.empty_like(w0), w0, name)
    assert uploads == [1024]


def test_threads_share_what_is_prepared(monkeypatch):
    pool, a, w0 = SeedPool(1, 300, "hadamard4"), coefficients(300), weights(8000)
    made, transformed = [], reference.transformed
    monkeypatch.setattr(reference, "transformed", lambda *given: (made.append(given), transformed(*given))[1])
    prepared, w = Prepared(pool, a), torch.empty_like(w0)

    def write(first: int) -> None:
        prepared.write(w[first : first + 1000], w0[first : first + 1000], "w", first=first, threads=1)

    with ThreadPoolExecutor(4) as workers:
        list(workers.map(write, range(0, 8000, 1000)))
    assert len(made) == 1
    assert same_bits(w, by_reference(w0, pool, a))


def test_prepared_keeps_the_coefficients_it_was_given(taken_for_gpu):
    pool, a, w0 = SeedPool(1, 300, "hadamard4"), coefficients(300), weights(1100)
    given_ = torch.from_numpy(a.copy())
    prepared = Prepared(pool, given_)
    given_.zero_()
    for w in (torch.empty_like(w0), np.empty(1100, np.float32)):
        prepared.write(w, w0 if isinstance(w, torch.Tensor) else w0.numpy(), "w", threads=1)
        assert same_bits(torch.as_tensor(w), by_reference(w0, pool, a))


def test_bad_tensors_are_refused_before_any_is_written(taken_for_gpu):
    pool, a, good = SeedPool(0, 8, "rademacher"), coefficients(8), torch.zeros(6)
    cases = [
        (torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64), "got torch.float64"),
        (torch.zeros(4, 6)[:, ::2], torch.zeros(4, 3), "must be contiguous"),
        (torch.zeros(4, 3), torch.zeros(4, 6)[:, ::2], "must be contiguous"),
        (torch.zeros(6), torch.zeros(5), "one size and dtype, got 6 torch.float32 and 5"),
        (torch.zeros(6), torch.zeros(6, dtype=torch.bfloat16), "one size and dtype"),
        (torch.zeros(6), torch.zeros(6, device="meta"), "must be on one device, got cpu and meta"),
        (np.zeros(6, np.float32), torch.zeros(6, device="meta"), "must be on one device, got cpu and meta"),
    ]
    for w, w0, message in cases:
        with pytest.raises(InputError, match=f"^z: .*{message}"):
            rebuild_all_({"a": good, "z": w}, {"a": torch.ones(6), "z": w0}, pool, a)
    with pytest.raises(InputError, match=r"2\^34"):
        rebuild_(good, torch.ones(6), pool, "w", a, first=2**34 - 5)
    with pytest.raises(InputError, match="threads must be at least 1"):
        rebuild_(good, torch.ones(6), pool, "w", a, threads=0)
    with pytest.raises(InputError, match="got nan for seed 3"):
        perturb_(good, pool, "w", 3, math.nan)
    with pytest.raises(InputError, match="'a' and 'b' share a part of their memory"):
        perturb_all_({"a": good[:4], "b": good[2:]}, pool, 0, 1.0)
    assert torch.equal(good, torch.zeros(6))


def test_a_gpu_without_triton_is_an_error_that_names_it(taken_for_gpu, monkeypatch):
    monkeypatch.delitem(sys.modules, KERNELS)
    monkeypatch.delattr(zeroth, "triton_kernels")
    monkeypatch.setitem(sys.modules, "triton", None)
    w = torch.zeros(6)
    with pytest.raises(InputError, match=r"^w is on cpu, where noise needs Triton.*pip install triton"):
        perturb_(w, SeedPool(0, 8), "w", 0, 1.0)
    assert torch.equal(w, torch.zeros(6))


def test_importing_the_package_imports_no_triton():
    code = "import sys, fedtune.zeroth; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


COMPILE = """
import json
import re

import numpy as np, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fedtune.zeroth import KINDS, SeedPool, gpu

class Hopper:  # what the compiler asks of a GPU's driver
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Hopper())
found, wide = {}, {}
for kind in KINDS:
    cases = (1, 4096, 0, "a"), (2**64 - 1, 16_400, 48, "b"), (1, 5, 16, "c"), (16, 1000, 1, "d")
    for key, n, first, name in cases:
        for dtype in (torch.float32, torch.bfloat16):
            w = torch.zeros(n, dtype=dtype)
            (job,) = gpu.Update(SeedPool(key, 40, kind), np.ones(40)).jobs(w, w, name, first=first)
            kernel, tiles, arguments, options = job.args
            code = kernel.warmup(*arguments, grid=(tiles,), **options)
            ptx = code.asm["ptx"]
            arithmetic = re.findall(r"\\b((?:add|sub|mul|fma|mad)\\S*\\.f(?:16|32|64))\\b", ptx)
            found.setdefault(kind, set()).update(arithmetic)
            wide[f"{kind} {dtype} {name}"] = [
                len(re.findall(rf"{how}\\.global\\S*\\.{width}", ptx))
                for how in ("ld", "st") for width in ("v2", "v4")
            ]
    found[kind] = sorted(found[kind]), len(kernel.device_caches[0][0])
found["wide"] = {name: counts for name, counts in wide.items() if any(counts)}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_compiled_for_a_gpu_nothing_is_fused_or_flushed_and_few_sizes_are_compiled_anew(tmp_path):
    """Triton compiles without a GPU. `.rn` forbids fusing later as well; `.ftz` would lose small numbers."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    wide = found.pop("wide")
    assert found == {
        "gaussian": [["add.rn.f32", "mul.rn.f64"], 2],  # a dtype each
        "rademacher": [["add.rn.f32", "mul.rn.f64"], 2],  # the Gaussian's kernel, not compiled again
        "binomial32": [["add.rn.f32", "mul.rn.f64"], 2],
        "hadamard4": [["add.rn.f32"], 6],  # where 16 divides n and first, where only first, and where neither
    }
    # 1,024 weights of a tile, four at a time, are 4 loads and 4 stores of each of 64 threads.
    assert wide == {
        **{f"hadamard4 torch.float32 {name}": [0, 4, 0, 4] for name in "ab"},
        **{f"hadamard4 torch.bfloat16 {name}": [4, 0, 4, 0] for name in "ab"},
    }


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU on this machine")


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_the_bits_are_those_of_the_cpu(kind, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    for place in {0, torch.cuda.device_count() - 1}:  # not only the current device
        device = torch.device("cuda", place)
        for k, n, first in ((1, 1, 0), (100, 5001, 3), (4096, 70_001, 2**33 + 5), (65_536, 140_000, 65_000)):
            pool, w0 = SeedPool(2**64 - k, k, kind), weights(n, dtype)
            a = coefficients(k, None if kind == "hadamard4" else 40)
            expected, w = torch.empty_like(w0), w0.to(device)
            rebuild_(expected, w0, pool, "w", a, first=first)
            rebuild_(w, w, pool, "w", a, first=first)
            assert same_bits(w.cpu(), expected)
            rebuild_perturbed_(expected, w0, pool, "w", a, k - 1, -5e-4, first=first)
            rebuild_perturbed_(w, w0.to(device), pool, "w", a, k - 1, -5e-4, first=first)
            assert same_bits(w.cpu(), expected)
    with pytest.raises(InputError, match="must be on one device, got cuda:0 and cpu"):
        rebuild_(torch.zeros(6, device="cuda:0"), torch.zeros(6), SeedPool(0, 8, kind), "w", np.zeros(8))


@needs_gpu
def test_on_a_gpu_a_tensor_may_have_more_than_2_to_the_31_elements():
    pytest.importorskip("triton", reason="Triton is not installed")
    n = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip("needs 6.5 GB of the GPU's memory")
    pool, a = SeedPool(9, 1024), coefficients(1024)
    w = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    rebuild_(w, w, pool, "w", a)
    for first in (0, 2**31 - 3000, n - 3000):
        expected = torch.zeros(3000, dtype=torch.bfloat16)
        rebuild_(expected, expected, pool, "w", a, first=first)
        assert same_bits(w[first : first + 3000].cpu(), expected)
