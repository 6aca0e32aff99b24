"""Correlations of answers with references: the metrics of GLUE's CoLA and STS-B (Wang et al. 2019, sec. 3).

Matthews correlation for several classes is Gorodkin (2004), eq. 8, which for two is Matthews (1975). The
correlations are computed here, since scikit-learn and SciPy are not among what fedtune installs; the tests
hold them against both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import InputError
from fedtune.evaluation.metrics import exact_match
from fedtune.evaluation.types import EvalEnv, Outcome, Scored, Task

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_LARGEST = 1e100  # squares of more would overflow; no score is that large


def matthews(pairs: Sequence[tuple[int, int]]) -> float:
    """Matthews correlation of (guessed, true) classes; 0 where either takes one value only.

    Classes are numbered from 0; -1 is a guess that is none of them.
    """
    guesses, truths = np.asarray(pairs, dtype=np.int64).T + 1
    classes = int(max(guesses.max(), truths.max())) + 1
    guessed = np.bincount(guesses, minlength=classes).astype(float)
    true = np.bincount(truths, minlength=classes).astype(float)
    n, right = float(len(pairs)), float((guesses == truths).sum())
    spread = (n * n - guessed @ guessed) * (n * n - true @ true)
    return float((right * n - guessed @ true) / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(pairs: Sequence[tuple[float | None, float]]) -> float:
    """Pearson correlation of (guessed, true) numbers.

    Pairs without a guess are left out. 0 where it is not defined: fewer than two pairs, or one value only.
    """
    return _correlation(*_columns(pairs))


def spearman(pairs: Sequence[tuple[float | None, float]]) -> float:
    """As `pearson`, of the ranks; equal numbers share their mean rank."""
    guesses, truths = _columns(pairs)
    return _correlation(_ranks(guesses), _ranks(truths))


def _columns(pairs: Sequence[tuple[float | None, float]]) -> tuple[NDArray[Any], NDArray[Any]]:
    kept = [pair for pair in pairs if pair[0] is not None]
    guesses, truths = np.asarray(kept, dtype=float).reshape(-1, 2).T
    return guesses, truths


def _correlation(x: NDArray[Any], y: NDArray[Any]) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    dx, dy = x - x.mean(), y - y.mean()
    dx, dy = dx / np.abs(dx).max(), dy / np.abs(dy).max()  # or squares of tiny numbers would vanish
    return float(np.clip(dx @ dy / np.sqrt((dx @ dx) * (dy @ dy)), -1, 1))


def _ranks(values: NDArray[Any]) -> NDArray[Any]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[Any] = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def _matthews(env: EvalEnv) -> Outcome:
    truths = [example.output for example in env.examples]
    labels = env.settings.labels or tuple(sorted(set(truths)))
    pairs = [
        (_class(answer, labels), _class(truth, labels))
        for answer, truth in zip(env.answers, truths, strict=True)
    ]
    none = sum(guess < 0 for guess, _ in pairs)
    return Outcome({"matthews": Scored(pairs, aggregate=matthews)}, {"no_label": none})


def _class(text: str, labels: Sequence[str]) -> int:
    return next((index for index, label in enumerate(labels) if exact_match(text, label)), -1)


def _pearson(env: EvalEnv) -> Outcome:
    truths = []
    for place, example in enumerate(env.examples):
        truth = _number(example.output) if _NUMBER.fullmatch(example.output.strip()) else None
        if truth is None:
            raise InputError(
                f"task pearson compares numbers; the answer of held-out example {place} is {example.output!r}"
            )
        truths.append(truth)
    pairs = [(_number(answer), truth) for answer, truth in zip(env.answers, truths, strict=True)]
    none = sum(guess is None for guess, _ in pairs)
    return Outcome(
        {"pearson": Scored(pairs, aggregate=pearson), "spearman": Scored(pairs, aggregate=spearman)},
        {"no_number": none},
    )


def _number(text: str) -> float | None:
    """The first number of a text."""
    found = _NUMBER.search(text)
    return float(found[0]) if found and abs(float(found[0])) <= _LARGEST else None


TASKS = {
    "matthews": Task(_matthews, "matthews", examples=True, classifier=True),
    "pearson": Task(_pearson, "pearson", examples=True, classifier=True),
}
