"""The tasks that a configuration can name: loss, accuracy and Rouge-L on the held-out examples."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtune import __version__
from fedtune.data.batches import collate
from fedtune.data.encode import IGNORED, Encoded, encode_causal, encode_classification, encode_prompts
from fedtune.data.examples import Example
from fedtune.errors import InputError, nearest
from fedtune.evaluation.generation import context_length, evaluating, generate, prompt_room
from fedtune.evaluation.metrics import exact_match, rouge_l, rouge_scorer

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvalSettings:
    """How examples are put to the model.

    Attributes:
        template: Prompt template, see `fedtune.data.templates`.
        loss_on: "response" or "all": the tokens that the loss is the mean of.
        max_length: The most tokens of an example (loss) or a prompt (answers); a smaller context of the model
            goes before.
        max_new_tokens: The most tokens of an answer.
        batch_size: Examples a forward pass. Changes scores by float rounding only.
        labels: Class names in the order of the head's outputs; None for a causal language model.
    """

    template: str
    loss_on: str
    max_length: int
    max_new_tokens: int = 64
    batch_size: int = 32
    labels: tuple[str, ...] | None = None


class Subject:
    """A model before its examples: what several tasks need is computed once.

    Expects the model in eval mode and gradients off, as `evaluate` sets them.
    """

    def __init__(
        self,
        model: Module,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        settings: EvalSettings,
    ) -> None:
        self.model, self.tokenizer, self.examples, self.settings = model, tokenizer, examples, settings

    @cached_property
    def answers(self) -> list[str]:
        """The model's greedy answer to each example; for a classifier the label of its highest output."""
        if self.settings.labels is not None:
            return [self.settings.labels[index] for index in self._class_scores[1]]
        # Cut here, where the begin token is kept, and not by the length of the context in generate.
        room = prompt_room(self.model, self.settings.max_new_tokens)
        prompts = encode_prompts(
            self.examples,
            self.tokenizer,
            template=self.settings.template,
            max_length=self.settings.max_length if room is None else min(self.settings.max_length, room),
        )
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
        )

    @cached_property
    def total_loss(self) -> tuple[float, int]:
        """Sum of the losses in nats, and of how many tokens (of a classifier: examples)."""
        if self.settings.labels is not None:
            return self._class_scores[0], len(self.examples)
        encoded = encode_causal(
            self.examples,
            self.tokenizer,
            template=self.settings.template,
            loss_on=self.settings.loss_on,
            max_length=self._max_length,
        ).items
        total, tokens = 0.0, 0
        for _, logits, labels in self._forward(encoded):
            targets = labels[:, 1:]
            counted = targets != IGNORED
            # from the right: a soft prompt's positions come before the text's
            guesses = logits[:, -labels.shape[1] :][:, :-1][counted]  # (tokens with loss, vocabulary)
            total += _loss_sum(guesses, targets[counted])
            tokens += int(counted.sum())
        return total, tokens

    @cached_property
    def _class_scores(self) -> tuple[float, list[int]]:
        assert self.settings.labels is not None
        encoded = encode_classification(
            self.examples, self.tokenizer, labels=self.settings.labels, max_length=self._max_length
        ).items
        total, classes = 0.0, [0] * len(encoded)
        for places, logits, labels in self._forward(encoded):
            total += _loss_sum(logits, labels[:, 0])
            for place, index in zip(places, logits.argmax(-1).tolist(), strict=True):
                classes[place] = index
        return total, classes

    @property
    def _max_length(self) -> int:
        context = context_length(self.model)
        return self.settings.max_length if context is None else min(self.settings.max_length, context)

    def _forward(self, encoded: list[Encoded]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Places, logits and labels of each batch; like lengths share a batch."""
        device = next(self.model.parameters()).device
        pad = self.tokenizer.pad_token_id
        pad_id = pad if isinstance(pad, int) else 0
        order = sorted(range(len(encoded)), key=lambda place: -len(encoded[place].input_ids))
        for start in range(0, len(order), self.settings.batch_size):
            places = order[start : start + self.settings.batch_size]
            batch = {k: v.to(device) for k, v in collate([encoded[p] for p in places], pad_id).items()}
            labels = batch.pop("labels")
            yield places, self.model(**batch).logits, labels


def _loss_sum(logits: Tensor, targets: Tensor) -> float:
    """Cross-entropy summed in float64, so that how the set was cut into batches does not show."""
    return float(F.cross_entropy(logits.float(), targets, reduction="none").double().sum())


def _loss(subject: Subject) -> dict[str, float]:
    total, tokens = subject.total_loss
    if tokens == 0:
        raise InputError(
            "no token of the evaluation examples carries loss: data.max_length cuts all of them."
        )
    mean = total / tokens
    return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf, "tokens": tokens}


def _accuracy(subject: Subject) -> dict[str, float]:
    right = [exact_match(a, e.output) for a, e in zip(subject.answers, subject.examples, strict=True)]
    by_category: dict[str, list[bool]] = defaultdict(list)
    for example, is_right in zip(subject.examples, right, strict=True):
        if example.category:
            by_category[example.category].append(is_right)
    return {
        "accuracy": statistics.fmean(right),
        "examples": len(right),
        **{f"accuracy/{name}": statistics.fmean(by_category[name]) for name in sorted(by_category)},
    }


def _rouge_l(subject: Subject) -> dict[str, float]:
    if subject.settings.labels is not None:
        raise InputError(
            "evaluation.tasks: rouge-l is for generated text; a classifier has loss and accuracy."
        )
    scores = [rouge_l(a, e.output) for a, e in zip(subject.answers, subject.examples, strict=True)]
    return {"rouge_l": statistics.fmean(scores), "examples": len(scores)}


@dataclass(frozen=True)
class Task:
    """One way to score a model."""

    summary: str
    function: Callable[[Subject], dict[str, float]]
    scorer: Callable[[], str] = lambda: f"fedtune {__version__}"  # name and version of what scores


TASKS = {
    "loss": Task("mean cross-entropy a token in nats, and perplexity", _loss),
    "accuracy": Task("share of answers that are exactly right, also by category", _accuracy),
    "rouge-l": Task(
        "longest common subsequence of generated answer and reference, F1", _rouge_l, rouge_scorer
    ),
}


def evaluate(
    model: Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    tasks: Sequence[str],
    settings: EvalSettings,
) -> dict[str, dict[str, float]]:
    """Scores a model on held-out examples.

    Args:
        model: A causal language model, or a classifier when `settings.labels` is given; PEFT-wrapped or not.
            Its training mode is as before afterwards.
        tokenizer: The model's.
        examples: At least one.
        tasks: Names out of TASKS.
        settings: How examples are put to the model.

    Returns:
        `{task: {metric: value}}`: loss {loss, perplexity, tokens}, a mean over all tokens of the set;
        accuracy {accuracy, examples, accuracy/<category>}; rouge-l {rouge_l, examples}.

    Raises:
        InputError: An unknown task, no examples, or a task that does not suit the model.
    """
    for task in tasks:
        if task not in TASKS:
            raise InputError(
                f'unknown evaluation task "{task}"; the tasks are {", ".join(TASKS)}.{nearest(task, TASKS)}'
            )
    if not examples:
        raise InputError("there are no examples to evaluate on: give data.holdout a larger fraction.")
    subject = Subject(model, tokenizer, examples, settings)
    with evaluating(model), torch.no_grad():
        return {task: TASKS[task].function(subject) for task in tasks}
