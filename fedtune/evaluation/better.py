"""Which of two scores is the better one, by the metric's name."""

from __future__ import annotations

import math
from collections.abc import Callable

LOWER = ("loss", "perplexity", "bits", "error")  # words of metrics that are better when they are lower


def better(metric: str) -> Callable[[float | None], float]:
    """A key by which the best score of `task.metric` is the lowest; what is not finite comes last."""
    sign = 1.0 if any(word in metric.rpartition(".")[2] for word in LOWER) else -1.0
    return lambda score: sign * score if score is not None and math.isfinite(score) else math.inf
