"""HumanEval-X: functions written from a signature and a comment, run against tests; Pass@1 and Pass@10.

Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1 (`pass_at_k`); Zheng et al. 2023,
"CodeGeeX" (problems in several languages; see `languages`). The prompt is the problem's own, without a
template: a model continues it.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from fedtune.errors import InputError
from fedtune.evaluation import sandbox
from fedtune.evaluation.compilers import Missing, Problem, Toolchain
from fedtune.evaluation.languages import KINDS, LANGUAGES, Language
from fedtune.evaluation.sandbox import CodeSettings
from fedtune.evaluation.types import EvalEnv, Outcome, Scored, Task
from fedtune.version import __version__

NEW_TOKENS = 512  # all but 2 of the data's 656 solutions, in Llama 2's vocabulary
KS = (1, 10)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k answers passes, estimated without bias from more answers.

    1 - C(n - c, k) / C(n, k) for n samples of which c passed, as 1 minus the product of 1 - k / i for i from
    n - c + 1 to n, which no large number enters (Chen et al. 2021, eq. 1 and fig. 3).

    Raises:
        InputError: Fewer samples than k, or more that passed than there are.
    """
    if not 1 <= k <= samples:
        raise InputError(
            f"pass@{k} needs at least {max(k, 1)} samples a problem, got {samples}: raise evaluation.samples."
        )
    if not 0 <= passed <= samples:
        raise InputError(f"of {samples} samples between 0 and {samples} can pass, got {passed}.")
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))


def verdicts(
    language: Language, toolchain: Toolchain, programs: Sequence[tuple[Problem, str]], settings: CodeSettings
) -> list[str]:
    """Compiles and runs programs, some at a time.

    Args:
        language: Of all of them.
        toolchain: Its compiler.
        programs: Problems, and source texts; the same text twice is run once.
        settings: Limits, and how many at a time.

    Returns:
        For each "passed" or one of `languages.KINDS`.

    Raises:
        InputError: The sandbox is not permitted here.
    """

    def verdict(program: tuple[Problem, str]) -> str:
        job = toolchain.job(*program, settings)
        finished = sandbox.run(job.files, job.steps, isolation=settings.isolation, readable=job.readable)
        return language.verdict(finished, len(job.steps))

    distinct = {(problem["task_id"], source): (problem, source) for problem, source in programs}
    executor = ThreadPoolExecutor(settings.workers)
    try:
        found = dict(zip(distinct, executor.map(verdict, distinct.values()), strict=True))
    finally:
        executor.shutdown(cancel_futures=True)  # after an error or an interrupt: start no others
    return [found[problem["task_id"], source] for problem, source in programs]


@dataclass
class _Tally:
    """What one language adds to the outcome."""

    passes: list[int] = field(default_factory=list)  # of each problem: samples that passed
    failures: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    notes: list[str] = field(default_factory=list)


def _score_language(env: EvalEnv, name: str) -> _Tally:
    language, tally = LANGUAGES[name], _Tally()
    problems = env.rows(f"humaneval-x-{name}", language.fields)
    try:
        with language.toolchain() as toolchain:
            lacks = {problem["task_id"]: toolchain.lacks(problem) for problem in problems}
            for task, what in lacks.items():
                if what:
                    tally.notes.append(f"{task} skipped: this machine has not {what}.")
            kept = [problem for problem in problems if not lacks[problem["task_id"]]]
            tally.skipped = len(problems) - len(kept)
            programs = [
                (problem, language.program(problem, language.cut(text)))
                for problem, texts in zip(kept, _texts(env, name, kept), strict=True)
                for text in texts
            ]
            found = verdicts(language, toolchain, programs, env.settings.code)
    except Missing as why:
        return _Tally(skipped=len(problems), notes=[f"{name}: {len(problems)} problems skipped: {why}."])
    each = env.settings.samples
    tally.passes = [found[i : i + each].count("passed") for i in range(0, len(found), each)]
    tally.failures = Counter(kind for kind in found if kind != "passed")
    return tally


def _texts(env: EvalEnv, name: str, problems: Sequence[Problem]) -> list[list[str]]:
    settings = env.settings
    return env.generate(
        [problem["prompt"] for problem in problems],
        max_new_tokens=env.max_new_tokens(NEW_TOKENS),
        stop=LANGUAGES[name].stop,
        samples=settings.samples,
        temperature=settings.temperature if settings.samples > 1 else 0.0,
        top_p=settings.top_p,
        seed=list(LANGUAGES).index(name),
    )


def _score(names: Sequence[str], env: EvalEnv) -> Outcome:
    """Pass@k over the problems of some languages, and why answers failed."""
    sandbox.check(env.settings.code.isolation)  # before any answer is generated
    tallies = {name: _score_language(env, name) for name in names}
    samples = env.settings.samples
    ks = [k for k in KS if k <= samples]

    def estimates(k: int, passes: Iterable[int]) -> Scored:
        return Scored([pass_at_k(samples, passed, k) for passed in passes])

    passes = [passed for tally in tallies.values() for passed in tally.passes]
    failures = sum((tally.failures for tally in tallies.values()), Counter[str]())
    more: dict[str, float] = {"samples": samples}
    if len(names) > 1:
        scored = {name: tally.passes for name, tally in tallies.items() if tally.passes}
        more |= {f"pass@{k}/{name}": estimates(k, scored[name]).value for k in ks for name in scored}
    more |= {f"failures/{kind}": failures[kind] for kind in KINDS}
    more["skipped"] = sum(tally.skipped for tally in tallies.values())
    notes = [note for tally in tallies.values() for note in tally.notes]
    if env.settings.code.isolation == "none":
        notes.append("programs ran without isolation from network and files (evaluation.code.isolation).")
    metrics = {f"pass@{k}": estimates(k, passes) for k in ks} if passes else {}
    return Outcome(metrics, more, tuple(notes))


def _scorer(names: Sequence[str]) -> str:
    return "; ".join([f"fedtune {__version__} HumanEval-X", *map(_compiler, names)])


def _compiler(name: str) -> str:
    try:
        return LANGUAGES[name].version()
    except Missing as why:
        return f"{name} skipped: {why}"


def _task(names: tuple[str, ...]) -> Task:
    function: Callable[[EvalEnv], Outcome] = functools.partial(_score, names)
    return Task(function, "pass@1", functools.partial(_scorer, names))


TASKS = {
    **{f"humaneval-x-{name}": _task((name,)) for name in LANGUAGES},
    "humaneval-x": _task(tuple(LANGUAGES)),
}
