"""How far one-shot ends from multi-round, from a probe of both, and how many rounds are enough.

The probe is the run in small: the same model, data, optimiser and number of rounds, but fewer clients or
fewer steps a round. G is the share of what multi-round gains there that one-shot loses,

    G = (F(w_one) − F(w_multi)) / (F(w(0,0)) − F(w_multi))

The run has ρ times the probe's steps. The gap of the run is taken to lie between the probe's and ρ times it,
and in the middle, at √ρ times; G / (1 − G) likewise, so that G stays below 1. That is a compromise, not a
theory: in the leading order (below) the gap grows by ρ² and G by ρ, and neither does once training has used
up what there is to gain.

With R rounds instead of one, the odds of losing what endlessly many would gain are o / R, since a round is R
times as short. Against T rounds, R then lose o (T − R) / (T (R + o)), with o from what one round loses; the
smallest R that loses no more than is tolerated is recommended.

Leading order: with gradients g_i and Hessians H_i of the clients, s steps of rate β in R rounds end at

    w0 − βs ḡ + (βs)²/2 [ (1/R) Σ p_i H_i g_i + (1 − 1/R) H̄ ḡ ] + O((βs)³)

so that two schemes part by the difference of their 1/R and as the square of the steps, where the gain is
linear in them. `docs/theory.md` holds all of it to measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fedtune.errors import InputError
from fedtune.theory.quantities import Measured


@dataclass(frozen=True)
class Prediction:
    """What the probe says about the run; losses are those of `watch`, in nats.

    Attributes:
        gap: By how much one-shot stays behind multi-round.
        least, most: Between what it is taken to lie, for what extrapolation does not know.
        gap_error: Standard error of the probe's gap over its groups of examples, scaled like the gap.
        share: The share of multi-round's gain that this is.
        rounds: The smallest number of rounds that lose no more than the tolerance.
        fewest, most_rounds: The same at either end of what is taken to be possible.
    """

    gap: float
    least: float
    most: float
    gap_error: float
    share: float
    rounds: int
    fewest: int
    most_rounds: int


def predict(
    measured: Measured, weights: Sequence[float], *, ratio: float, rounds: int, tolerance: float
) -> Prediction:
    """From a probe of `measured.rounds` rounds to a run of `rounds` with `ratio` times the probe's steps.

    Args:
        measured: The probe; its `watch` gave one loss a group.
        weights: Of the groups.
        ratio: ρ, at least 1.
        rounds: T of the run.
        tolerance: The share of what multi-round gains that may be lost.

    Raises:
        InputError: The probe did not lower the loss.
    """
    end = measured.ends[-1]
    start, multi, one = (mean(f, weights) for f in (measured.start, end.multi_round, end.one_shot))
    gained = start - multi
    if not gained > 0:
        raise InputError(
            f"the probe did not lower the loss ({start:.4g} before, {multi:.4g} after {measured.steps:g} "
            "steps), so there is nothing that one-shot could lose. Lower method.lr, or probe more clients"
        )
    differences = [o - m for o, m in zip(end.one_shot, end.multi_round, strict=True)]
    middle = math.sqrt(ratio)
    shares = [odds_times((one - multi) / gained, factor) for factor in (1.0, middle, ratio)]
    enough = [enough_rounds(share, rounds, tolerance) for share in shares]
    return Prediction(
        gap=(one - multi) * middle,
        least=min(one - multi, (one - multi) * ratio),
        most=max(one - multi, (one - multi) * ratio),
        gap_error=standard_error(differences, weights) * middle,
        share=shares[1],
        rounds=enough[1],
        fewest=enough[0],
        most_rounds=enough[2],
    )


def caveats(
    measured: Measured, weights: Sequence[float], prediction: Prediction, *, clients: int, ratio: float
) -> list[str]:
    """What a prediction is the weaker for, in sentences without a full stop.

    Args:
        measured: The probe.
        weights: Of the groups whose losses it took.
        prediction: What was made of it.
        clients: Of the run.
        ratio: ρ.
    """
    found = []
    if measured.clients < clients:
        found.append(
            f"{measured.clients} of {clients} clients were probed: where their data are unlike, fewer are "
            "further from the run than the spread says, and mostly show too small a gap"
        )
    if ratio > 1:
        found.append(
            f"the run has {ratio:.3g} times the probe's steps: its gap is taken to lie between the probe's "
            "and so many times it"
        )
    losses = [mean(seen, weights) for seen in (measured.start, *(end.multi_round for end in measured.ends))]
    if any(later > earlier for earlier, later in pairwise(losses)):
        found.append(
            "multi-round's loss rose in a round of the probe: at this rate training is unsteady, and the gap "
            "as much chance as anything else"
        )
    if abs(prediction.gap) < 2 * prediction.gap_error:
        found.append("the gap is less than twice its spread: it may as well be none, or the other way round")
    return found


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
