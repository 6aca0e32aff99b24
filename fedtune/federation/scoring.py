"""Scores of what a run has at one moment: of its result, of each of several models, over the clients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from fedtune.config.schema import RunConfig
from fedtune.evaluation.clients import spread
from fedtune.evaluation.tasks import score, summarize
from fedtune.evaluation.types import EvalSettings, Outcome
from fedtune.federation.data import Split
from fedtune.federation.room import reserved_tokens

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluated:
    """Scores of a state's result (of one model a client their mean), of each model, and over the clients."""

    result: Scores = field(default_factory=dict)
    models: dict[str, Scores] = field(default_factory=dict)  # where there are several
    per_client: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)  # by task
    details: list[dict[str, Any]] = field(default_factory=list)  # lines of answers.jsonl


def evaluate(
    models: Iterable[tuple[str, nn.Module]],
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    config: RunConfig,
) -> Evaluated:
    """Scores models on the run's held-out examples.

    Args:
        models: A result's models by name; one called global is the result, else it is their mean.
        tokenizer: Of all of them.
        split: Whose held-out examples they are.
        config: The run's configuration.
    """
    settings = eval_settings(config, split.labels)
    outcomes: dict[str, dict[str, Outcome]] = {}
    for name, model in models:
        model.eval()
        outcomes[name] = score(model, tokenizer, split.evaluation, config.evaluation.tasks, settings)
    each = {name: summarize([found], settings) for name, found in outcomes.items()}
    result = each["global"] if "global" in each else summarize(list(outcomes.values()), settings)
    notes = {
        task: list(dict.fromkeys(note for found in outcomes.values() for note in found[task].notes))
        for task in result
    }
    details = [
        {"result": name, "task": task, **line}
        for name, found in outcomes.items()
        for task, outcome in found.items()
        for line in outcome.details
    ]
    return Evaluated(
        result,
        each if len(each) > 1 else {},
        spread(outcomes, split.owners),
        {task: said for task, said in notes.items() if said},
        details,
    )


def memory_for(config: RunConfig) -> str:
    """A batch of evaluation, and what makes it smaller, for a machine whose memory is too small."""
    evaluation = config.evaluation
    lower = ["evaluation.batch_size", "data.max_length"]
    if config.model.task == "causal-lm":
        lower.append("evaluation.max_new_tokens")
    return (
        f"Its batches have up to {evaluation.batch_size} examples x {config.data.max_length} tokens: lower "
        f"{', '.join(lower[:-1])} or {lower[-1]}"
        f"{', or set model.dtype=bfloat16' if config.model.dtype == 'float32' else ''}."
    )


def eval_settings(config: RunConfig, labels: Sequence[str]) -> EvalSettings:
    """The evaluation layer's settings of a configuration."""
    data, evaluation = config.data, config.evaluation
    return EvalSettings(
        template=data.template,
        loss_on=data.loss_on,
        max_length=data.max_length,
        labels=tuple(labels) or None,
        seed=config.seed,
        reserved=reserved_tokens(config),
        judge=evaluation.judge,
        code=evaluation.code,
        **evaluation.model_dump(exclude={"tasks", "every", "arrivals", "max_examples", "judge", "code"}),
    )
