"""Hand-made answers with known scores; and the same scores as the field's own packages on random ones."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.evaluation import answers as module
from fedtune.evaluation import correlation
from fedtune.evaluation.answers import (
    last_number,
    marked_number,
    reference_number,
    rouge_l_fedkseed,
    squad_exact,
    squad_f1,
)
from fedtune.evaluation.bootstrap import summarize
from fedtune.evaluation.correlation import matthews, pearson, spearman
from fedtune.evaluation.metrics import rouge_l
from fedtune.evaluation.types import EvalEnv, EvalSettings, Outcome


class Scripted(EvalEnv):
    """A model that says what it is told to."""

    def __init__(self, said: Sequence[str], examples: Sequence[Example] = (), **changes: Any) -> None:
        plain: dict[str, Any] = {"template": "plain", "loss_on": "response", "max_length": 64}
        super().__init__(nn.Identity(), None, examples, EvalSettings(**plain | changes))  # type: ignore[arg-type]
        self.said, self.asked, self.options = list(said), list[str](), dict[str, Any]()

    def generate(self, prompts: Sequence[str], **options: Any) -> list[list[str]]:  # type: ignore[override]
        self.asked, self.options = list(prompts), options
        return [[text] for text in self.said[: len(prompts)]]

    @property
    def answers(self) -> list[str]:
        return self.said


def lines(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def values(outcome: Outcome) -> dict[str, float]:
    return {name: scored.value for name, scored in outcome.metrics.items()}


# Answer, reference, whether strict and whether flexible take it.
SUMS = [
    ("48/2 = 24, 48+24 = 72\n#### 72", "She sold 48+24 = 72.\n#### 72", True, True),
    ("so it is #### 1080", "#### 1,080", True, True),
    ("The change is -5.", "#### -5", False, True),  # no marker
    ("#### $18", "#### 18", False, True),  # strict wants a digit behind the marker
    ("#### 3\n\nQuestion: Tom has 7", "#### 3", True, False),  # the last number is another
    ("", "#### 10", False, False),
]


def test_gsm8k_by_hand(tmp_path: Path) -> None:
    rows = [{"question": f"How many? {i}", "answer": sum_[1]} for i, sum_ in enumerate(SUMS)]
    env = Scripted([sum_[0] for sum_ in SUMS], files={"gsm8k": lines(tmp_path / "test.jsonl", rows)})
    outcome = module.TASKS["gsm8k-0shot"].function(env)
    assert list(outcome.metrics["exact_match"].items) == [strict for _, _, strict, _ in SUMS]
    assert list(outcome.metrics["exact_match_flexible"].items) == [flexible for *_, flexible in SUMS]
    assert values(outcome) == {"exact_match": 3 / 6, "exact_match_flexible": 4 / 6}
    assert env.asked[5] == "How many? 5\nAnswer:"
    assert env.options["max_new_tokens"] == 256
    # of shares: sqrt(p (1 - p) / (n - 1))
    assert summarize([outcome], resamples=0, seed=0)["exact_match_stderr"] == pytest.approx(
        math.sqrt(0.5 * 0.5 / 5)
    )


@given(
    st.lists(st.sampled_from(["#### ", "####", "12", "-3", "$", ",", ".", " ", "\n", "a"]), max_size=12),
    st.sampled_from(["#### 12", "#### -3", "#### 1,212", "#### 12.", "a 12\n#### 3"]),
)
def test_gsm8k_is_scored_as_by_the_harness(parts: list[str], reference: str) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    answer = "".join(parts)
    for ours, pattern, place in (
        (marked_number, r"#### (\-?[0-9\.\,]+)", 0),
        (last_number, r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    ):
        theirs = RegexFilter(regex_pattern=pattern, group_select=place).apply([[answer]], [{}])
        score = exact_match_hf_evaluate(
            [next(iter(next(iter(theirs))))],
            [reference],
            regexes_to_ignore=[",", r"\$", r"(?s).*#### ", r"\.$"],
            ignore_case=True,
        )
        assert (ours(answer) == reference_number(reference)) == bool(score["exact_match"])


def solved(count: int) -> list[dict[str, str]]:
    return [
        {"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(count)
    ]


def test_eight_exemplars_stand_before_each_question_in_their_order(tmp_path: Path) -> None:
    files = {
        "gsm8k": lines(tmp_path / "test.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}] * 3),
        "gsm8k-exemplars": lines(tmp_path / "eight.jsonl", solved(8)),
    }
    env = Scripted([" 1 + 1 = 2\n#### 2\n\n", "#### 3", "two"], files=files, limit=2)
    outcome = module.TASKS["gsm8k-cot-8shot"].function(env)
    assert values(outcome)["exact_match"] == 0.5  # of the two that the limit leaves
    blocks = env.asked[0].split("\n\n")
    assert blocks[7] == "Question: What is 7 + 7?\nAnswer: It is 14.\n#### 14"
    assert blocks[8:] == ["Question: 1 + 1?\nAnswer:"]
    assert env.options["stop"] == ("Question:",)


def test_exemplars_are_drawn_from_a_longer_file_always_the_same(tmp_path: Path) -> None:
    files = {
        "gsm8k": lines(tmp_path / "test.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}]),
        "gsm8k-exemplars": lines(tmp_path / "train.jsonl", solved(50)),
    }
    asked = []
    for seed in (0, 1):  # a run's seed must not change the test
        env = Scripted(["#### 2"], files=files, seed=seed)
        module.TASKS["gsm8k-cot-8shot"].function(env)
        asked.append(env.asked)
    assert asked[0] == asked[1]
    numbers = re.findall(r"What is (\d+) \+", asked[0][0])
    assert len(set(numbers)) == 8 and numbers != sorted(numbers, key=int)
    lines(tmp_path / "train.jsonl", solved(7))
    with pytest.raises(InputError, match="8 solved examples go before each question, got 7"):
        module.TASKS["gsm8k-cot-8shot"].function(Scripted([""], files=files))


def test_gsm8k_needs_marked_references(tmp_path: Path) -> None:
    path = lines(tmp_path / "test.jsonl", [{"question": "1 + 1?", "answer": "It is two"}])
    with pytest.raises(InputError, match=r'ends with "#### " and a number; got one that ends .It is two'):
        module.TASKS["gsm8k-0shot"].function(Scripted(["2"], files={"gsm8k": path}))
    with pytest.raises(InputError, match=r"evaluation\.files\.gsm8k"):
        module.TASKS["gsm8k-0shot"].function(Scripted(["2"]))


def test_every_gsm8k_solution_scores_itself_right(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "test.jsonl").open(encoding="utf-8")]
    env = Scripted(
        [row["answer"] for row in rows], files={"gsm8k": str(shared_data / "gsm8k" / "test.jsonl")}
    )
    assert values(module.TASKS["gsm8k-0shot"].function(env)) == {
        "exact_match": 1.0,
        "exact_match_flexible": 1.0,
    }
    assert len(env.asked) == 1319


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1, 1),  # article, punctuation
        ("denver  BRONCOS", ["Denver Broncos"], 1, 1),
        ("308 points", ["308"], 0, 2 / 3),  # P 1/2, R 1: 2 * 0.5 / 1.5
        ("x y y", ["y y z"], 0, 2 / 3),  # two shared of three and three
        ("x y y", ["y w", "y y"], 0, 4 / 5),  # the second reference fits best: P 2/3, R 1
        ("x", ["z"], 0, 0),
        ("", [], 1, 1),  # a question without an answer
        ("something", [], 0, 0),
        ("the", ["308"], 0, 0),
    ],
)
def test_squad_by_hand(answer: str, references: list[str], exact: float, f1: float) -> None:
    assert squad_exact(answer, references) == exact
    assert squad_f1(answer, references) == pytest.approx(f1)


TEXT = st.lists(st.sampled_from(["the", "A", "an", "x", "y", "Y.", "z-z", "'s", "  "]), max_size=6).map(
    " ".join
)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_squad_is_scored_as_by_the_harness(answer: str, references: list[str]) -> None:
    theirs = pytest.importorskip("lm_eval.tasks.super_glue.record.t5_utils")
    references = [text for text in references if theirs.normalize_squad(text)] or ["x"]
    items = [(answer, f"0_{reference}") for reference in references]
    assert squad_exact(answer, references) == theirs.squad_em_agg(items)
    assert squad_f1(answer, references) == pytest.approx(theirs.squad_f1_agg(items))


ASKED = {"context": "It was 308 or 309.", "question": "How many?"}


@pytest.mark.parametrize(
    "answers",
    [
        [{"text": "308", "answer_start": 7}, {"text": "309", "answer_start": 14}],
        {"text": ["308", "309"], "answer_start": [7, 14]},
        ["308", "309"],
    ],
)
def test_squad_files(tmp_path: Path, answers: Any) -> None:
    flat = lines(tmp_path / "flat.jsonl", [{**ASKED, "answers": answers}, {**ASKED, "answers": []}])
    nested = tmp_path / "nested.json"
    inner = [{"question": "How many?", "answers": answers}, {"question": "How many?", "answers": []}]
    nested.write_text(
        json.dumps({"data": [{"paragraphs": [{"context": ASKED["context"], "qas": inner}]}]}),
        encoding="utf-8",
    )
    for path in (flat, str(nested)):
        # the answer is the first line with text: "309 it is" has P 1/3, R 1, so F1 1/2
        env = Scripted(["\n309 it is\nmore", "none"], files={"squad": path})
        assert values(module.TASKS["squad"].function(env)) == {"exact_match": 0, "f1": 0.25}
        assert env.asked[0] == "How many?\nIt was 308 or 309.\nAnswer:"
        env = Scripted(["309."], files={"squad": path}, limit=1)
        assert values(module.TASKS["squad"].function(env)) == {"exact_match": 1, "f1": 1}


def test_squad_files_that_do_not_fit(tmp_path: Path) -> None:
    def run(path: str) -> None:
        module.TASKS["squad"].function(Scripted(["x"], files={"squad": path}))

    with pytest.raises(InputError, match="answers is missing"):
        run(lines(tmp_path / "a.jsonl", [ASKED]))
    with pytest.raises(InputError, match=r"answers of example 0 must be texts.*got \[3\]"):
        run(lines(tmp_path / "b.jsonl", [{**ASKED, "answers": [3]}]))
    with pytest.raises(InputError, match=r"not SQuAD's data\[\]\.paragraphs\[\]\.qas\[\]"):
        run(lines(tmp_path / "c.json", [ASKED]))
    with pytest.raises(InputError, match="has no examples"):
        run(lines(tmp_path / "d.json", [{"data": []}]))


def test_both_forms_of_the_real_file_are_the_same(shared_data: Path) -> None:
    asked = []
    for name in ("xquad_en.jsonl", "xquad.en.json"):
        env = Scripted([], files={"squad": str(shared_data / "squad" / name)})
        env.said = [""] * 1190
        assert values(module.TASKS["squad"].function(env)) == {"exact_match": 0, "f1": 0}
        asked.append(sorted(env.asked))
    assert asked[0] == asked[1] and len(asked[0]) == 1190


def test_matthews_by_hand() -> None:
    # 3 true positives, 2 true negatives, 1 false positive, 2 false negatives:
    # (3 * 2 - 1 * 2) / sqrt((3 + 1) (3 + 2) (2 + 1) (2 + 2))
    pairs = [(1, 1)] * 3 + [(0, 0)] * 2 + [(1, 0)] + [(0, 1)] * 2
    assert matthews(pairs) == pytest.approx(4 / math.sqrt(240))
    assert matthews([(1 - guess, truth) for guess, truth in pairs]) == pytest.approx(-4 / math.sqrt(240))
    # three classes: 3 of 4 right, guessed (2, 1, 1) times, true (2, 2, 0):
    # (3 * 4 - (2 * 2 + 1 * 2 + 0)) / sqrt((16 - 6) (16 - 8))
    assert matthews([(0, 0), (1, 1), (2, 1), (0, 0)]) == pytest.approx(6 / math.sqrt(80))
    assert matthews([(1, 1), (1, 0)]) == 0  # one guess only: not defined


@pytest.mark.filterwarnings("ignore:A single label")
@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_matthews_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    guesses, truths = zip(*pairs, strict=True)
    assert matthews(pairs) == pytest.approx(metrics.matthews_corrcoef(truths, guesses), abs=1e-12)


def test_matthews_of_answers() -> None:
    # "unacceptable." is a label but for case and full stop, "maybe" is none and so wrong
    examples = [Example("s", output=label) for label in ["acceptable", "unacceptable", "acceptable"]]
    outcome = correlation.TASKS["matthews"].function(
        Scripted(["Acceptable", "unacceptable.", "maybe"], examples)
    )
    assert outcome.more == {"no_label": 1}
    # guessed once each: acceptable, unacceptable, none; true (2, 1, 0): (2 * 3 - 3) / sqrt((9 - 3) (9 - 5))
    assert values(outcome) == {"matthews": pytest.approx(3 / math.sqrt(24))}
    summary = summarize([outcome], resamples=200, seed=0)  # samples of one class among them
    assert -1 <= summary["matthews_low"] <= summary["matthews_high"] <= 1
    assert summary["examples"] == 3


def test_pearson_and_spearman_by_hand() -> None:
    # deviations -1.5 -0.5 0.5 1.5 and -0.5 -1.5 1.5 0.5: 3 / sqrt(5 * 5)
    pairs = [(1.0, 2.0), (2.0, 1.0), (3.0, 4.0), (4.0, 3.0)]
    assert pearson(pairs) == pytest.approx(0.6)
    assert spearman(pairs) == pytest.approx(0.6)
    # ranks 1 2.5 2.5 4 and 1 3 2 4: 4.5 / sqrt(4.5 * 5)
    tied = [(1.0, 10.0), (2.0, 30.0), (2.0, 20.0), (9.0, 40.0)]
    assert spearman(tied) == pytest.approx(4.5 / math.sqrt(22.5))
    assert pearson([(None, 5.0), *pairs]) == pytest.approx(0.6)  # left out
    assert pearson([(1.0, 2.0), (1.0, 3.0)]) == spearman([(1.0, 2.0)]) == pearson([(None, 1.0)]) == 0
    assert pearson([(1e-300, 0.0), (3e-300, 1.0), (2e-300, 0.5)]) == pytest.approx(1.0)


NUMBERS = st.integers(-50, 50).map(lambda n: n / 8)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=20))
def test_correlations_are_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = zip(*pairs, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert pearson(pairs) == spearman(pairs) == 0
    else:
        assert pearson(pairs) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
        assert spearman(pairs) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


def test_pearson_of_answers() -> None:
    examples = [Example("s", output=score) for score in ["2.0", "1", "4.0", "3", "5"]]
    env = Scripted(["1", "about 2.0 of 5", "3.", "4 ", "none at all"], examples)
    outcome = correlation.TASKS["pearson"].function(env)
    assert values(outcome) == {"pearson": pytest.approx(0.6), "spearman": pytest.approx(0.6)}
    assert outcome.more == {"no_number": 1}
    assert math.isfinite(summarize([outcome], resamples=200, seed=0)["pearson_stderr"])
    with pytest.raises(InputError, match="held-out example 1 is 'good'"):
        correlation.TASKS["pearson"].function(
            Scripted(["1", "2"], [Example("s", output="1"), Example("s", output="good")])
        )


def test_a_classifier_has_correlations_of_its_labels() -> None:
    examples = [Example("s", output=label) for label in ["0", "1", "2", "1"]]
    env = Scripted(["0", "1", "2", "2"], examples, labels=("0", "1", "2", "3"))
    # 3 of 4 right, guessed (1, 1, 2), true (1, 2, 1): (12 - 5) / sqrt((16 - 6) (16 - 6))
    assert values(correlation.TASKS["matthews"].function(env)) == {"matthews": pytest.approx(0.7)}
    # deviations -1.25 -0.25 0.75 0.75 and -1 0 1 0: 2 / sqrt(2.75 * 2)
    assert values(correlation.TASKS["pearson"].function(env))["pearson"] == pytest.approx(2 / math.sqrt(5.5))
    assert all(task.classifier and task.examples for task in correlation.TASKS.values())


def test_rouge_of_fedkseed_by_hand() -> None:
    pytest.importorskip("rouge")
    # "The" and "the" differ: one word of two and two
    assert rouge_l_fedkseed("The cat", "the cat") == pytest.approx(0.5)
    assert rouge_l("The cat", "the cat") == 1
    # words count once: {x, y} of {x, y} and {x, y}
    assert rouge_l_fedkseed("x x y", "x y y") == pytest.approx(1)
    assert rouge_l("x x y", "x y y") == pytest.approx(2 / 3)
    # sentence by sentence: both are in the answer, in whatever order
    assert rouge_l_fedkseed("x y. z w", "z w. x y") == pytest.approx(1)
    assert rouge_l("x y. z w", "z w. x y") == pytest.approx(0.5)
    # "the cat mat" of 4 different words and 5: P 3/4, R 3/5
    assert rouge_l_fedkseed("the cat by mat", "the cat sat on mat") == pytest.approx(2 * 0.45 / 1.35)
    assert rouge_l_fedkseed("", "x") == rouge_l_fedkseed("...", "x") == rouge_l_fedkseed("x", "") == 0


def test_rouge_of_fedkseed_takes_long_sentences() -> None:
    pytest.importorskip("rouge")
    before = sys.getrecursionlimit()
    text = " ".join(f"w{i}" for i in range(700))
    assert rouge_l_fedkseed(text, f"x {text}") == pytest.approx(2 * 700 / 1401)
    assert sys.getrecursionlimit() == before


def test_rouge_of_fedkseed_is_a_task_named_after_its_scorer() -> None:
    rouge = pytest.importorskip("rouge")
    task = module.TASKS["rouge-l-fedkseed"]
    outcome = task.function(
        Scripted(["The cat", "x"], [Example("s", output="the cat"), Example("s", output="x")])
    )
    assert values(outcome) == {"rouge_l_fedkseed": pytest.approx(0.75)}
    assert re.fullmatch(r"rouge 1\.\d+\.\d+ rouge-l F1", task.scorer())
    assert rouge.Rouge().get_scores("The cat", "the cat")[0]["rouge-l"]["f"] == pytest.approx(0.5)


def test_without_the_package_rouge_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    module.rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(InputError, match=r"package rouge: install fedtune\[eval\]"):
        module.TASKS["rouge-l-fedkseed"].scorer()
