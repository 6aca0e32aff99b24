"""The tasks that a configuration can name: our own by name, and whatever lm-evaluation-harness has.

A task's module is imported only when it is put to a model.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedtune.data.examples import Example
from fedtune.errors import InputError, nearest
from fedtune.evaluation import harness_names
from fedtune.registry import Registry

if TYPE_CHECKING:
    from fedtune.evaluation.types import Task

TASKS: Registry[Task] = Registry("task", "evaluation.tasks", "fedtune.tasks")


@dataclass(frozen=True)
class Entry:
    """One of fedtune's own tasks: the module that has it in its `TASKS`, and what is known before.

    Attributes:
        module: In this folder.
        summary: One line for people.
        classifier: Whether it can score a classifier, as the task itself says.
        asks: Whether it puts questions of its own into the run's template.
        pictures: Whether it is for text-to-image models, and for no others.
        mean: The metric that is a mean over held-out examples; empty where there is none.
    """

    module: str
    summary: str
    classifier: bool = False
    asks: bool = False
    pictures: bool = False
    mean: str = ""


CHOICES_TASK = "multiple-choice"
AUTO = "auto"  # in evaluation.tasks: what suits the held-out examples


def _humaneval(language: str) -> Entry:
    return Entry("code", f"HumanEval-X in {language}: Pass@1, from 10 samples on Pass@10")


OWN = {
    "loss": Entry(
        "basic", "mean cross-entropy a token in nats, and perplexity", classifier=True, mean="loss"
    ),
    "accuracy": Entry(
        "basic", "share of answers that are exactly right, also by category", classifier=True, mean="accuracy"
    ),
    CHOICES_TASK: Entry(
        "basic",
        "share of questions with choices whose right letter is the likeliest, also by category",
        mean="accuracy",
    ),
    "rouge-l": Entry(
        "basic", "longest common subsequence of generated answer and reference, F1", mean="rouge_l"
    ),
    "gsm8k-0shot": Entry(
        "answers", "GSM8K without solved examples: the number after ####, in the run's template", asks=True
    ),
    "gsm8k-cot-8shot": Entry("answers", "GSM8K after eight solved examples"),
    "squad": Entry("answers", "SQuAD answers in the run's template: exact match and token F1", asks=True),
    "rouge-l-fedkseed": Entry(
        "answers",
        "Rouge-L as in the FedKSeed paper: the scorer of the rouge package",
        mean="rouge_l_fedkseed",
    ),
    "preference": Entry(
        "preference",
        "pairs of answers: share and margin of higher rewards for the chosen one",
        mean="reward_accuracy",
    ),
    "matthews": Entry("correlation", "Matthews correlation of labels", classifier=True),
    "pearson": Entry("correlation", "Pearson and Spearman correlation of numbers", classifier=True),
    "mt-bench": Entry(
        "judge",
        "MT-bench: answers in two turns, marked from 1 to 10 by a judge behind an endpoint",
        asks=True,
    ),
    "humaneval-x-python": _humaneval("Python"),
    "humaneval-x-cpp": _humaneval("C++"),
    "humaneval-x-java": _humaneval("Java"),
    "humaneval-x-go": _humaneval("Go"),
    "denoising-loss": Entry(
        "pictures", "text-to-image: the loss on held-out pictures, with fixed noise", pictures=True
    ),
    "clip-score": Entry(
        "pictures", "text-to-image: CLIP's cosine of pictures and what they should show", pictures=True
    ),
    "pixel-check": Entry(
        "pictures", "text-to-image: share of pictures that show the drawn shape asked for", pictures=True
    ),
    "humaneval-x": Entry("code", "HumanEval-X in Python, C++, Java and Go, over all and by language"),
}


_ON_ANSWERS = ("accuracy", CHOICES_TASK, "rouge-l", "rouge-l-fedkseed", "matthews", "pearson")


def _load(name: str) -> Task:
    found: Task = importlib.import_module(f"fedtune.evaluation.{OWN[name].module}").TASKS[name]
    return found


for _name, _entry in OWN.items():
    TASKS.built_in(_name, _entry.summary, lambda name=_name: _load(name))  # type: ignore[misc]


def classifies(task: str) -> bool:
    """Whether a task, by its name, can score a classifier."""
    if task in OWN:
        return OWN[task].classifier
    found = TASKS.get(task)
    return found is not None and found.classifier


def mean_of(task: str) -> str | None:
    """The metric of a task, by its name, that is a mean over held-out examples; None: it has no such one.

    Of a task of one's own it is the main one, which must turn out to be a mean where it is scored.
    """
    if task in OWN:
        return OWN[task].mean or None
    found = TASKS.get(task)
    return found.metric if found is not None and found.examples else None


def looks_at_pictures(task: str) -> bool:
    """Whether a task, by its name, is for text-to-image models."""
    return task in OWN and OWN[task].pictures


def refuse_unsuited(tasks: Sequence[str], examples: Sequence[Example]) -> None:
    """Refuses held-out examples that have not what a task scores.

    Raises:
        InputError: Plain texts where answers are compared, or no choices for multiple choice.
    """
    comparing = [task for task in tasks if _compares_answers(task)]
    if comparing and any(example.form == "text" for example in examples):
        raise InputError(
            f"task {comparing[0]} compares answers, and the held-out examples are plain texts, which have "
            "none. Set evaluation.tasks to [loss]"
        )
    bare = sum(not example.choices for example in examples)
    if CHOICES_TASK in tasks and bare:
        raise InputError(
            f"task {CHOICES_TASK} needs questions with choices, and {bare:,} of the {len(examples):,} "
            "held-out examples have none: name the key of their list of answers in data.fields.choices, or "
            "take accuracy, which compares generated answers"
        )


def asks(task: str, *, in_template: bool) -> bool:
    """Whether a task, by its name, puts questions of its own into the run's template.

    Args:
        task: Its name.
        in_template: Whether tasks of lm-evaluation-harness are.
    """
    if task in OWN:
        return OWN[task].asks
    found = TASKS.get(task)
    return in_template if found is None else not found.examples


def _compares_answers(task: str) -> bool:
    """Whether a task, by its name, holds answers against those of the held-out examples."""
    if task in OWN:
        return task in _ON_ANSWERS
    found = TASKS.get(task)
    return found is not None and found.examples and found.metric != "loss"


def certain(tasks: Sequence[str]) -> list[str]:
    """Tasks that are scored whatever the examples are: `auto` has the loss."""
    return list(dict.fromkeys("loss" if task == AUTO else task for task in tasks))


def possible(tasks: Sequence[str]) -> list[str]:
    """Tasks that may be scored, in their order: `auto` may have multiple choice behind the loss."""
    each = (["loss", CHOICES_TASK] if task == AUTO else [task] for task in tasks)
    return list(dict.fromkeys(task for several in each for task in several))


def suited(tasks: Sequence[str], examples: Sequence[Example], *, classes: bool = False) -> list[str]:
    """Tasks that are scored on these examples.

    Args:
        tasks: Of the configuration; `auto` is the loss, and multiple choice where all examples have choices.
        examples: The held-out ones.
        classes: Whether the model is a classifier, which writes no letters.
    """
    choosing = bool(examples) and not classes and all(example.choices for example in examples)
    return possible(tasks) if choosing else certain(tasks)


def check_tasks(tasks: Sequence[str], task_folder: str | None) -> None:
    """Refuses names that are neither ours nor the harness's.

    Raises:
        InputError: An unknown name, with the nearest known one; or the harness is needed and not installed.
    """
    others = [task for task in tasks if task not in TASKS]
    if not others:
        return
    if not harness_names.installed():
        raise InputError(
            f"task {others[0]} is not one of fedtune's own ({', '.join(TASKS)}); for the tasks of "
            f"lm-evaluation-harness install fedtune[eval].{nearest(others[0], TASKS)}"
        )
    known = harness_names.known_names(task_folder)
    for task in others:
        if task not in known:
            close = nearest(task, [*TASKS, *sorted(known)])
            raise InputError(
                f"task {task!r} is not known; fedtune's own are {', '.join(TASKS)}, and lm_eval ls tasks "
                f"lists those of lm-evaluation-harness.{close}"
            )
