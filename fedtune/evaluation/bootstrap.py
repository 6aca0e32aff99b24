"""Standard errors and intervals of a score: what other examples of the same kind would have given.

The interval is the percentile bootstrap (Efron and Tibshirani 1993, ch. 13): examples are drawn with
replacement, the metric is computed on each draw, and the middle 95 % of the values are between `low` and
`high`. The standard error is that of the (weighted) mean in closed form, and elsewhere the standard deviation
over the draws. Neither says anything about other seeds of a run; `compare` shows that spread beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.core.seeds import numpy_generator
from fedtune.evaluation.types import Outcome, Scored

ERRORS = ("_stderr", "_low", "_high")  # what follows a metric's name
COUNTS = ("examples", "truncated")  # what a score rests on
_AT_ONCE = 4_000_000  # drawn examples in memory


def summarize(outcomes: Sequence[Outcome], *, resamples: int, seed: int) -> dict[str, float]:
    """The numbers of one task, for one model or the mean over several on the same examples.

    Args:
        outcomes: One a model. A metric that some models have no value of (none of its answers could be
            judged) is the mean over the others.
        resamples: Draws of the bootstrap; 0: no intervals.
        seed: Of the draws.

    Returns:
        Each metric with `<metric>_stderr`, `<metric>_low` and `<metric>_high` where there are two examples or
        more; `examples`; and the numbers without error bars.
    """
    result = dict[str, float]()
    for name in dict.fromkeys(name for outcome in outcomes for name in outcome.metrics):
        scored = [outcome.metrics[name] for outcome in outcomes if name in outcome.metrics]
        result[name] = statistics.fmean(one.value for one in scored)
        if len(scored[0].items) > 1:
            draws = _draws(scored, resamples, seed)
            error = _standard_error(scored, draws)
            if error is not None:
                result[f"{name}_stderr"] = error
            if len(draws):
                low, high = np.percentile(draws, (2.5, 97.5))
                result[f"{name}_low"], result[f"{name}_high"] = float(low), float(high)
    if found := [outcome.metrics for outcome in outcomes if outcome.metrics]:
        result["examples"] = len(next(iter(found[0].values())).items)
    for name in dict.fromkeys(name for outcome in outcomes for name in outcome.more):
        values = [outcome.more[name] for outcome in outcomes if name in outcome.more]
        result[name] = values[0] if len(set(values)) == 1 else statistics.fmean(values)
    return result


def metrics_of(scores: Mapping[str, Any]) -> list[str]:
    """The metrics among a task's numbers: without their errors, and without what they rest on."""
    errors = {f"{name}{error}" for name in scores for error in ERRORS}
    return [name for name in scores if name not in errors and name not in COUNTS]


def _standard_error(scored: Sequence[Scored], draws: NDArray[np.float64]) -> float | None:
    if any(one.aggregate is not None for one in scored):
        return float(draws.std(ddof=1)) if len(draws) > 1 else None
    # Of a ratio of sums, linearised; with equal weights it is the sample deviation over the root of n.
    n, parts = len(scored[0].items), []
    for one in scored:
        values, weights = _arrays(one)
        mean = (weights * values).sum() / weights.sum()
        parts.append(weights * (values - mean) / weights.sum())
    each = np.mean(parts, axis=0)  # of the models' mean: they answered the same examples
    return math.sqrt(n / (n - 1) * float((each**2).sum()))


def _draws(scored: Sequence[Scored], resamples: int, seed: int) -> NDArray[np.float64]:
    """The metric, as a mean over the models, on each draw (resamples,)."""
    n = len(scored[0].items)
    rng = numpy_generator(seed, "bootstrap")  # the same draws for every metric and model on these examples
    step = max(1, _AT_ONCE // n)
    values = []
    for start in range(0, resamples, step):
        drawn = rng.integers(0, n, size=(min(step, resamples - start), n))
        values.append(np.mean([_on(one, drawn) for one in scored], axis=0))
    found = np.concatenate(values) if values else np.empty(0)
    weighted = all(one.weights is not None for one in scored)
    return found[~np.isnan(found)] if weighted else found  # NaN: only examples without weight were drawn


def _on(scored: Scored, drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """The metric on each row of drawn places."""
    if scored.aggregate is not None:
        return np.array([scored.aggregate([scored.items[i] for i in row]) for row in drawn], dtype=float)
    values, weights = _arrays(scored)
    if scored.weights is None:
        return np.asarray(values[drawn].mean(axis=1))
    with np.errstate(invalid="ignore"):
        return np.asarray((weights * values)[drawn].sum(axis=1) / weights[drawn].sum(axis=1))


def _arrays(scored: Scored) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values = np.asarray(scored.items, dtype=float)
    return values, np.ones_like(values) if scored.weights is None else np.asarray(scored.weights, dtype=float)
