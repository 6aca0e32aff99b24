"""MT-bench: a judge marks the model's answers to questions of two turns (Zheng et al. 2023, sec. 2.3, 3.1).

Questions, reference answers and the judge's prompts are files of the user, in the format in which the authors
publish them (lm-sys/FastChat, `llm_judge/data`): `mt-bench`, `mt-bench-references` and `mt-bench-prompts` of
`evaluation.files`. As published: the temperature by category, up to 1024 tokens an answer, single-answer
grading from 1 to 10, the judge at temperature 0 with up to 2048 tokens, the prompt with reference answers for
math, reasoning and coding, the score in `[[ ]]` or else `[ ]`, and the mean over all turns.

Differences: a mark outside 1 to 10 counts as none; what was not judged after all attempts is counted and left
out; and after five failures in a row the judge counts as gone, so that a dead endpoint costs minutes.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.data.examples import ASSISTANT, USER, Turn
from fedtune.data.marked import Marked
from fedtune.errors import InputError
from fedtune.evaluation.answers import all_rows
from fedtune.evaluation.endpoint import Endpoint, Unanswered, key_of
from fedtune.evaluation.types import EvalEnv, Outcome, Scored, Task
from fedtune.version import __version__

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
WITH_REFERENCE = ("math", "reasoning", "coding")
_ANSWER_TOKENS, _JUDGE_TOKENS = 1024, 2048
_GONE = 5  # failures in a row
_MARKS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
# The judge's prompts by (with reference, turn): the published name, and what is filled in.
_PROMPTS = {
    (False, 1): ("single-v1", {"question", "answer"}),
    (False, 2): ("single-v1-multi-turn", {"question_1", "answer_1", "question_2", "answer_2"}),
    (True, 1): ("single-math-v1", {"question", "answer", "ref_answer_1"}),
    (True, 2): (
        "single-math-v1-multi-turn",
        {"question_1", "answer_1", "question_2", "answer_2", "ref_answer_1", "ref_answer_2"},
    ),
}


@dataclass(frozen=True)
class Question:
    """One question of one or two turns, and the reference answers where the judge sees them."""

    id: int | str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()

    @property
    def temperature(self) -> float:
        """Of the model's answers; 0 is greedy."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


@dataclass(frozen=True)
class Mark:
    """The judge's word on one turn: a score and its reply, or why there is none."""

    score: float | None
    reply: str = ""
    unjudged: str = ""


def score_in(reply: str) -> float | None:
    """The mark in a judge's reply: the first `[[x]]`, else the first `[x]`; None where it is not 1 to 10."""
    for pattern in _MARKS:
        if found := pattern.search(reply):
            mark = float(found[1])
            return mark if 1 <= mark <= 10 else None
    return None


def load_questions(env: EvalEnv) -> list[Question]:
    """The questions, with references for the categories whose prompts have them.

    Raises:
        InputError: A missing or malformed file, an id twice, or a question without the references it needs.
    """
    rows = env.rows("mt-bench", {"question_id": (int, str), "category": str, "turns": list})
    twice = [str(i) for i, count in Counter(row["question_id"] for row in rows).items() if count > 1]
    if twice:
        raise InputError(f"{env.file('mt-bench')}: question_id {', '.join(twice)} is there more than once")
    references: dict[int | str, tuple[str, ...]] = {}
    if any(row["category"] in WITH_REFERENCE for row in rows):
        path = env.file("mt-bench-references")
        fields: dict[str, type | tuple[type, ...]] = {"question_id": (int, str), "choices": list}
        for row in all_rows(env, "mt-bench-references", fields):
            references[row["question_id"]] = _reference(row, path)
    questions = []
    for row in rows:
        name, turns = row["question_id"], tuple(row["turns"])
        if len(turns) not in (1, 2) or not all(isinstance(turn, str) and turn for turn in turns):
            raise InputError(
                f"{env.file('mt-bench')}: question {name}: turns must be one or two texts, got {turns!r}"
            )
        known = references.get(name, ()) if row["category"] in WITH_REFERENCE else ()
        if row["category"] in WITH_REFERENCE and len(known) < len(turns):
            raise InputError(
                f"{env.file('mt-bench-references')}: question {name} ({row['category']}) needs a "
                f"reference answer to each of its {len(turns)} turns, got {len(known)}"
            )
        questions.append(Question(name, row["category"], turns, known))
    return questions


