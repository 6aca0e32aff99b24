"""Scores of one answer against one reference."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any


def exact_match(answer: str, reference: str) -> bool:
    """Whether two answers are the same but for case, blanks and one final full stop."""
    return _normalized(answer) == _normalized(reference)


def _normalized(text: str) -> str:
    return " ".join(text.strip().lower().removesuffix(".").split())


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1] (Lin 2004, sec. 3.1), without stemming."""
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


def rouge_scorer() -> str:
    """Name and version of what computes `rouge_l`, to be written beside its scores."""
    return f"rouge-score {metadata.version('rouge-score')} rougeL F1, use_stemmer=False"


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: only when asked for

    return RougeScorer(["rougeL"], use_stemmer=False)
