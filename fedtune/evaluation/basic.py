"""Loss, accuracy, multiple choice and Rouge-L on the held-out examples."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import replace

from fedtune.data.choices import letters_of
from fedtune.data.encode import encode_causal
from fedtune.data.encoded import IGNORED
from fedtune.errors import InputError
from fedtune.evaluation.likelihoods import option_likelihoods
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
    cut = env.encoded.cut
    notes = (f"{cut} of {len(losses)} examples are cut to {env.max_length} tokens",) if cut else ()
    if env.settings.labels is not None:
        return Outcome({"loss": scored}, {}, notes)
    perplexity = math.exp(scored.value) if scored.value < 700 else math.inf
    return Outcome({"loss": scored}, {"perplexity": perplexity, "tokens": sum(counts)}, notes)


def _accuracy(env: EvalEnv) -> Outcome:
    return _right(env, [exact_match(a, e.output) for a, e in zip(env.answers, env.examples, strict=True)])


def _multiple_choice(env: EvalEnv) -> Outcome:
    """The likeliest letter, of equal ones the first, as `multiple_choice` tasks of lm-evaluation-harness.

    A letter stands where training has it, with all that the template writes between question and answer. The
    end token behind it does not count.
    """
    letters = [letters_of(example.choices) for example in env.examples]
    asked = [
        replace(example, output=letter)
        for example, several in zip(env.examples, letters, strict=True)
        for letter in several
    ]
    found = encode_causal(
        asked,
        env.tokenizer,
        template=env.settings.template,
        loss_on="response",
        max_length=env.max_length,
    )
    ends = {env.end, env.tokenizer.eos_token_id}
    options = []
    for item in found.items:
        begin = next(at for at, label in enumerate(item.labels) if label != IGNORED)
        ids = item.input_ids[: -1 if item.input_ids[-1] in ends else None]
        options.append((ids[:begin], ids[begin:]))
    likelihoods = iter(
        option_likelihoods(
            env.model,
            options,
            batch_size=env.settings.batch_size,
            memory=env.settings.memory,
            watched=env.watched,
        )
    )
    right = []
    for example, several in zip(env.examples, letters, strict=True):
        logs = [next(likelihoods)[0] for _ in several]
        right.append(several[logs.index(max(logs))] == example.output)
    return _right(env, right)


def _right(env: EvalEnv, right: list[bool]) -> Outcome:
    """The share of answers that are right, also by category."""
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
    "multiple-choice": Task(_multiple_choice, "accuracy", examples=True),
    "rouge-l": Task(
        _rouge_l,
        "rouge_l",
        rouge_scorer,
        examples=True,
    ),
}
