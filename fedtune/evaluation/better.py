"""Which of two scores is the better one: known for our own metrics and the harness's common ones alone."""

from __future__ import annotations

import math
from collections.abc import Callable

from fedtune.errors import InputError

LOWER = ("loss", "denoising_loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
HIGHER = (
    *("accuracy", "acc", "acc_norm", "exact_match", "exact_match_flexible", "f1", "score", "margin"),
    *("rouge_l", "rouge_l_fedkseed", "matthews", "pearson", "clip_score"),
)


def better(metric: str) -> Callable[[float | None], float]:
    """A key by which the best score of `task.metric` is the lowest; what is not finite comes last.

    Raises:
        InputError: Nobody said which of two scores of that metric is the better one.
    """
    name = metric.partition(".")[2].partition("/")[0]
    if name not in LOWER and name not in HIGHER and not name.startswith("pass@"):
        known = ", ".join((*LOWER, *HIGHER))
        raise InputError(
            f"whether {metric} is better when lower or higher is not known; choose by one of {known}, pass@K"
        )
    sign = 1.0 if name in LOWER else -1.0
    return lambda score: sign * score if score is not None and math.isfinite(score) else math.inf
