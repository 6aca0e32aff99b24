"""The exact weighted mean, by hand and as a property: any order, one by one or at once, the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedtune.core.aggregate import LIMIT, WeightedSum


def test_two_clients_with_weights_one_and_three() -> None:
    total = WeightedSum.empty(4)
    total = total.add({"w": torch.tensor([2.0, -1.0])}, 1).add({"w": torch.tensor([3.0, 1.0])}, 3)
    # (1·2 + 3·3) / 4 = 2.75; (1·−1 + 3·1) / 4 = 0.5
    assert total.mean("w").tolist() == [2.75, 0.5]


def test_the_mean_of_those_that_came() -> None:
    total = WeightedSum.empty(10).add({"w": torch.tensor([1.0])}, 2).add({"w": torch.tensor([4.0])}, 4)
    assert_close(total.mean("w"), torch.tensor([(2 * 1.0 + 4 * 4.0) / 6]))
    assert total.scaled("w").item() == pytest.approx((2 * 1.0 + 4 * 4.0) / 10, abs=1e-7)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), st.integers(1, 1000)),
        min_size=1,
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_order_changes_no_bit_and_the_mean_is_the_mean(
    updates: list[tuple[list[float], int]], random: object
) -> None:
    total = sum(n for _, n in updates)

    def mean(order: list[tuple[list[float], int]]) -> torch.Tensor:
        running = WeightedSum.empty(total)
        for values, n in order:
            running = running.add({"w": torch.tensor(values)}, n)
        return running.mean("w")

    shuffled = list(updates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert torch.equal(mean(updates), mean(shuffled))
    exact = sum(torch.tensor(v, dtype=torch.float64) * n for v, n in updates) / total
    assert_close(mean(updates).double(), torch.as_tensor(exact), rtol=1e-7, atol=1e-12)


def test_a_refused_update_leaves_no_trace() -> None:
    total = WeightedSum.empty(2).add({"a": torch.tensor([1.0]), "b": torch.tensor([1.0])}, 1)
    for bad in (LIMIT, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="tensor b"):
            total.add({"a": torch.tensor([5.0]), "b": torch.tensor([bad])}, 1)
    assert total.mean("a").item() == 1.0 and total.mean("b").item() == 1.0


def test_the_largest_values_do_not_overflow() -> None:
    near = LIMIT * (1 - 2**-20)
    total = WeightedSum.empty(1000)
    for _ in range(1000):
        total = total.add({"w": torch.tensor([near, -near])}, 1)
    assert_close(total.mean("w"), torch.tensor([near, -near]))


def test_nothing_is_never_averaged() -> None:
    with pytest.raises(ValueError, match="without examples"):
        WeightedSum.empty(0)
    with pytest.raises(ValueError, match="nothing to average"):
        WeightedSum.empty(3).mean("w")
    with pytest.raises(ValueError, match="does not fit"):
        WeightedSum.empty(3).add({"w": torch.zeros(1)}, 2).add({"w": torch.zeros(1)}, 2)
