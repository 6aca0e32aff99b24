"""Tasks that compare short answers with references: GSM8K, SQuAD, and FedKSeed's Rouge-L.

* GSM8K (Cobbe et al. 2021): the number after the marker `####`. `exact_match` wants the model to write the
  marker; `exact_match_flexible` takes the last number of the answer instead. Both are, text for text, the
  strict-match and flexible-extract of lm-evaluation-harness (gsm8k, version 3).
* SQuAD (Rajpurkar et al. 2016, sec. 6.1; 2018 for questions without an answer): exact match and token F1
  without case, punctuation and articles, against the best of the references.
* Rouge-L of the `rouge` package, which the authors of FedKSeed scored with. It keeps case, cuts sentences at
  full stops and counts a repeated word once, so its numbers are not those of `rouge-l`.
"""

from __future__ import annotations

import functools
import json
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from typing import Any

from fedtune.core.seeds import numpy_generator
from fedtune.errors import InputError
from fedtune.evaluation.types import EvalEnv, Outcome, Scored, Task
from fedtune.version import __version__

SHOTS = 8
_GSM8K_FIELDS = {"question": str, "answer": str}
_MARKED_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
_ANY_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def all_rows(env: EvalEnv, key: str, fields: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """`EvalEnv.rows` of a file that goes with a task: `evaluation.limit` counts questions, not these."""
    unlimited = replace(env.settings, limit=None)
    return EvalEnv(env.model, env.tokenizer, (), unlimited).rows(key, fields)


def marked_number(answer: str) -> str:
    """The number after the first marker `####`, as compared; empty where there is none."""
    found = _MARKED_NUMBER.search(answer)
    return _plain_number(found[1]) if found else ""


def last_number(answer: str) -> str:
    """The last number of an answer, as compared; empty where there is none."""
    found = _ANY_NUMBER.findall(answer)
    return _plain_number(found[-1]) if found else ""


def reference_number(reference: str) -> str:
    """What follows the last marker of a worked solution, as compared.

    Raises:
        InputError: There is no marker.
    """
    _, marker, number = reference.rpartition("#### ")
    if not marker or not _plain_number(number):
        raise InputError(
            f'a GSM8K answer ends with "#### " and a number; got one that ends {reference[-40:]!r}'
        )
    return _plain_number(number)


def _plain_number(text: str) -> str:
    """Without thousands' commas, dollar signs and one final full stop."""
    return text.replace(",", "").replace("$", "").strip().removesuffix(".")


def _gsm8k(env: EvalEnv) -> Outcome:
    rows = env.rows("gsm8k", _GSM8K_FIELDS)
    return _solved(env, rows, [env.prompt(row["question"]) for row in rows], stop=())


def _gsm8k_few_shot(env: EvalEnv) -> Outcome:
    rows = env.rows("gsm8k", _GSM8K_FIELDS)
    before = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in _shots(env))
    prompts = [f"{before}Question: {row['question']}\nAnswer:" for row in rows]
    return _solved(env, rows, prompts, stop=("Question:",))


def _shots(env: EvalEnv) -> list[dict[str, Any]]:
    """The file's examples in its order if they are as many as wanted, else a draw that is always the same."""
    rows = all_rows(env, "gsm8k-exemplars", _GSM8K_FIELDS)
    if len(rows) < SHOTS:
        raise InputError(
            f"{env.file('gsm8k-exemplars')}: {SHOTS} solved examples go before each question, got {len(rows)}"
        )
    if len(rows) == SHOTS:
        return rows
    drawn = numpy_generator(0, "gsm8k exemplars").choice(len(rows), SHOTS, replace=False)
    return [rows[place] for place in drawn]


def _solved(env: EvalEnv, rows: list[dict[str, Any]], prompts: list[str], stop: Sequence[str]) -> Outcome:
    wanted = [reference_number(row["answer"]) for row in rows]  # before the model works for nothing
    made = env.generate(prompts, max_new_tokens=env.max_new_tokens(256), stop=stop)
    answers = [texts[0] for texts in made]
    strict = [float(marked_number(a) == w) for a, w in zip(answers, wanted, strict=True)]
    flexible = [float(last_number(a) == w) for a, w in zip(answers, wanted, strict=True)]
    return Outcome({"exact_match": Scored(strict), "exact_match_flexible": Scored(flexible)})


def squad_exact(answer: str, references: Sequence[str]) -> float:
    """1 if an answer is one of the references but for case, punctuation, articles and blanks, else 0."""
    return max(float(_words(answer) == _words(reference)) for reference in _answerable(references))


