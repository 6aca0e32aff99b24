"""Which of two scores is the better one: where we know it of a metric, or who registered its task said it."""

from __future__ import annotations

import math
from collections.abc import Callable

from fedtune.errors import InputError
from fedtune.evaluation.registry import TASKS

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
    task, _, name = metric.partition("/")[0].partition(".")
    part = TASKS.get(task)
    if part is not None and part.metric == name and part.lower_is_better is not None:
        lower = part.lower_is_better
    elif name in LOWER or name in HIGHER or name.startswith("pass@"):
        lower = name in LOWER
    else:
        known = ", ".join((*LOWER, *HIGHER))
        raise InputError(
            f"whether {metric} is better when lower or higher is not known; register_metric and "
            f"register_task can say it (lower_is_better), or choose by one of {known}, pass@K"
        )
    sign = 1.0 if lower else -1.0
    return lambda score: sign * score if score is not None and math.isfinite(score) else math.inf
