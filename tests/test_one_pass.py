"""One pass over a large update: bits as of the plain forms, whatever the dtype and the number of threads."""

from __future__ import annotations

import math

import pytest
import torch
from threads_of import threads
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fedtune.core import one_pass
from fedtune.core.aggregate import WeightedSum
from fedtune.core.one_pass import PIECE, SMALLEST, add_rounded, extremes, large
from fedtune.core.watch import WIDTH, sketch
from fedtune.measure.memory import MemoryMeter
from fedtune.planning.fake import Fakes, values

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def drawn(size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(values: Tensor, scale: float) -> list[int]:
    """By Python's own floats and rounding."""
    return [round(value * scale) for value in values.tolist()]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_large_tensor_is_rounded_number_by_number(
    dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_pass, "PIECE", 64)
    monkeypatch.setattr(one_pass, "SMALLEST", 64)
    values, scale = drawn(1000, dtype), 2.0**44 * 3 / 7
    values[:6] = torch.tensor([0.0, -0.0, 1.0, -1.0, 3.0, 2.0**-14]).to(dtype)
    sums = torch.arange(1000)
    with threads(count):
        add_rounded(sums, values, scale)
    assert sums.tolist() == [at + more for at, more in enumerate(plain(values, scale))]


def test_halves_are_rounded_to_even_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49, 7.0])
    for smallest in (4, 1 << 20):
        monkeypatch.setattr(one_pass, "SMALLEST", smallest)
        sums = torch.zeros(8, dtype=torch.int64)
        add_rounded(sums, values, 1.0)
        assert sums.tolist() == [0, 2, 2, 0, -2, -2, 0, 7]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_has_the_bits_of_one_that_no_kernel_made(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = {"w": drawn(PIECE + 17, dtype).reshape(1, -1), "b": drawn(5, dtype), "m": drawn(SMALLEST, dtype)}
    fast = WeightedSum.empty(10).add(update, 3).add(update, 7)
    monkeypatch.setattr(one_pass, "SMALLEST", 1 << 40)
    slow = WeightedSum.empty(10).add(update, 3).add(update, 7)
    assert all(torch.equal(fast.sums[name], slow.sums[name]) for name in update)


def test_a_large_sum_takes_no_memory_beside_itself() -> None:
    update, meter = {"w": drawn(2 * PIECE - SMALLEST), "m": drawn(SMALLEST)}, MemoryMeter("cpu")
    with meter.whole([update]):
        WeightedSum.empty(1).add(update, 1)
    assert meter.peak_bytes == 2 * PIECE * (4 + 8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_large_update_has_the_sketch_of_the_plain_form(
    dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (WIDTH + 3, 2 * PIECE + 5, 7, SMALLEST)  # the large ones begin within a row, and end within one
    update = [drawn(size, dtype, seed) for seed, size in enumerate(sizes)]
    with threads(count):
        fast = sketch(update)
    monkeypatch.setattr(one_pass, "SMALLEST", 1 << 40)
    slow = sketch(update)
    assert fast.norm == pytest.approx(slow.norm, rel=1e-12)
    torch.testing.assert_close(fast.direction, slow.direction, rtol=0, atol=1e-7)
    if count == 2:
        monkeypatch.undo()
        again = sketch(update)
        assert (again.norm, again.direction.tolist()) == (fast.norm, fast.direction.tolist())


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (torch.tensor([1.5, -2.0, 0.0]), (-2.0, 1.5)),
        (torch.tensor([-128, 127], dtype=torch.int8), (-128.0, 127.0)),
        (torch.tensor([-(2**63), 5]), (-(2.0**63), 5.0)),
        (torch.tensor([False, False]), (0.0, 0.0)),
        (torch.tensor([True]), (1.0, 1.0)),
        (torch.tensor([0.0, -math.inf], dtype=torch.bfloat16), (-math.inf, 0.0)),
    ],
)
def test_extremes(values: Tensor, wanted: tuple[float, float]) -> None:
    assert extremes(values) == wanted


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("place", [0, 7, 999])
def test_one_nan_anywhere_shows(dtype: torch.dtype, place: int) -> None:
    values = torch.zeros(1000, dtype=dtype)
    values[place] = math.nan
    assert all(math.isnan(value) for value in extremes(values))


def test_what_is_small_or_has_other_numbers_is_not_large() -> None:
    assert large(torch.zeros(SMALLEST)) and not large(torch.zeros(SMALLEST - 1))
    assert not large(torch.zeros(SMALLEST, dtype=torch.float64))
    assert not large(torch.zeros(2 * SMALLEST)[::2])


@pytest.mark.parametrize("size", [SMALLEST // 2, 1 << 34])
def test_a_plan_sums_without_content(size: int) -> None:
    """64 GiB of float32 would not fit; a small tensor takes the plain form."""
    update = {"w": Fakes().empty((size,), torch.float32)}
    with values():
        sums = WeightedSum.empty(10).add(update, 3).add(update, 7).sums
    assert isinstance(sums["w"], FakeTensor) and sums["w"].dtype == torch.int64 and len(sums["w"]) == size
