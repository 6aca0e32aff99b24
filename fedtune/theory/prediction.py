"""How far one-shot ends from multi-round, from a probe of both, and how many rounds are enough.

The probe is the run in small: the same model, data, optimiser and number of rounds, but fewer clients or
fewer steps a round. I is what multi-round gains there, F(w(0,0)) − F(w_multi), and G the share of it that
one-shot loses, (F(w_one) − F(w_multi)) / I. With ρ times the probe's steps in the run:

    I / (F(w(0,0)) − I)   grows by ρ^c   c is the power of the gain over the rounds of the probe, in 0..1
    G / (1 − G)           grows by ρ     so that G doubles with the steps where it is small, and stays below 1
    G · I                 is the gap, what `fedtune compare` shows as a difference in loss

With R rounds instead of one, the odds of losing what endlessly many would gain are o / R, since a round is R
times as short. Against T rounds, R then lose o (T − R) / (T (R + o)), with o from what one round loses; the
smallest R that loses no more than is tolerated is recommended.

That G grows with the steps and falls as 1/R − 1/T is the leading order in the step size. With gradients g_i
and Hessians H_i of the clients, s steps of rate β in R rounds end at

    w0 − βs ḡ + (βs)²/2 [ (1/R) Σ p_i H_i g_i + (1 − 1/R) H̄ ḡ ] + O((βs)³)

so that two schemes part by the difference of their 1/R and as the square of the steps, where the gain is
linear in them. Odds in place of shares are no theory. `docs/theory.md` holds all of it to measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.errors import InputError
from fedtune.theory.quantities import Measured


@dataclass(frozen=True)
class Prediction:
    """What the probe says about the run; losses are those of `watch`, in nats.

    Attributes:
        improvement: I, by how much multi-round lowers the loss.
        share: G, how much of that one-shot loses.
        gap: G · I, by how much one-shot stays behind.
        gap_error: Standard error of the probe's gap over its groups, scaled like the gap.
        rounds: The smallest number of rounds that lose no more than the tolerance.
    """

    improvement: float
    share: float
    gap: float
    gap_error: float
    rounds: int


def predict(
    measured: Measured, weights: Sequence[float], *, ratio: float, rounds: int, tolerance: float
) -> Prediction:
    """From a probe of `measured.rounds` rounds to a run of `rounds` with `ratio` times the probe's steps.

    Args:
        measured: The probe; its `watch` gave one loss a group.
        weights: Of the groups.
        ratio: ρ, at least 1.
        rounds: T of the run.
        tolerance: The share of the improvement that may be lost.

    Raises:
        InputError: The probe did not lower the loss.
    """
    start = mean(measured.start, weights)
    multi = [mean(end.multi_round, weights) for end in measured.ends]
    one = [mean(end.one_shot, weights) for end in measured.ends]
    gained = start - multi[-1]
    if not gained > 0:
        raise InputError(
            f"the probe did not lower the loss ({start:.4g} before, {multi[-1]:.4g} after {measured.steps:g} "
            "steps), so there is nothing that one-shot could lose. Lower method.lr, or raise --steps"
        )
    power = growth([start - loss for loss in multi])
    improvement = start * odds_times(gained / start, ratio**power)
    end = measured.ends[-1]
    differences = [o - m for o, m in zip(end.one_shot, end.multi_round, strict=True)]
    lost = (one[-1] - multi[-1]) / gained
    share = odds_times(lost, ratio)
    scale = improvement / gained * (share / lost if lost else ratio)
    return Prediction(
        improvement=improvement,
        share=share,
        gap=share * improvement,
        gap_error=standard_error(differences, weights) * scale,
        rounds=enough_rounds(share, rounds, tolerance),
    )


def growth(values: Sequence[float]) -> float:
    """The power of the number of rounds with which a quantity grows from the first to the last, in 0..1.

    0 where it cannot be told: one round, or a first value that is not positive.
    """
    if len(values) < 2 or values[0] <= 0 or values[-1] <= 0:
        return 0.0
    return min(1.0, max(0.0, math.log(values[-1] / values[0]) / math.log(len(values))))


def odds_times(share: float, factor: float) -> float:
    """The share with `factor` times the odds, share / (1 − share); outside 0..1 it stays as it is."""
    return share * factor / (1 + share * (factor - 1)) if 0 < share < 1 else share


def lost_with(few: int, share: float, rounds: int) -> float:
    """The share of the gain of T rounds that R lose, where one loses `share`: o (T − R) / (T (R + o))."""
    ceiling = min(share, (rounds - 1) / rounds)  # what R = 1 can lose at most by the law, with o infinite
    return share * (rounds - few) / (few * (rounds - 1) - ceiling * rounds * (few - 1))


def enough_rounds(share: float, rounds: int, tolerance: float) -> int:
    """The smallest R in 1..T that loses no more than `tolerance` by `lost_with`."""
    return next(few for few in range(1, rounds + 1) if lost_with(few, share, rounds) <= tolerance)


def mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean."""
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def standard_error(values: Sequence[float], weights: Sequence[float]) -> float:
    """Of the weighted mean over groups; infinite for one group."""
    if len(values) < 2:
        return math.inf
    middle, total = mean(values, weights), sum(weights)
    squares = sum((w / total * (v - middle)) ** 2 for v, w in zip(values, weights, strict=True))
    return math.sqrt(squares * len(values) / (len(values) - 1))
