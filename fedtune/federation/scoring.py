"""Scores of what a run has at one moment: of its result, of each of several models, over the clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from fedtune.config.schema import RunConfig
from fedtune.core.faults import faults
from fedtune.core.ledger import Ledger
from fedtune.core.personal import result_models
from fedtune.core.types import Transport
from fedtune.evaluation.clients import spread
from fedtune.evaluation.peaks import Peaks
from fedtune.evaluation.tasks import score, summarize
from fedtune.evaluation.types import Outcome
from fedtune.federation.assembly import Assembly
from fedtune.federation.client_scores import ClientScores
from fedtune.federation.connect import Deployment
from fedtune.federation.data import Split, scored_tasks
from fedtune.federation.evaluator import asks_clients, eval_settings
from fedtune.federation.scored import Evaluated
from fedtune.measure.clock import Clock
from fedtune.models.at_work import at_work


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
        self.by_clients = asks_clients(config, assembly.method)
        self.clients: ClientScores | None = None  # once they can be reached

    def reach(self, transport: Transport, clock: Clock, deployment: Deployment | None) -> None:
        """Clients can be asked from now on, where they score the result."""
        if self.by_clients:
            self.clients = ClientScores(
                self._config, self._assembly, self._ledger, clock, transport, deployment
            )

    def __call__(self, trained: tuple[Any, nn.Module] | None, round: int = 0) -> Evaluated:
        """Scores a state's result, made with the model to train; None: the untrained model.

        Where clients score it they have to be there: until then nothing is scored.
        """
        if self.by_clients:
            return self.clients(trained[0], round) if self.clients and trained else Evaluated()
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
        if self.by_clients:  # each client's is entered as its scores come
            return
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