def squad_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the words shared with the reference that fits best, in [0, 1]."""
    return max(_f1(_words(answer), _words(reference)) for reference in _answerable(references))


def _f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))  # = 2 P R / (P + R)


def _answerable(references: Sequence[str]) -> Sequence[str]:
    """Of a question without an answer the reference is the empty text."""
    return [reference for reference in references if _words(reference)] or [""]


def _words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _squad(env: EvalEnv) -> Outcome:
    rows = _squad_rows(env)
    references = [_references(row["answers"], place) for place, row in enumerate(rows)]
    prompts = [env.prompt(row["question"], row["context"]) for row in rows]
    made = env.generate(prompts, max_new_tokens=env.max_new_tokens(64))
    answers = [_first_line(texts[0]) for texts in made]
    return Outcome(
        {
            "exact_match": Scored([squad_exact(a, r) for a, r in zip(answers, references, strict=True)]),
            "f1": Scored([squad_f1(a, r) for a, r in zip(answers, references, strict=True)]),
        }
    )


def _squad_rows(env: EvalEnv) -> list[dict[str, Any]]:
    """One question a line, or the nested file as the publishers give it."""
    path = env.file("squad")
    if path.suffix != ".json":
        return env.rows("squad", {"question": str, "context": str, "answers": (list, dict)})
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            {"question": str(asked["question"]), "context": str(part["context"]), "answers": asked["answers"]}
            for article in document["data"]
            for part in article["paragraphs"]
            for asked in part["qas"]
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: not SQuAD's data[].paragraphs[].qas[] ({type(error).__name__}: {error}); "
            "one question a line with question, context and answers goes into a .jsonl file"
        ) from None
    if not rows:
        raise InputError(f"{path} has no examples for task squad")
    return rows[: env.settings.limit]


def _references(answers: Any, place: int) -> list[str]:
    """The texts of [{"text": ...}], {"text": [...]} or [...]."""
    listed = answers.get("text") if isinstance(answers, dict) else answers
    texts: list[Any] = [one.get("text") if isinstance(one, dict) else one for one in listed or []]
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(
            f'squad: answers of example {place} must be texts, [{{"text": ...}}] or {{"text": [...]}}, '
            f"got {answers!r}"
        )
    return texts


def _first_line(answer: str) -> str:
    return next((line for line in answer.splitlines() if line.strip()), "")


def rouge_l_fedkseed(answer: str, reference: str) -> float:
    """Rouge-L F1 of the `rouge` package, in [0, 1]; 0 where a text has no words, as in FedKSeed's code.

    Raises:
        InputError: The package is not installed.
    """
    scorer = rouge_scorer()
    # the package walks back through a sentence by one call a word
    with _deeper_recursion(len(answer.split()) + len(reference.split())):
        try:
            return float(scorer.get_scores(answer, reference)[0]["rouge-l"]["f"])
        except ValueError:  # its word for a text without sentences
            return 0.0


@functools.cache
def rouge_scorer() -> Any:
    """The scorer of the package rouge. Raises InputError if it is not installed."""
    try:
        from rouge import Rouge
    except ModuleNotFoundError:
        raise InputError(
            "task rouge-l-fedkseed scores with the package rouge: install fedtune[eval]"
        ) from None
    return Rouge(metrics=["rouge-l"], stats=["f"])


def _rouge_name() -> str:
    rouge_scorer()
    return f"rouge {metadata.version('rouge')} rouge-l F1"


@contextmanager
def _deeper_recursion(frames: int) -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + frames)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _rouge_l_fedkseed(env: EvalEnv) -> Outcome:
    scores = [rouge_l_fedkseed(a, e.output) for a, e in zip(env.answers, env.examples, strict=True)]
    return Outcome({"rouge_l_fedkseed": Scored(scores)})


TASKS = {
    "gsm8k-0shot": Task(
        _gsm8k,
        "exact_match",
        lambda: f"fedtune {__version__}, GSM8K 0-shot",
    ),
    "gsm8k-cot-8shot": Task(
        _gsm8k_few_shot,
        "exact_match",
        lambda: f"fedtune {__version__}, GSM8K {SHOTS}-shot",
    ),
    "squad": Task(
        _squad,
        "exact_match",
        lambda: f"fedtune {__version__}, SQuAD 1.1/2.0 normalisation",
    ),
    "rouge-l-fedkseed": Task(
        _rouge_l_fedkseed,
        "rouge_l_fedkseed",
        _rouge_name,
        examples=True,
    ),
}
