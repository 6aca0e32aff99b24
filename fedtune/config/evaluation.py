"""What a run measures of its models, and with how much memory."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from fedtune.config.pictures import Drawn
from fedtune.core.settings import Settings
from fedtune.errors import InputError
from fedtune.evaluation.judge_settings import JudgeSettings
from fedtune.evaluation.registry import AUTO, certain, check_tasks
from fedtune.evaluation.sandbox import CodeSettings
from fedtune.measure.quantities import BYTES, quantity


class Stop(Settings):
    """When a run has had enough rounds: so many evaluations in a row were no better than the best."""

    metric: str = "loss.loss"  # as task.metric
    patience: int = Field(3, ge=1)  # evaluations


class Evaluation(Settings):
    """What is measured, on which examples, and when."""

    where: Literal["server", "clients"] = "server"  # clients: each scores its own held-out examples
    tasks: list[str] = Field([AUTO], min_length=1)
    every: int = Field(1, ge=0)  # rounds; 0: only at the end
    stop: Stop | None = None  # ends a run early
    arrivals: bool = False  # asynchronous: also after each arrival
    max_examples: int | None = Field(None, ge=1)  # the first n of the held-out examples, shuffled once
    max_new_tokens: int | None = Field(None, ge=1)  # of an answer; null: what each task needs
    batch_size: int = Field(64, ge=1)  # examples together, at most; scores change by rounding only
    memory: str = "2GB"  # of the examples together, beside the weights, about: a number with its unit
    bootstrap: int = Field(1000, ge=0)  # resamples of the 95 % interval; 0: no interval
    limit: int | None = Field(None, ge=1)  # examples of a task that brings its own; null: all
    files: dict[str, str] = Field(default_factory=dict)  # the data file of each task that reads one
    task_folder: str | None = None  # YAML tasks for lm-evaluation-harness, beside its own
    data_folder: str | None = None  # where those tasks read their files
    few_shot: int | None = Field(None, ge=0)  # solved examples of a harness task; null: its own
    harness_template: bool = False  # harness tasks are asked in data.template, as one question
    samples: int = Field(1, ge=1)  # answers drawn for one question, for Pass@k
    temperature: float = Field(0.8, gt=0)  # of those draws; one answer is greedy
    top_p: float = Field(1.0, gt=0, le=1)  # of those draws: the likeliest tokens with this probability in sum
    judge: JudgeSettings | None = None  # who marks answers, for mt-bench
    pictures: Drawn | None = None  # with model.task: text-to-image
    code: CodeSettings = CodeSettings()  # how programs that the model wrote are run

    @field_validator("memory", mode="before")
    @classmethod
    def _size(cls, given: object) -> str:
        try:
            quantity(str(given), BYTES, "a size")
        except InputError as error:
            raise ValueError(str(error)) from None
        return str(given)

    @property
    def memory_bytes(self) -> int:
        """`memory` as a number."""
        return int(quantity(self.memory, BYTES, "evaluation.memory"))

    @model_validator(mode="after")
    def _known(self) -> Self:
        try:
            check_tasks(certain(self.tasks), self.task_folder)
        except InputError as error:
            raise ValueError(str(error)) from None
        return self
