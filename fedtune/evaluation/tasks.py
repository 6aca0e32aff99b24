"""Tasks put to a model, and tasks that users bring."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING

import torch

from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.evaluation import bootstrap
from fedtune.evaluation.generation import evaluating
from fedtune.evaluation.peaks import Peaks
from fedtune.evaluation.registry import TASKS, check_tasks, classifies, refuse_unsuited
from fedtune.evaluation.types import EvalEnv, EvalSettings, Outcome, Scored, Task

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

Score = Callable[[EvalEnv], Outcome]
Metric = Callable[[str, str], float]


def register_task(
    name: str,
    *,
    metric: str,
    examples: bool = True,
    classifier: bool = False,
    lower_is_better: bool | None = None,
    summary: str | None = None,
) -> Callable[[Score], Score]:
    """Makes NAME in `evaluation.tasks` stand for a function from `EvalEnv` to `Outcome`.

    Args:
        name: What a configuration calls it.
        metric: The main one of the outcome's metrics.
        examples: Whether it scores the held-out examples; else it brings its own.
        classifier: Whether it can score a classifier.
        lower_is_better: Of two values of that metric; None: no round or point of a sweep is chosen by it.
        summary: One line for `fedtune ls tasks`; None: the docstring's first.

    Raises:
        InputError: The name is taken.
    """

    def decorate(function: Score) -> Score:
        def score(env: EvalEnv) -> Outcome:
            outcome = function(env)
            if not isinstance(outcome, Outcome) or (outcome.metrics and metric not in outcome.metrics):
                raise InputError(
                    f"task {name} must give an Outcome with the metric {metric}, got {outcome!r:.80}"
                )
            return outcome

        task = Task(score, metric, examples=examples, classifier=classifier, lower_is_better=lower_is_better)
        _register(name, function, task, summary)
        return function

    return decorate


def register_metric(
    name: str, *, lower_is_better: bool = False, summary: str | None = None
) -> Callable[[Metric], Metric]:
    """Makes NAME in `evaluation.tasks` stand for the mean of a function (answer, reference) -> number.

    The model answers each held-out example greedily, as for `accuracy` and `rouge-l`; a classifier's answer
    is its class. The metric has the task's name, with _ for -.

    Args:
        name: What a configuration calls it.
        lower_is_better: What "worst" means, and the best round.
        summary: One line for `fedtune ls tasks`; None: the docstring's first.

    Raises:
        InputError: The name is taken.
    """
    metric = name.replace("-", "_")

    def decorate(function: Metric) -> Metric:
        def value(answer: str, reference: str) -> float:
            found = function(answer, reference)
            if not isinstance(found, Real) or not math.isfinite(found):
                raise InputError(
                    f"metric {name} must give a finite number, got {found!r} for the answer {answer!r:.40}"
                )
            return float(found)

        def score(env: EvalEnv) -> Outcome:
            pairs = zip(env.answers, env.examples, strict=True)
            scores = [value(answer, example.output) for answer, example in pairs]
            return Outcome({metric: Scored(scores, lower_is_better=lower_is_better)})

        task = Task(score, metric, examples=True, classifier=True, lower_is_better=lower_is_better)
        _register(name, function, task, summary)
        return function

    return decorate


def _register(name: str, source: Callable[..., object], task: Task, summary: str | None) -> None:
    """Adds a task that says of itself where it comes from."""

    def scorer() -> str:
        return TASKS.part(name).origin

    TASKS.register(name, source, replace(task, scorer=scorer), summary)


def scorer(task: str, settings: EvalSettings) -> str:
    """Name and version of what scores a task."""
    if task in TASKS:
        return TASKS[task].scorer()
    from fedtune.evaluation import harness

    return harness.scorer(task, settings)


def score(
    model: Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    tasks: Sequence[str],
    settings: EvalSettings,
    peaks: Peaks | None = None,
) -> dict[str, Outcome]:
    """Puts tasks to a model.

    Args:
        model: A causal language model, or a classifier when `settings.labels` is given; PEFT-wrapped or not.
            Its training mode is as before afterwards.
        tokenizer: The model's.
        examples: The held-out examples; may be empty where no task scores them.
        tasks: Names out of TASKS, or of lm-evaluation-harness.
        settings: How examples are put to the model.
        peaks: Told what batches take.

    Raises:
        InputError: An unknown task, no examples, a missing or malformed file, or a task that does not suit
            the model.
    """
    check_tasks(tasks, settings.task_folder)
    for task in tasks:
        ours = TASKS.get(task)
        if ours is not None and ours.examples and not examples:
            raise InputError("there are no examples to evaluate on: give data.holdout a larger fraction.")
        if settings.labels is not None and not classifies(task):
            raise InputError(
                f"evaluation.tasks: {task} is for generated text; a classifier has loss and accuracy."
            )
    refuse_unsuited(tasks, examples)
    env = EvalEnv(model, tokenizer, examples, settings, peaks)
    outcomes = {}
    with evaluating(model), torch.no_grad():
        for task in tasks:
            env.truncated = None
            if task in TASKS:
                outcome = TASKS[task].function(env)
            else:
                from fedtune.evaluation import harness

                outcome = harness.score(env, task)
            if env.truncated is not None:
                outcome = replace(outcome, more={"truncated": env.truncated, **outcome.more})
            outcomes[task] = outcome
    return outcomes


def summarize(outcomes: Sequence[dict[str, Outcome]], settings: EvalSettings) -> dict[str, dict[str, float]]:
    """`{task: {metric: value}}` of one model, or of the mean over several; see `bootstrap.summarize`."""
    return {
        task: bootstrap.summarize(
            [each[task] for each in outcomes], resamples=settings.bootstrap, seed=settings.seed
        )
        for task in outcomes[0]
    }


def evaluate(
    model: Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    tasks: Sequence[str],
    settings: EvalSettings,
) -> dict[str, dict[str, float]]:
    """The numbers of one model: `score` and `summarize`."""
    return summarize([score(model, tokenizer, examples, tasks, settings)], settings)
