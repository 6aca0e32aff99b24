"""Differential privacy of whole clients: clipping, Gaussian noise, and what ε they come to.

    x_i ← x_i · min(1, C / ‖x_i‖)                             `clip_`
    Σ x_i + N(0, (z·C)²)                                      `add_noise_`
    ε after T rounds at a given δ                             `epsilon`, from Google's dp-accounting

McMahan et al., "Learning Differentially Private Recurrent Language Models" (2018), with all clients weighted
equally. Everything happens on integers in units, after rounding, so that clipping holds for what is summed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedtune.core.cohort import Cohort
from fedtune.core.seeds import numpy_generator

_MARGIN = 1 - 2.0**-20  # what clipping stays below its bound, against the rounding of a norm in float64


def clip_(vector: Tensor, bound: float) -> Tensor:
    """Scales a vector down, in place, so that its L2 norm is at most `bound`; a shorter one stays as it is.

    Args:
        vector: int64, any shape.
        bound: In the vector's units.
    """
    if vector.numel():
        norm = float(torch.linalg.vector_norm(vector.to(torch.float64)))
        if norm > bound * _MARGIN:
            scaled = vector.to(torch.float64).mul_(bound * _MARGIN / norm)
            vector.copy_(scaled.trunc_().to(torch.int64))  # towards zero: rounding cannot lengthen it
    return vector


def add_noise_(vector: Tensor, deviation: float) -> Tensor:
    """Adds Gaussian noise, in place, from the operating system's randomness and not from the run's seed.

    A seed that others know would let them take the noise away again. Normal numbers are made by Box and
    Muller's method from 53-bit uniform ones, so none is larger than 8.6 deviations.

    Args:
        vector: int64, one dimension.
        deviation: Standard deviation in the vector's units; noise is rounded to whole units.
    """
    from fedtune.protection.masking import uniform  # cryptography only where it is used

    if deviation == 0:
        return vector
    half, at = (vector.numel() + 1) // 2, 0
    for first, second in zip(uniform(half), uniform(half), strict=True):
        radius, angle = np.sqrt(-2 * np.log(first)) * deviation, 2 * math.pi * second
        for numbers in (radius * np.cos(angle), radius * np.sin(angle)):
            part = vector[at : at + len(numbers)]
            part += torch.from_numpy(np.rint(numbers).astype(np.int64))[: len(part)]
            at += len(part)
    return vector


def epsilon(noise_multiplier: float, releases: int, delta: float, *, rate: float = 1.0) -> float | None:
    """ε of so many noisy sums together, or None if it is infinite.

    Of unsampled sums the exact value: T sums with multiplier z are one with z/√T (Balle and Wang 2018). Of
    sampled ones the privacy loss distribution's, rounded upwards on a grid.

    Args:
        noise_multiplier: z, the noise's standard deviation by the largest norm of one client's part.
        releases: T, sums that were used.
        delta: δ.
        rate: Chance with which each client is asked for a sum, independently of the others.
    """
    if releases == 0:
        return 0.0
    if noise_multiplier == 0:
        return None
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, get_epsilon_gaussian
    from dp_accounting.pld import PLDAccountant

    if rate == 1.0:
        return float(get_epsilon_gaussian(noise_multiplier / math.sqrt(releases), delta))
    # losses grow with 1/z², and the grid with them: it takes a second, and moves ε by about one in 10⁴
    accountant = PLDAccountant(value_discretization_interval=2e-4 * max(1.0, noise_multiplier**-2))
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise_multiplier)), releases)
    return float(accountant.get_epsilon(delta))


def poisson_cohort(examples: dict[int, int], expected: int, secret: int, draw: int) -> Cohort:
    """Asks each client with the same chance, independently, as the accountant's sampling assumes.

    Args:
        examples: Examples of every client.
        expected: Clients asked on average; the chance is that by the number of clients.
        secret: Known to the server alone: who knows the seed of the draw, knows who is asked.
        draw: Sums used so far; no two draws of a run are the same.
    """
    everyone = sorted(examples)
    coins = numpy_generator(secret, "poisson cohort", draw).random(len(everyone))
    chosen = tuple(c for c, coin in zip(everyone, coins, strict=True) if coin < expected / len(everyone))
    return Cohort(chosen, {c: examples[c] for c in chosen}, len(everyone), expected)
