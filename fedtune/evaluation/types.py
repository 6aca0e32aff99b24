"""What a task is given, and what it gives back.

A task is a function from `EvalEnv` (a model before its examples) to `Outcome` (each example's part of each
metric). Values, standard errors and intervals are computed from the outcome in one place, `bootstrap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.core.seeds import derive_seed
from fedtune.data.encode import (
    encode_asked,
    encode_causal,
    encode_classification,
    encode_prompts,
    prompt_text,
    response_text,
)
from fedtune.data.encoded import Counts, Encoded
from fedtune.data.examples import ASSISTANT, Example, Turn
from fedtune.data.marked import Marked
from fedtune.data.prompts import prompts as prompts_in
from fedtune.errors import InputError
from fedtune.evaluation.generation import Sampling, generate, prompt_room
from fedtune.evaluation.judge_settings import JudgeSettings
from fedtune.evaluation.likelihoods import example_losses
from fedtune.evaluation.peaks import Peaks
from fedtune.evaluation.picture_settings import PictureSettings
from fedtune.evaluation.rows import Fields, read_rows
from fedtune.evaluation.sandbox import CodeSettings
from fedtune.models.context import context_length
from fedtune.version import __version__

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

MEMORY = 2 * 10**9  # bytes


@dataclass(frozen=True)
class EvalSettings:
    """How examples are put to the model, and where tasks find what they need.

    Attributes:
        template: Prompt template, see `fedtune.data.templates`.
        loss_on: "response", "last" or "all": the tokens that the loss is the mean of.
        max_length: The most tokens of an example (loss) or a prompt (answers); a smaller context of the model
            goes before.
        max_new_tokens: The most tokens of an answer; None: what each task needs.
        batch_size: Examples a forward pass, at most. Changes scores by float rounding only.
        memory: Bytes that a batch may take beside the weights, about: what has no room goes into another.
        labels: Class names in the order of the head's outputs; None for a causal language model.
        files: The local data file of each task that reads one.
        limit: The most examples of a task that brings its own; None: all.
        few_shot: Solved examples before each question of an lm-eval task; None: what the task says.
        harness_template: Whether lm-eval tasks are asked in `template`: all that stands before an answer is
            one question.
        samples: Answers drawn for one question where a task scores several (Pass@k).
        temperature: Of those draws; a single answer is greedy.
        top_p: Of those draws: the least set of likeliest tokens with this probability in sum.
        task_folder: Folder of YAML tasks of the harness, before its own.
        data_folder: Folder that those tasks read their files from.
        judge: Who marks answers; None: nobody.
        code: How programs that the model wrote are run.
        bootstrap: Resamples of an interval; 0: no intervals.
        seed: What draws and resamples are derived from.
        reserved: Tokens of the model's context that are kept free for the soft prompt which a run trains, so
            that models with and without it are scored on the same tokens.
        pictures: What a text-to-image model is asked for; None of others.
    """

    template: str
    loss_on: str
    max_length: int
    max_new_tokens: int | None = None
    batch_size: int = 32
    memory: int = MEMORY
    labels: tuple[str, ...] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    few_shot: int | None = None
    harness_template: bool = False
    samples: int = 1
    temperature: float = 0.8
    top_p: float = 1.0
    task_folder: str | None = None
    data_folder: str | None = None
    judge: JudgeSettings | None = None
    code: CodeSettings = field(default_factory=CodeSettings)
    bootstrap: int = 1000
    seed: int = 0
    reserved: int = 0
    pictures: PictureSettings | None = None


@dataclass(frozen=True)
class Scored:
    """One metric over the examples.

    Attributes:
        items: One an example, in their order: numbers for a mean, else what `aggregate` takes.
        aggregate: From items to the metric; None: the mean. Also called on resampled items, with repeats.
        weights: Of the mean (of the loss: tokens).
        lower_is_better: What "worst" means.
        exact: The metric as another package computed it, to the last digit; None: compute it.
    """

    items: Sequence[Any]
    aggregate: Callable[[Sequence[Any]], float] | None = None
    weights: Sequence[float] | None = None
    lower_is_better: bool = False
    exact: float | None = None

    @property
    def value(self) -> float:
        """The metric."""
        if self.exact is not None:
            return self.exact
        if self.aggregate is not None:
            return float(self.aggregate(self.items))
        if self.weights is None:
            return float(sum(self.items) / len(self.items))
        return float(sum(w * v for w, v in zip(self.weights, self.items, strict=True)) / sum(self.weights))


@dataclass(frozen=True)
class Outcome:
    """What a task found out about one model.

    Attributes:
        metrics: The main one first; empty where nothing could be scored.
        more: Numbers without an error bar: parts by category, counts of what failed.
        notes: Sentences for people.
        details: What cannot be had again, one plain object an example: answers and what a judge said.
        pictures: Those that were made, uint8 (prompts, pictures of each, 3, side, side); None of texts.
    """

    metrics: Mapping[str, Scored]
    more: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: Sequence[Mapping[str, Any]] = ()
    pictures: Tensor | None = None


class EvalEnv:
    """What a task sees: a model, its examples and the settings. What several tasks need is computed once.

    Expects the model in eval mode and gradients off, as `tasks.score` sets them.
    """

    def __init__(
        self,
        model: Module,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        settings: EvalSettings,
        peaks: Peaks | None = None,
    ) -> None:
        self.model, self.tokenizer, self.examples, self.settings = model, tokenizer, examples, settings
        self.peaks = peaks
        self.truncated: int | None = None  # prompts that lost their start; None before any was answered
        self.shared: dict[str, Any] = {}  # what several tasks of this model need
        self.encoded = Counts()  # what became of the examples, once a loss or a class was asked for

    def file(self, task: str) -> Path:
        """The local data file given for a task. Raises InputError if there is none."""
        if task not in self.settings.files:
            raise InputError(
                f"task {task} reads a data file: give evaluation.files.{task}=FILE (docs/evaluation.md)"
            )
        path = Path(self.settings.files[task])
        if not path.is_file():
            raise InputError(f"evaluation.files.{task}: no such file: {path}")
        return path

    def rows(self, task: str, fields: Fields) -> list[dict[str, Any]]:
        """The objects of a task's JSON Lines file, the first `limit` of them; see `rows.read_rows`.

        Raises:
            InputError: No file, no JSON, no objects, or a field that is missing or of another type.
        """
        return read_rows(self.file(task), fields, limit=self.settings.limit, task=task)

    def prompt(self, instruction: str, input: str = "") -> Marked:
        """An instruction in the run's template, whose control tokens are marked."""
        return prompt_text(Example(instruction, input), self.settings.template, self.tokenizer)

    def conversation(self, turns: Sequence[Turn]) -> Marked:
        """The text before an answer to a conversation, likewise."""
        asked = Example("", turns=(*turns, Turn(ASSISTANT, "")))
        return prompt_text(asked, self.settings.template, self.tokenizer)

    def response(self, instruction: str, output: str) -> Marked:
        """An answer as it follows `prompt`, likewise."""
        example = Example(instruction, output=output)
        return response_text(example, self.settings.template, self.tokenizer)

    def max_new_tokens(self, default: int) -> int:
        """The most tokens of an answer: what was set, else a task's own number."""
        return self.settings.max_new_tokens or default

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        samples: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[str]]:
        """Answers prompts, in batches.

        Args:
            prompts: What goes after the begin token. All is data and none of it a control token, but for
                what `prompt` has marked; + keeps the marks. One that is too long for the context loses its
                start and is counted in `truncated`.
            max_new_tokens: The most tokens of an answer.
            stop: An answer ends before the first of these.
            samples: Answers to each prompt.
            temperature: 0 is greedy: every sample the same.
            top_p: Draw from the least set of likeliest tokens with this probability in sum.
            seed: Draws with another seed are independent. They do not depend on the batch size.

        Returns:
            For each prompt its answers, without special tokens.

        Raises:
            InputError: A prompt without tokens, or no room for a prompt in the model's context.
        """
        room = prompt_room(self.model, max_new_tokens, reserved=self.settings.reserved)
        encoded, shortened = encode_prompts(prompts, self.tokenizer, max_length=room)
        self.truncated = (self.truncated or 0) + shortened
        if temperature == 0:
            sampling, repeats = None, 1
        else:
            repeats = samples
            seeds = [
                self.draw_seed(seed, place, sample)
                for place in range(len(prompts))
                for sample in range(samples)
            ]
            sampling = Sampling(temperature, top_p, seeds)
        texts = generate(
            self.model,
            self.tokenizer,
            [ids for ids in encoded for _ in range(repeats)],
            max_new_tokens=max_new_tokens,
            batch_size=self.settings.batch_size,
            memory=self.settings.memory,
            peaks=self.peaks,
            stop=stop,
            sampling=sampling,
            end=self.end,
        )
        if sampling is None:
            return [[text] * samples for text in texts]
        return [texts[start : start + samples] for start in range(0, len(texts), samples)]

    def draw_seed(self, seed: int, place: int, sample: int) -> int:
        """The seed of one answer's draws: `sample` to the prompt in `place`."""
        return derive_seed(self.settings.seed, "answers", seed, place, sample)

    @cached_property
    def _greedy(self) -> tuple[list[str], int]:
        """Answers to the examples, and how many prompts lost their start."""
        tokens, length = self.max_new_tokens(64), self.settings.max_length
        room = prompt_room(self.model, tokens, reserved=self.settings.reserved)
        # Cut here, where the begin token is kept, and not by the length of the context in generate.
        encoded, shortened = encode_asked(
            self.examples,
            self.tokenizer,
            template=self.settings.template,
            max_length=length if room is None else min(length, room),
        )
        answers = generate(
            self.model,
            self.tokenizer,
            encoded,
            max_new_tokens=tokens,
            batch_size=self.settings.batch_size,
            memory=self.settings.memory,
            peaks=self.peaks,
            end=self.end,
        )
        return answers, shortened

    @cached_property
    def end(self) -> int | None:
        """The token with which answers end in the run's template."""
        return prompts_in(self.settings.template, self.tokenizer).end

    @property
    def answers(self) -> list[str]:
        """The model's greedy answer to each example; for a classifier the label of its highest output."""
        if self.settings.labels is not None:
            return [self.settings.labels[index] for index in self.class_scores[1]]
        self.truncated = self._greedy[1]
        return self._greedy[0]

    @cached_property
    def token_losses(self) -> tuple[list[float], list[int]]:
        """Of each example the sum of its tokens' losses in nats, and how many tokens carry loss."""
        found = encode_causal(
            self.examples,
            self.tokenizer,
            template=self.settings.template,
            loss_on=self.settings.loss_on,
            max_length=self.max_length,
        )
        encoded, self.encoded = found.items, found.counts
        losses, counts = self.losses(encoded)
        if not found.parts:
            return losses, counts
        ends = list(accumulate(found.parts))
        parts = [slice(end - count, end) for end, count in zip(ends, found.parts, strict=True)]
        return [sum(losses[part]) for part in parts], [sum(counts[part]) for part in parts]

    @cached_property
    def class_scores(self) -> tuple[list[float], list[int]]:
        """A classifier's loss on each example, and the class of its highest output."""
        assert self.settings.labels is not None
        found = encode_classification(
            self.examples, self.tokenizer, labels=self.settings.labels, max_length=self.max_length
        )
        encoded, self.encoded = found.items, found.counts
        return self.losses(encoded)

    @property
    def max_length(self) -> int:
        """The most tokens of an example that the model reads."""
        context = context_length(self.model, reserved=self.settings.reserved)
        return self.settings.max_length if context is None else min(self.settings.max_length, context)

    def losses(self, encoded: Sequence[Encoded]) -> tuple[list[float], list[int]]:
        """Of each encoded example the sum of its losses in nats, and how many labels carry loss."""
        pad = self.tokenizer.pad_token_id
        return example_losses(
            self.model,
            encoded,
            batch_size=self.settings.batch_size,
            memory=self.settings.memory,
            pad_id=pad if isinstance(pad, int) else 0,
            classes=self.settings.labels is not None,
            watched=self.watched,
        )

    def watched(self, kind: str, rows: int, tokens: int) -> AbstractContextManager[None]:
        """Inside, the model is given a batch of a kind: `rows` examples, the longest of so many tokens."""
        return self.peaks.batch(kind, rows, tokens, self.model) if self.peaks else nullcontext()


@dataclass(frozen=True)
class Task:
    """One way to score a model.

    Attributes:
        function: Scores a model in its environment.
        metric: The main one of its outcome.
        scorer: Name and version of what scores.
        examples: Whether it scores the held-out examples; else it brings its own.
        classifier: Whether it can score a classifier.
        lower_is_better: Of two values of that metric; None: not said.
    """

    function: Callable[[EvalEnv], Outcome]
    metric: str
    scorer: Callable[[], str] = lambda: f"fedtune {__version__}"
    examples: bool = False
    classifier: bool = False
    lower_is_better: bool | None = None
