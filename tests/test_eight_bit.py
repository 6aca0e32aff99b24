"""AdamW with moments in 8 bits: the published map, codes by hand, and steps against a plain reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedtune.methods import eight_bit
from fedtune.methods.eight_bit import AdamW8bit, dynamic_map, quantised, restored


def published(signed: bool) -> Tensor:
    """The map as bitsandbytes' `create_dynamic_map` makes it: middles of equal parts of [0.1, 1], scaled."""
    found: list[float] = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        found += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted([*found, 0.0, 1.0]))


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_published_one(signed: bool) -> None:
    values = dynamic_map(signed)
    assert len(values) == 256 and bool((values[1:] > values[:-1]).all())
    torch.testing.assert_close(values, published(signed), rtol=1e-6, atol=0)
    assert float(values[-1]) == 1 and float(values.min()) == (pytest.approx(-0.99296875) if signed else 0)
    assert float(values[values > 0].min()) == pytest.approx(5.5e-7 if signed else 3.25e-7)


def nearest(numbers: Tensor, values: Tensor) -> Tensor:
    """What a moment's numbers become, from distances to all 256 values."""
    found = torch.empty_like(numbers)
    for at in range(0, len(numbers), 256):
        block = numbers[at : at + 256]
        scale = block.abs().max()
        shares = block / scale if scale > 0 else torch.zeros_like(block)
        found[at : at + 256] = values[(shares[:, None] - values).abs().argmin(1)] * scale
    return found


@pytest.mark.parametrize("signed", [True, False])
def test_each_number_becomes_the_nearest_value_of_its_block(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(1000, generator=generator) * 10 ** torch.randint(
        -6, 3, (1000,), generator=generator
    )
    numbers[256:512] = 0.0
    numbers = numbers if signed else numbers.square()
    values = published(signed)
    codes, scales = quantised(numbers, dynamic_map(signed))
    assert codes.dtype == torch.uint8 and codes.shape == (1000,) and scales.shape == (4,)
    torch.testing.assert_close(restored(codes, scales, dynamic_map(signed)), nearest(numbers, values))
    assert bool((restored(codes, scales, dynamic_map(signed))[256:512] == 0).all())


def test_codes_by_hand() -> None:
    """Scale 4: shares 1, −0.25, 0.0005 and 0; of each power of ten the steps are 0.9 / 2ⁱ of it wide."""
    codes, scales = quantised(torch.tensor([4.0, -1.0, 0.002, 0.0]), dynamic_map(True))
    # −0.25 in (0.1, 1), 64 parts of 0.0140625: part 10, its middle 0.1 + 10.5 · 0.0140625
    # 0.0005 in (1e-4, 1e-3), 8 parts of 1.125e-4: part 3, its middle 1e-4 + 3.5 · 1.125e-4
    assert scales.tolist() == [4.0]
    found = restored(codes, scales, dynamic_map(True)).tolist()
    assert found == pytest.approx([4.0, -4 * 0.24765625, 4 * 4.9375e-4, 0.0])
    none = quantised(torch.tensor([1.0, math.nan]), dynamic_map(True))
    assert bool(restored(*none, dynamic_map(True)).isnan().all())


def test_steps_are_those_of_a_plain_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tensors, by the formula of AdamW; in pieces they are the same to the bit."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(70, 90, generator=generator)  # 6,300 numbers: the last block has 156
    gradients = [torch.randn(70, 90, generator=generator) * 10.0 ** (step - 4) for step in range(5)]

    def moved() -> Tensor:
        weight = nn.Parameter(start.clone())
        optimizer = AdamW8bit([weight], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        assert {k: v.dtype for k, v in optimizer.state[weight].items()} == {
            "step": torch.float32, "exp_avg": torch.uint8, "exp_avg_scale": torch.float32,
            "exp_avg_sq": torch.uint8, "exp_avg_sq_scale": torch.float32,
        }  # fmt: skip
        return weight.detach()

    w, m, v = start.flatten().clone(), torch.zeros(6300), torch.zeros(6300)
    for step, gradient in enumerate(gradients, 1):
        g = gradient.flatten()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w = w * (1 - 1e-3) - 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        m, v = nearest(m, published(True)), nearest(v, published(False))
    found = moved()
    # a number halfway between two values may go to the other one
    assert float(((found.flatten() - w).abs() > 1e-5).float().mean()) < 1e-3
    torch.testing.assert_close(found.flatten(), w, rtol=0, atol=1e-3)
    monkeypatch.setattr(eight_bit, "PIECE", 512)
    assert torch.equal(moved(), found)


def test_small_tensors_take_the_steps_of_adamw_and_elements_need_not_be_in_a_row() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, narrow in (((63, 65), False), ((64, 64), True)):
        start = torch.randn(shape, generator=generator)
        gradients = [torch.randn(shape, generator=generator) for _ in range(4)]
        results = []
        for kind in ("plain", "8 bits", "8 bits, transposed"):
            weight = nn.Parameter(start.T.contiguous().T if kind.endswith("transposed") else start.clone())
            settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
            optimizer: torch.optim.Optimizer = (
                torch.optim.AdamW([weight], foreach=False, **settings)  # type: ignore[arg-type]
                if kind == "plain"
                else AdamW8bit([weight], **settings)  # type: ignore[arg-type]
            )
            for gradient in gradients:
                weight.grad = gradient.clone()
                optimizer.step()
            results.append(weight.detach())
        assert torch.equal(results[1], results[2])
        assert torch.equal(results[0], results[1]) != narrow
        # where a second moment is far below its block's largest it is kept as 0, and the step is longer
        far = (results[1] - results[0]).abs() > 4e-3
        assert float(far.float().mean()) < 1e-2 and float((results[1] - results[0]).abs().max()) < 0.1


def test_weights_follow_those_of_float32_moments() -> None:
    """A quadratic's minimum is found as closely: 4,096 weights of curvatures from 0.01 to 1."""
    ends = {}
    curvature = torch.logspace(-2, 0, 4096)
    for name, kind in (("float32", torch.optim.AdamW), ("8 bits", AdamW8bit)):
        weight = nn.Parameter(torch.ones(4096))
        optimizer = kind([weight], lr=0.05, weight_decay=0.0)
        for step in range(100):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 100)
            weight.grad = curvature * weight.detach()
            optimizer.step()
        ends[name] = float((curvature * weight.detach().square()).sum() / curvature.sum())
    assert ends["8 bits"] < 1e-3 + 1.1 * ends["float32"] < 0.1
