"""Scores of what a run has at one moment: of its result, of each of several models, over the clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedtune.config.schema import RunConfig
from fedtune.core.faults import faults
from fedtune.core.ledger import Ledger
from fedtune.core.personal import result_models
from fedtune.data.shapes import SUBJECTS, backgrounds
from fedtune.evaluation.clients import spread
from fedtune.evaluation.peaks import Peaks
from fedtune.evaluation.picture_settings import PicturePrompt, PictureSettings
from fedtune.evaluation.tasks import score, summarize
from fedtune.evaluation.types import EvalSettings, Outcome
from fedtune.federation.assembly import Assembly
from fedtune.federation.data import Split, scored_tasks
from fedtune.federation.room import reserved_tokens
from fedtune.models.at_work import at_work

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluated:
    """Scores of a state's result (of one model a client their mean), of each model, and over the clients."""

    result: Scores = field(default_factory=dict)
    models: dict[str, Scores] = field(default_factory=dict)  # where there are several
    per_client: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)  # by task
    details: list[dict[str, Any]] = field(default_factory=list)  # lines of answers.jsonl
    pictures: dict[str, Tensor] = field(default_factory=dict)  # that a result made, by its name

    @property
    def more(self) -> dict[str, Any]:
        """What a line of rounds.jsonl has beside the result's scores, where there is any of it."""
        more = {"eval_clients": self.models, "per_client": self.per_client, "eval_notes": self.notes}
        return {key: found for key, found in more.items() if found}


def evaluate(
    models: Iterable[tuple[str, nn.Module]],
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    config: RunConfig,
    peaks: Peaks | None = None,
) -> Evaluated:
    """Scores models on the run's held-out examples.

    Args:
        models: A result's models by name; one called global is the result, else it is their mean.
        tokenizer: Of all of them.
        split: Whose held-out examples they are.
        config: The run's configuration.
        peaks: Told what batches take.
    """
    settings, tasks = eval_settings(config, split.labels), scored_tasks(config, split)
    outcomes: dict[str, dict[str, Outcome]] = {}
    for name, model in models:
        model.eval()
        outcomes[name] = score(model, tokenizer, split.evaluation, tasks, settings, peaks)
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
        {
            name: outcome.pictures
            for name, found in outcomes.items()
            for outcome in found.values()
            if outcome.pictures is not None
        },
    )


class Scoring:
    """The evaluation of one run, with its account of memory."""

    def __init__(self, config: RunConfig, assembly: Assembly, ledger: Ledger) -> None:
        self._config, self._assembly, self._ledger = config, assembly, ledger
        self._peaks = Peaks(assembly.device)

    def __call__(self, trained: tuple[Any, nn.Module] | None) -> Evaluated:
        """Scores a state's result, made with the model to train; None: the untrained model."""
        loaded, method = self._assembly.loaded, self._assembly.method
        part = "evaluation" if trained else "zero-shot evaluation"
        with faults(part, lambda: memory_for(self._config)):
            models = iter([("global", cast(nn.Module, loaded.model))])
            if trained:
                state, model = trained
                models = result_models(method, state, self._assembly.runner.states, model)
            models = self._at_work(models)
            return evaluate(models, loaded.tokenizer, self._assembly.split, self._config, self._peaks)

    def _at_work(self, models: Iterator[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
        """Each model on the device for as long as it is scored: a server's own lies on the host."""
        for name, model in models:
            with at_work([model], self._assembly.device):
                yield name, model

    def enter_memory(self, round: int) -> None:
        """Enters the highest peak so far, since a batch like one before is not followed again."""
        peak = max(self._peaks.bytes, self._ledger.peak_memory_bytes["evaluation"])
        apart = {
            column: max(found, self._ledger.peaks_by_device["evaluation"].get(column, 0))
            for column, found in self._peaks.by_device.items()
        }
        self._ledger.memory(
            round=round,
            where="evaluation",
            client=None,
            peak_bytes=peak,
            how=self._peaks.how,
            by_device=apart,
        )


def memory_for(config: RunConfig) -> str:
    """A batch of evaluation, and what makes it smaller, for a machine whose memory is too small."""
    evaluation = config.evaluation
    if config.data.pictures is not None:
        return "Pictures are made eight at a time: lower data.pictures.side, or set model.dtype=bfloat16."
    lower = ["evaluation.memory", "evaluation.batch_size", "data.max_length"]
    if config.model.task == "causal-lm":
        lower.append("evaluation.max_new_tokens")
    return (
        f"Its batches have up to {evaluation.batch_size} examples x {config.data.max_length} tokens, fewer "
        f"where that is more than about {evaluation.memory}: lower {', '.join(lower[:-1])} or {lower[-1]}"
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
        memory=evaluation.memory_bytes,
        pictures=picture_settings(config),
        **evaluation.model_dump(
            exclude={
                "tasks",
                "every",
                "stop",
                "arrivals",
                "max_examples",
                "judge",
                "code",
                "memory",
                "pictures",
            }
        ),
    )


def picture_settings(config: RunConfig) -> PictureSettings | None:
    """What a text-to-image model is asked for: of the bundled pictures their subjects, without prompts."""
    drawn, pictures = config.evaluation.pictures, config.data.pictures
    if drawn is None or pictures is None:
        return None
    prompts = [PicturePrompt(one.text, one.says, one.subject) for one in drawn.prompts]
    if not prompts and config.data.train == "bundled":
        prompts = [
            PicturePrompt(subject.caption(colour), subject.before(colour).caption(), subject.name)
            for subject in SUBJECTS
            for colour in backgrounds(subject)[-1:]
        ]
    return PictureSettings(
        tuple(prompts),
        drawn.clip,
        drawn.steps,
        drawn.guidance,
        drawn.each,
        pictures.side,
        pictures.crop,
    )
