"""The distance in reconstructed weights against the dense product, which it never forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedtune.bench import proximal
from fedtune.models.proximal import moved_squared


def factors(out: int, rank: int, width: int, seed: int, moved: float) -> list[Tensor]:
    """A, B and where they started, float32; they differ by `moved` times as much as they are."""
    generator = torch.Generator().manual_seed(seed)
    a0, b0, da, db = (torch.randn(shape, generator=generator) for shape in ((rank, width), (out, rank)) * 2)
    return [a0 + moved * da, b0 + moved * db, a0, b0]


def dense(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, scaling: float) -> Tensor:
    a, b, a0, b0 = (t.double() for t in (a, b, a0, b0))
    return (scaling * (b @ a - b0 @ a0)).square().sum()


def value_and_gradients(term: object, tensors: list[Tensor], scaling: float) -> list[Tensor]:
    a, b = (t.clone().requires_grad_() for t in tensors[:2])
    value = term(a, b, *tensors[2:], scaling)  # type: ignore[operator]
    value.backward()
    assert a.grad is not None and b.grad is not None and a.grad.dtype == torch.float32
    return [value.detach().double(), a.grad.double(), b.grad.double()]


def assert_close_relative(got: Tensor, wanted: Tensor) -> None:
    assert float((got - wanted).norm()) <= 1e-5 * float(wanted.norm())


@given(
    out=st.integers(1, 40), rank=st.integers(1, 12), width=st.integers(1, 40), seed=st.integers(0, 10**6),
    exponent=st.integers(-6, 1), scaling=st.floats(0.01, 100),
)  # fmt: skip
def test_value_and_gradient_are_those_of_the_dense_product(
    out: int, rank: int, width: int, seed: int, exponent: int, scaling: float
) -> None:
    tensors = factors(out, rank, width, seed, 10.0**exponent)  # at 1e-6 a float32 has just moved
    wanted = value_and_gradients(dense, tensors, scaling)
    for got, expected in zip(value_and_gradients(moved_squared, tensors, scaling), wanted, strict=True):
        assert_close_relative(got, expected)
    assert float(wanted[1].norm()) > 0 and float(wanted[2].norm()) > 0


def test_by_hand() -> None:
    a0, b0 = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    a, b = torch.tensor([[2.0, 2.0]]).requires_grad_(), torch.tensor([[4.0]]).requires_grad_()
    value = moved_squared(a, b, a0, b0, 0.5)
    value.backward()
    # B A = [8, 8], B0 A0 = [3, 6]: half the difference is [2.5, 1]
    assert float(value.detach()) == 2.5**2 + 1
    # d/dA = 2 · 0.5 · 4 · [2.5, 1], d/dB = 2 · 0.5 · ([2.5, 1] · [2, 2])
    assert a.grad is not None and a.grad.tolist() == [[10.0, 4.0]]
    assert b.grad is not None and b.grad.tolist() == [[7.0]]


def test_it_is_nothing_at_the_start_and_something_after_one_step_from_a_fresh_adapter() -> None:
    a, b, a0, b0 = factors(16, 4, 16, seed=1, moved=0.0)
    assert float(moved_squared(a, b, a0, b0, 2.0)) == 0
    b0 = torch.zeros_like(b0)  # LoRA's start
    value, grad_a, grad_b = value_and_gradients(moved_squared, [a0, b0 + 1e-4, a0, b0], 2.0)
    assert float(value) > 0 and float(grad_a.norm()) > 0 and float(grad_b.norm()) > 0


def test_another_split_of_the_same_product_has_not_moved() -> None:
    """‖BA − B0A0‖, not a distance of factors: (2B)(A/2) is the same matrix."""
    a, b, a0, b0 = factors(20, 3, 24, seed=2, moved=0.0)
    assert float(moved_squared(a / 2, b * 2, a0, b0, 1.0)) <= 1e-12 * float((b0 @ a0).square().sum())


def test_the_benchmark_compares_the_same_number_in_less_memory() -> None:
    rows, ratios = proximal.measure(width=512, rank=8)
    assert rows[0]["value"] == pytest.approx(rows[1]["value"], rel=1e-4)
    # at 512 the dense way's matrices are 1 MiB, at 4096 (`fedtune bench proximal`) 64 MiB
    assert ratios["peak_bytes: dense product / algebraic"] > 5