def _reference(row: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    first = row["choices"][0] if row["choices"] else None
    turns = first.get("turns") if isinstance(first, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise InputError(
            f"{path}: question {row['question_id']}: choices[0].turns must be a list of texts, got {turns!r}"
        )
    return tuple(turns)


def load_prompts(env: EvalEnv, questions: Sequence[Question]) -> dict[tuple[bool, int], tuple[str, str]]:
    """The judge's system prompt and template by (with reference, turn), those that the questions need.

    Raises:
        InputError: A missing or malformed file, a prompt that is not in it, or one with other fields than
            the published one.
    """
    path = env.file("mt-bench-prompts")
    fields = {"name": str, "system_prompt": str, "prompt_template": str}
    rows = {row["name"]: row for row in all_rows(env, "mt-bench-prompts", fields)}
    needed = {(bool(q.references), turn) for q in questions for turn in range(1, len(q.turns) + 1)}
    prompts = {}
    for key in sorted(needed):
        name, wanted = _PROMPTS[key]
        if name not in rows:
            raise InputError(f"{path}: there is no prompt {name}; there are {', '.join(rows)}")
        template = rows[name]["prompt_template"]
        try:
            parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
        except ValueError as error:
            raise InputError(f"{path}: prompt_template of {name}: {error}") from None
        # a format specification or attribute has no place in a text, and could be made to do harm
        if {part[1] for part in parts} != wanted or any(part[2] or part[3] for part in parts):
            raise InputError(
                f"{path}: prompt_template of {name} must have the fields "
                f"{', '.join('{' + one + '}' for one in sorted(wanted))}, got "
                f"{', '.join('{' + str(part[1]) + '}' for part in parts) or 'none'}"
            )
        prompts[key] = (rows[name]["system_prompt"], template)
    return prompts


def answer(env: EvalEnv, questions: Sequence[Question]) -> list[list[str]]:
    """The model's answers to each question's turns; the second turn sees the first answer."""
    answers: list[list[str]] = [[] for _ in questions]
    tokens = env.max_new_tokens(_ANSWER_TOKENS)
    for turn in (0, 1):
        for temperature in sorted({question.temperature for question in questions}):
            places = [
                place
                for place, question in enumerate(questions)
                if question.temperature == temperature and turn < len(question.turns)
            ]
            if not places:
                continue
            made = env.generate(
                [conversation(env, questions[p].turns[: turn + 1], answers[p]) for p in places],
                max_new_tokens=tokens,
                temperature=temperature,
                seed=round(temperature * 10) * 2 + turn,  # no two calls share their draws
            )
            for place, texts in zip(places, made, strict=True):
                answers[place].append(texts[0].strip())
    return answers


def conversation(env: EvalEnv, turns: Sequence[str], answers: Sequence[str]) -> Marked:
    """The text before an answer, in the run's template."""
    spoken = [text for turn in zip(turns, answers, strict=False) for text in turn] + [turns[-1]]
    return env.conversation([Turn((USER, ASSISTANT)[place % 2], text) for place, text in enumerate(spoken)])


def judge(
    endpoint: Endpoint,
    questions: Sequence[Question],
    answers: Sequence[Sequence[str]],
    prompts: Mapping[tuple[bool, int], tuple[str, str]],
) -> list[list[Mark]]:
    """The judge's mark for each turn of each question.

    Raises:
        InputError: The endpoint redirects, or takes neither key, address nor model.
    """
    marks: list[list[Mark]] = [[] for _ in questions]
    failed = 0  # in a row
    for place, question in enumerate(questions):
        for turn in range(1, len(question.turns) + 1):
            if failed >= _GONE:
                marks[place].append(
                    Mark(None, unjudged=f"not asked: the judge failed {_GONE} times in a row")
                )
                continue
            system, template = prompts[bool(question.references), turn]
            messages = [
                {"role": "system", "content": system},
                {"role": "user", "content": template.format(**_filled(question, answers[place], turn))},
            ]
            try:
                reply, score = endpoint.ask(messages, score_in, max_tokens=_JUDGE_TOKENS)
            except Unanswered as error:
                failed += 1
                marks[place].append(Mark(None, unjudged=str(error)))
            else:
                failed = 0
                marks[place].append(Mark(score, reply))
    return marks


def _filled(question: Question, answers: Sequence[str], turn: int) -> dict[str, str]:
    values = {f"ref_answer_{n}": text for n, text in enumerate(question.references, 1)}
    if turn == 1:
        return values | {"question": question.turns[0], "answer": answers[0]}
    values |= {f"question_{n}": text for n, text in enumerate(question.turns, 1)}
    return values | {f"answer_{n}": text for n, text in enumerate(answers, 1)}


def outcome(questions: Sequence[Question], marks: Sequence[Sequence[Mark]]) -> Outcome:
    """Mean marks over all turns, by turn and by category.

    A question is one example, with all its judged turns: they are not independent, and the standard error
    must not take them so. One that was not judged stays among the examples and has no part in the means.
    """
    parts = {"score": list(marks)}
    for turn in sorted({n for question in questions for n in range(len(question.turns))}):
        parts[f"score_turn_{turn + 1}"] = [one[turn : turn + 1] for one in marks if turn < len(one)]
    for question, one in zip(questions, marks, strict=True):
        parts.setdefault(f"score/{question.category}", []).append(one)
    why = {
        question.id: next(mark.unjudged for mark in one if mark.score is None)
        for question, one in zip(questions, marks, strict=True)
        if any(mark.score is None for mark in one)
    }
    notes: tuple[str, ...] = ()
    if why:
        notes = (
            f"{len(why)} of {len(questions)} questions have a turn without a mark, which is left out: "
            f"{', '.join(map(str, why))} ({'; '.join(dict.fromkeys(why.values()))})",
        )
    means = {name: _mean(part) for name, part in parts.items()}
    return Outcome({name: mean for name, mean in means.items() if mean}, {"unjudged": len(why)}, notes)


def _mean(marks: Sequence[Sequence[Mark]]) -> Scored | None:
    """Over all turns with a mark; None where there is none."""
    sums = [
        (sum(m.score for m in one if m.score is not None), sum(m.score is not None for m in one))
        for one in marks
    ]
    total, count = (sum(column) for column in zip(*sums, strict=True))
    if not count:
        return None
    if all(n for _, n in sums):
        return Scored([s / n for s, n in sums], weights=[n for _, n in sums])

    def pooled(drawn: Sequence[tuple[float, int]]) -> float:
        n = sum(n for _, n in drawn)  # 0: the bootstrap drew questions without marks only
        return sum(s for s, _ in drawn) / n if n else total / count

    return Scored(sums, aggregate=pooled)


def _mt_bench(env: EvalEnv) -> Outcome:
    settings = env.settings.judge
    if settings is None:
        raise InputError(
            "task mt-bench needs a judge: set evaluation.judge.url and evaluation.judge.model "
            "(docs/evaluation.md)"
        )
    endpoint = Endpoint(
        settings.url,
        settings.model,
        key_of(settings.key_variable),
        settings.timeout_s,
        settings.retries,
    )
    questions = load_questions(env)
    prompts = load_prompts(env, questions)  # what can be wrong is found before the model works
    answers = answer(env, questions)
    marks = judge(endpoint, questions, answers, prompts)
    found = outcome(questions, marks)
    details = [
        {
            "question_id": question.id,
            "category": question.category,
            "answers": said,
            "marks": [{"score": m.score, "reply": m.reply, "unjudged": m.unjudged} for m in one],
        }
        for question, said, one in zip(questions, answers, marks, strict=True)
    ]
    return replace(found, notes=(f"marked by {settings.model}", *found.notes), details=details)


TASKS = {
    "mt-bench": Task(
        _mt_bench,
        "score",
        lambda: f"fedtune {__version__}, MT-bench single-answer grading",
    ),
}
