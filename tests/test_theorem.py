"""reproduce/fedkseed_theorem.py: the gradient and the exponents, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from reproduced import load
from torch import nn

claims, theorem = load("claims"), load("fedkseed_theorem")


class Line(nn.Module):
    """Half the mean of (w·x)² over rows of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0))

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> object:
        return type("Found", (), {"loss": (self.w * input_ids[:, 0]).square().mean() / 2})


def test_the_gradient_is_of_the_mean_loss() -> None:
    # d/dw of w²·(1 + 4)/4 at 3: 3·5/2 = 7.5
    assert theorem.squared_gradient(Line(), torch.tensor([[1.0], [2.0]])) == pytest.approx(7.5**2)


def test_the_exponent_of_a_power_law() -> None:
    points = [(x, 7 * x**-0.5) for x in (500, 1000, 2000, 4000)]
    assert theorem.slope(points) == pytest.approx(-0.5)


def test_the_gradient_is_taken_where_training_has_come_to() -> None:
    if not (theorem.ROOT / theorem.MNIST).exists():
        pytest.skip(f"needs {theorem.MNIST}")
    still, moved = (theorem.smallest(4, 1, 0, lr) for lr in (1e-9, 1e-2))
    assert abs(moved - still) > 0.01 * still
    rows = theorem.numpy_generator(0, "split").permutation(10_000)[:1000]
    first = theorem.squared_gradient(theorem.Network(4, 0), torch.tensor(rows)[:, None])
    assert still == pytest.approx(first, rel=1e-4)


def test_weights_of_a_network() -> None:
    # 196 inputs to 4, 4 to 10, and biases
    assert theorem.weights(4) == 196 * 4 + 4 + 4 * 10 + 10


@pytest.mark.parametrize(
    ("steps", "sizes", "verdict"), [(-0.6, 0.4, "Seen"), (-0.3, 0.4, "Not seen"), (-0.6, 0.8, "Not seen")]
)
def test_both_exponents_decide(
    steps: float, sizes: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(width: int) -> dict[int, list[float]]:
        size = theorem.weights(width) ** sizes
        return {t: [size * (1 + s / 100) * t**steps for s in range(3)] for t in theorem.HORIZONS}

    monkeypatch.setattr(theorem, "made", lambda: {width: (1e-3, runs(width)) for width in theorem.WIDTHS})
    found, of_size = theorem.exponents()
    assert found == pytest.approx([steps] * 3) and of_size == pytest.approx([sizes] * 3)
    assert not any(math.isnan(value) for value in found)
    assert claims.Verdict(verdict) == theorem.theorem_outcome().verdict


@pytest.mark.parametrize(
    ("high", "wide", "verdict"), [(10.0, 3.0, "Seen"), (0.4, 3.0, "Not seen"), (10.0, 0.4, "Not seen")]
)
def test_both_too_high_decide(
    high: float, wide: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure5 = load("fedkseed_figure5")

    def some(value: float) -> list[float]:
        return [value, value + 0.01, value - 0.01]

    rates = {factor: some(high if factor == 10 else 0.5) for factor in figure5.FACTORS}
    scales = {scale: some(wide if scale == 1 else 0.5) for scale in figure5.SCALES}
    for losses in (rates[10.0], scales[1.0]):
        losses[1] += 0.005  # so that differences by seed are not all the same
    monkeypatch.setattr(figure5, "made", lambda: (1e-2, rates, scales))
    assert figure5.figure5_outcome().verdict == claims.Verdict(verdict)
    lines = figure5.figure5_table().splitlines()
    assert len(lines) == 2 + 5 + 4 and lines[3].startswith("| 1e-2 | 1e-3 | 0.5000 ± 0.0100 |  |")
