"""Loss, accuracy and Rouge-L on the held-out examples."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict

from fedtune.errors import InputError
from fedtune.evaluation.metrics import exact_match, rouge_l, rouge_scorer
from fedtune.evaluation.types import EvalEnv, Outcome, Scored, Task


def _loss(env: EvalEnv) -> Outcome:
    if env.settings.labels is not None:
        losses = env.class_scores[0]
        counts = [1] * len(losses)
    else:
        totals, counts = env.token_losses
        losses = [total / max(count, 1) for total, count in zip(totals, counts, strict=True)]
    if not any(counts):
        raise InputError(
            "no token of the evaluation examples carries loss: data.max_length cuts all of them."
        )
    scored = Scored(losses, weights=counts, lower_is_better=True)
    perplexity = math.exp(scored.value) if scored.value < 700 else math.inf
    cut = env.encoded.cut
    notes = (f"{cut} of {len(losses)} examples are cut to {env.max_length} tokens",) if cut else ()
    return Outcome({"loss": scored}, {"perplexity": perplexity, "tokens": sum(counts)}, notes)


def _accuracy(env: EvalEnv) -> Outcome:
    right = [exact_match(a, e.output) for a, e in zip(env.answers, env.examples, strict=True)]
    by_category: dict[str, list[bool]] = defaultdict(list)
    for example, is_right in zip(env.examples, right, strict=True):
        if example.category:
            by_category[example.category].append(is_right)
    parts = {f"accuracy/{name}": statistics.fmean(by_category[name]) for name in sorted(by_category)}
    return Outcome({"accuracy": Scored(right)}, parts)


def _rouge_l(env: EvalEnv) -> Outcome:
    scores = [rouge_l(a, e.output) for a, e in zip(env.answers, env.examples, strict=True)]
    return Outcome({"rouge_l": Scored(scores)})


TASKS = {
    "loss": Task(_loss, "loss", examples=True, classifier=True),
    "accuracy": Task(
        _accuracy,
        "accuracy",
        examples=True,
        classifier=True,
    ),
    "rouge-l": Task(
        _rouge_l,
        "rouge_l",
        rouge_scorer,
        examples=True,
    ),
}
