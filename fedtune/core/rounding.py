"""Numbers rounded up or down by chance, so that what they are in the mean stays: unbiased rounding.

To the nearest, what is below half a step is lost each time; by chance, it is kept in the mean of many.

    bfloat16     the lower 16 bits of a float32                                        `stochastically`
    int8, int4   q = ⌊v/s + u⌋ with u uniform in [0, 1) and s the largest |v| of a group of `GROUP` numbers,
                 over 127 or 7: E[s q] = v                                             `to_levels`

Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding" (2017), section
3.1, with buckets of `GROUP`; scaled by the largest number of a bucket, as in their experiments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PIECE = 1 << 24  # numbers that random bits are drawn for at a time
GROUP = 128  # numbers that share a scale


def stochastically(wide: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Float32 numbers rounded to bfloat16, up or down with probabilities that keep their mean.

    Below the 16 bits that stay a random number of 16 bits is added, and what is then below is cut off, so
    that a number at the share p of the way between two neighbours goes up with probability p. What is
    bfloat16 already stays, and what is infinite or no number too. Random bits are drawn for 2²⁴ numbers at a
    time.
    """
    assert wide.dtype == torch.float32 and dtype == torch.bfloat16
    flat = wide.reshape(-1)
    rounded = torch.empty_like(flat, dtype=dtype)
    for at in range(0, len(flat), PIECE):
        some = flat[at : at + PIECE]
        noise = torch.empty_like(some, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
        cut = noise.add_(some.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32)
        rounded[at : at + PIECE] = torch.where(some.isfinite(), cut, some)
    return rounded.view(wide.shape)


def groups(count: int) -> int:
    """How many scales so many numbers have."""
    return -(-count // GROUP)


def to_levels(values: Tensor, levels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers as whole multiples of their group's scale, at most `levels` times it, by chance up or down.

    A group that holds NaN or an infinite number has such a scale.

    Args:
        values: float32 (numbers).
        levels: The largest multiple, 127 or 7.
        generator: Where chance comes from.

    Returns:
        The multiples, int8 (numbers), and the scales, float32 (groups).
    """
    rows = nn.functional.pad(values, (0, -len(values) % GROUP)).view(-1, GROUP)
    scales = rows.abs().amax(dim=1) / levels
    steps = rows / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    chance = torch.empty_like(steps).uniform_(0, 1, generator=generator)
    whole = steps.add_(chance).floor_().clamp_(-levels, levels).nan_to_num_(0.0)
    return whole.to(torch.int8).view(-1)[: len(values)], scales


def from_levels(whole: Tensor, scales: Tensor) -> Tensor:
    """The numbers that `to_levels` gave, float32.

    Args:
        whole: int8 (numbers).
        scales: float32 (groups).
    """
    return whole.to(torch.float32) * scales.repeat_interleave(GROUP)[: len(whole)]
