"""MT-bench against a server on this machine that plays the judge."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_formats import FORMATS
from command import write_config
from hypothesis import given
from hypothesis import strategies as st
from judge_server import KEY, VARIABLE, Asked, Judge, Playing, completion, endpoint, in_turn, status
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.cli.main import app
from fedtune.data.encode import encode_prompts
from fedtune.errors import InputError
from fedtune.evaluation.bootstrap import summarize
from fedtune.evaluation.judge import (
    TASKS,
    Mark,
    Question,
    answer,
    conversation,
    judge,
    load_prompts,
    load_questions,
    outcome,
    score_in,
)
from fedtune.evaluation.judge_settings import JudgeSettings
from fedtune.evaluation.types import EvalEnv, EvalSettings, Outcome


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Rating: [[7]]", 7),
        ("[[7.5]] or [[9]]", 7.5),
        ("Rating: [7]", 7),
        ("as in [3], Rating: [[7]]", 7),  # double brackets go first
        ("[[10]]", 10),
        ("[[10.5]]", None),
        ("[[0.5]]", None),
        ("[[-3]]", None),
        ("7/10", None),
        ("[[7 ]]", None),
    ],
)
def test_marks(reply: str, score: float | None) -> None:
    assert score_in(reply) == score


@given(st.text(alphabet="[]0123456789. a", max_size=20))
def test_a_mark_is_on_the_scale_or_none(reply: str) -> None:
    score = score_in(reply)
    assert score is None or 1 <= score <= 10


PROMPTS = [
    {"name": "single-v1", "prompt_template": "Q {question} A {answer}"},
    {"name": "single-math-v1", "prompt_template": "Q {question} R {ref_answer_1} A {answer}"},
    {
        "name": "single-v1-multi-turn",
        "prompt_template": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    },
    {
        "name": "single-math-v1-multi-turn",
        "prompt_template": "R {ref_answer_1} R {ref_answer_2} "
        "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    },
    {"name": "pair-v2", "prompt_template": "compare {answer_a} and {answer_b}"},
]

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "Twice that?"]},
    {"question_id": 141, "category": "humanities", "turns": ["Who?"]},
]

REFERENCES = [{"question_id": 111, "choices": [{"turns": ["2", "4"]}]}]


def lines(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def files(folder: Path, **changed: Sequence[Any]) -> dict[str, str]:
    prompts = [{"system_prompt": f"You judge ({row['name']}).", **row} for row in PROMPTS]
    rows: dict[str, Sequence[Any]] = {
        "mt-bench": QUESTIONS,
        "mt-bench-references": REFERENCES,
        "mt-bench-prompts": prompts,
    }
    rows |= {name.replace("_", "-"): value for name, value in changed.items()}
    return {name: lines(folder / f"{name}.jsonl", value) for name, value in rows.items()}


class Scripted(EvalEnv):
    """A model that answers each prompt with its call's and place's number."""

    def __init__(self, tokenizer: Any = None, **changes: Any) -> None:
        plain: dict[str, Any] = {"template": "plain", "loss_on": "response", "max_length": 64}
        super().__init__(nn.Identity(), tokenizer, (), EvalSettings(**plain | changes))
        self.calls: list[tuple[list[str], dict[str, Any]]] = []

    def generate(self, prompts: Sequence[str], **options: Any) -> list[list[str]]:  # type: ignore[override]
        self.calls.append((list(prompts), options))
        return [[f" said{{{len(self.calls)}.{place}}} "] for place in range(len(prompts))]


def test_the_second_turn_sees_the_first_answer(tmp_path: Path) -> None:
    env = Scripted(files=files(tmp_path))
    answers = answer(env, load_questions(env))
    assert [options["temperature"] for _, options in env.calls] == [0.0, 0.1, 0.7, 0.0, 0.7]
    assert [prompts for prompts, _ in env.calls] == [
        ["1 + 1?\nAnswer:"],
        ["Who?\nAnswer:"],
        ["Write.\nAnswer:"],
        ["1 + 1?\nAnswer: said{1.0}\n\nTwice that?\nAnswer:"],
        ["Write.\nAnswer: said{3.0}\n\nRewrite.\nAnswer:"],
    ]
    assert answers == [["said{3.0}", "said{5.0}"], ["said{1.0}", "said{4.0}"], ["said{2.0}"]]
    assert {options["max_new_tokens"] for _, options in env.calls} == {1024}
    assert len({options["seed"] for _, options in env.calls}) == 5


def test_the_second_turn_in_a_chat_template() -> None:
    made = FORMATS["Llama 2"].tokenizer()
    env = Scripted(made, template="chat")
    assert conversation(env, ["Write."], []) == "<s>[INST] Write. [/INST]"
    second = conversation(env, ["Write.", "Rewrite."], ["So."])
    assert second == "<s>[INST] Write. [/INST] So. </s><s>[INST] Rewrite. [/INST]"
    (ids,), _ = encode_prompts([second], made, max_length=None)
    assert [made.decode([i]) for i in ids if i in made.all_special_ids] == ["<s>", "</s>", "<s>"]
    # the run's template is used, whatever the tokenizer brings; as in training each answer has its end
    env = Scripted(made)
    assert conversation(env, ["Write.", "Rewrite."], ["So."]) == (
        "Write.\nAnswer: So.</s>\n\nRewrite.\nAnswer:"
    )


def scores_by_prompt(marks: dict[str, str]) -> Judge.Play:
    def play(asked: Asked, server: Judge, handler: BaseHTTPRequestHandler) -> Any:
        return completion(next(reply for start, reply in marks.items() if asked.said.startswith(start)))

    return play


def run(env: EvalEnv, server: Judge, **changes: Any) -> Outcome:
    plain: dict[str, Any] = {"timeout_s": 20.0, "retries": 1, "key_variable": None, "model": "strict-judge"}
    judging = JudgeSettings(url=server.url, **plain | changes)
    env.settings = EvalSettings(**{**vars(env.settings), "judge": judging})
    return TASKS["mt-bench"].function(env)


def test_mt_bench_by_hand(playing: Playing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    server = playing(
        scores_by_prompt(
            {
                "Q Write. A said{3.0} Q Rewrite.": "[[6]]",
                "Q Write.": "Good. [[8]]",
                "Q 1 + 1? R 2 A": f"[[10]] {KEY}",
                "R 2 R 4 Q 1 + 1? A said{1.0} Q Twice that? A said{4.0}": "[3]",
                "Q Who?": "[[4]]",
            }
        )
    )
    found = run(Scripted(files=files(tmp_path)), server, key_variable=VARIABLE)
    assert [one.body["messages"][0] for one in server.asked[:2]] == [
        {"role": "system", "content": "You judge (single-v1)."},
        {"role": "system", "content": "You judge (single-v1-multi-turn)."},
    ]
    assert {name: one.value for name, one in found.metrics.items()} == pytest.approx(
        {
            "score": (8 + 6 + 10 + 3 + 4) / 5,
            "score_turn_1": (8 + 10 + 4) / 3,
            "score_turn_2": (6 + 3) / 2,
            "score/writing": 7,
            "score/math": 6.5,
            "score/humanities": 4,
        }
    )
    assert next(iter(found.metrics)) == TASKS["mt-bench"].metric == "score"
    assert found.more == {"unjudged": 0} and found.notes == ("marked by strict-judge",)
    numbers = summarize([found], resamples=0, seed=0)
    # by question, turns weighted: deviations 2 (7 - 6.2), 2 (6.5 - 6.2), 1 (4 - 6.2), over 5; times 3 / 2
    assert numbers["score_stderr"] == pytest.approx(math.sqrt(1.5 * (1.6**2 + 0.6**2 + 2.2**2)) / 5)
    assert numbers["score_turn_2_stderr"] == pytest.approx(1.5)  # 6 and 3: sd / root of 2
    assert numbers["examples"] == 3
    assert found.details[1] == {
        "question_id": 111,
        "category": "math",
        "answers": ["said{1.0}", "said{4.0}"],
        "marks": [
            {"score": 10, "reply": "[[10]] [key]", "unjudged": ""},
            {"score": 3, "reply": "[3]", "unjudged": ""},
        ],
    }
    assert KEY not in json.dumps([list(found.details), found.notes, numbers])


def test_what_is_not_judged_is_counted_and_left_out(playing: Playing, tmp_path: Path) -> None:
    def play(asked: Asked, server: Judge, handler: BaseHTTPRequestHandler) -> Any:
        return (
            status(400)
            if "1 + 1?" in asked.said
            else completion("[[9]]" if "Q Write." in asked.said else "[[5]]")
        )

    found = run(Scripted(files=files(tmp_path)), playing(play))
    assert {name: one.value for name, one in found.metrics.items()} == pytest.approx(
        {
            "score": (9 + 9 + 5) / 3,
            "score_turn_1": 7,
            "score_turn_2": 9,
            "score/writing": 9,
            "score/humanities": 5,
        }
    )
    assert found.more == {"unjudged": 1}
    assert found.notes[1:] == (
        "1 of 3 questions have a turn without a mark, which is left out: 111 "
        "(the question was refused with status 400)",
    )
    numbers = summarize([found], resamples=200, seed=0)
    assert all(math.isfinite(value) for value in numbers.values())
    assert 5 <= numbers["score_low"] <= numbers["score_high"] <= 9


def test_a_judge_that_only_fails_is_given_up(playing: Playing) -> None:
    server = playing(in_turn(completion("no")))
    questions = [Question(i, "writing", ("a", "b")) for i in range(20)]
    prompts = {(False, 1): ("", "{question}{answer}"), (False, 2): ("", "{question_1}{answer_1}")}
    marks = judge(endpoint(server), questions, [["x", "y"]] * 20, prompts)
    assert len(server.asked) == 5 * 3
    assert marks[2][1].unjudged == "not asked: the judge failed 5 times in a row"
    found = outcome(questions, marks)
    assert found.metrics == {} and found.more == {"unjudged": 20}
    assert "20 of 20 questions" in found.notes[0]


def test_failures_that_are_not_in_a_row_do_not_end_it(playing: Playing) -> None:
    server = playing(lambda asked, server, handler: completion("no" if len(server.asked) % 2 else "[[5]]"))
    questions = [Question(i, "writing", ("a",)) for i in range(14)]
    marks = judge(endpoint(server, retries=0), questions, [["x"]] * 14, {(False, 1): ("", "{question}")})
    assert [one[0].score for one in marks] == [None, 5] * 7


@given(
    st.lists(
        st.lists(st.one_of(st.none(), st.integers(1, 10)), min_size=1, max_size=2), min_size=1, max_size=8
    )
)
def test_the_score_is_the_mean_of_all_marks(scores: list[list[int | None]]) -> None:
    questions = [Question(i, "writing", ("a",) * len(one)) for i, one in enumerate(scores)]
    marks = [[Mark(None, unjudged="x") if s is None else Mark(s) for s in one] for one in scores]
    found = outcome(questions, marks)
    given_ = [score for one in scores for score in one if score is not None]
    if not given_:
        assert found.metrics == {}
    else:
        assert found.metrics["score"].value == pytest.approx(sum(given_) / len(given_))
        assert found.metrics["score/writing"].value == found.metrics["score"].value
    assert found.more["unjudged"] == sum(None in one for one in scores)


def test_nothing_is_asked_before_the_settings_hold(
    playing: Playing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = playing(in_turn(completion("[[5]]")))
    env = Scripted(files=files(tmp_path))
    with pytest.raises(InputError, match=r"needs a judge: set evaluation\.judge\.url"):
        TASKS["mt-bench"].function(env)
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(InputError, match=f"{VARIABLE} is not set"):
        run(env, server, key_variable=VARIABLE)
    with pytest.raises(ValidationError, match="never the key itself") as refused:
        JudgeSettings(url=server.url, model="judge", key_variable=KEY)
    assert KEY not in str(refused.value)
    assert env.calls == [] and server.asked == []


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"mt_bench": QUESTIONS[:1] * 2}, "question_id 81 is there more than once"),
        ({"mt_bench": [{"question_id": 1, "category": "x", "turns": []}]}, "turns must be one or two texts"),
        ({"mt_bench": [{"question_id": 1, "category": "x", "turns": [3]}]}, "turns must be one or two texts"),
        ({"mt_bench": [{"question_id": 1, "turns": ["a"]}]}, "category is missing"),
        ({"mt_bench_references": [{"question_id": 7, "choices": []}]}, r"choices\[0\]\.turns must be a list"),
        (
            {"mt_bench_references": [{"question_id": 111, "choices": [{"turns": ["2"]}]}]},
            r"question 111 \(math\) needs a reference answer to each of its 2 turns, got 1",
        ),
        (
            {"mt_bench_prompts": [{"name": "other", "system_prompt": "", "prompt_template": ""}]},
            "no prompt single-v1",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, changed: dict[str, Any], match: str) -> None:
    env = Scripted(files=files(tmp_path, **changed))
    with pytest.raises(InputError, match=match):
        load_prompts(env, load_questions(env))


@pytest.mark.parametrize(
    "template",
    ["{question}", "{question} {answer.x}", "{question} {answer:>9}", "{question} {answer!r}", "{", "{} {}"],
)
def test_a_judge_prompt_has_the_published_fields(tmp_path: Path, template: str) -> None:
    prompts = [{"name": "single-v1", "system_prompt": "", "prompt_template": template}]
    env = Scripted(files=files(tmp_path, mt_bench=QUESTIONS[2:], mt_bench_prompts=prompts))
    with pytest.raises(InputError, match="prompt_template of single-v1"):
        load_prompts(env, load_questions(env))


def test_a_limit_counts_questions_only(tmp_path: Path) -> None:
    env = Scripted(files=files(tmp_path), limit=2)
    questions = load_questions(env)
    assert [question.id for question in questions] == [81, 111]
    assert len(load_prompts(env, questions)) == 4


def real(folder: Path) -> dict[str, str]:
    names = {
        "mt-bench": "mt_bench_question.jsonl",
        "mt-bench-references": "mt_bench_reference_answer_gpt-4.jsonl",
        "mt-bench-prompts": "judge_prompts.jsonl",
    }
    return {name: str(folder / "mt_bench" / file) for name, file in names.items()}


def test_the_published_files_are_read_whole(playing: Playing, shared_data: Path) -> None:
    env = Scripted(files=real(shared_data))
    server = playing(in_turn(completion("Rating: [[7]]")))
    found = run(env, server)
    assert found.metrics["score"].value == 7 and found.more == {"unjudged": 0}
    assert len(server.asked) == 160
    assert sum("Reference" in one.said for one in server.asked) == 60  # 10 each of math, reasoning, coding
    categories = [name for name in found.metrics if name.startswith("score/")]
    assert len(categories) == 8
    assert all(len(found.metrics[name].items) == 10 for name in categories)
    assert server.asked[0].body["messages"][0]["content"] == "You are a helpful assistant."
    first = json.loads(Path(real(shared_data)["mt-bench"]).read_text(encoding="utf-8").splitlines()[0])
    assert first["turns"][0] in server.asked[0].said and first["turns"][1] not in server.asked[0].said
    assert first["turns"][1] in server.asked[1].said and "said{" in server.asked[1].said


def test_a_real_model_is_judged(playing: Playing, shared_data: Path, shared_models: Path) -> None:
    folder = shared_models / "instruct-7m"
    if not folder.is_dir():
        pytest.skip("instruct-7m is not on this machine")
    model = AutoModelForCausalLM.from_pretrained(folder)
    settings = EvalSettings(
        template="alpaca",
        loss_on="response",
        max_length=512,
        max_new_tokens=8,
        limit=2,
        files=real(shared_data),
    )
    server = playing(
        in_turn(completion("[[2]]"), completion("[[3]]"), completion("[[2]]"), completion("[[1]]"))
    )
    with torch.no_grad():
        env = EvalEnv(model.eval(), AutoTokenizer.from_pretrained(folder), (), settings)
        found = run(env, server)
    assert found.metrics["score"].value == 2
    assert env.truncated == 0
    start, end = "[The Start of Assistant's Answer]\n", "\n[The End of Assistant's Answer]"
    said = server.asked[0].said.partition(start)[2].removesuffix(end)
    assert said and f"### Assistant A:\n{said}\n" in server.asked[1].said


def test_a_run_keeps_what_the_judge_said_and_never_the_key(
    playing: Playing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    replies = [completion(f"Fair, {KEY}. [[{mark}]]") for mark in (4, 6)]
    server = playing(in_turn(*replies, completion("none")))
    questions = [{"question_id": n, "category": "writing", "turns": ["Name a word."]} for n in (1, 2, 3)]
    config = {
        "method": {"name": "zero-shot"},
        "evaluation": {
            "tasks": ["mt-bench"],
            "max_new_tokens": 4,
            "files": files(tmp_path, mt_bench=questions),
            "judge": {"url": server.url, "model": "judge", "key_variable": VARIABLE, "retries": 0},
        },
    }
    path = write_config(tmp_path / "run.yaml", config)
    app(["run", str(path), "--out", str(tmp_path / "run"), "--quiet"], standalone_mode=False)
    said = [json.loads(line) for line in (tmp_path / "run/answers.jsonl").open(encoding="utf-8")]
    assert [(one["round"], one["result"], one["task"], one["question_id"]) for one in said] == [
        (0, "global", "mt-bench", number) for number in (1, 2, 3)
    ]
    assert [one["marks"][0]["score"] for one in said] == [4, 6, None]
    assert said[0]["marks"][0]["reply"] == "Fair, [key]. [[4]]" and isinstance(said[0]["answers"][0], str)
    first = json.loads((tmp_path / "run/rounds.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["eval"]["mt-bench"]["score"] == 5 and first["eval"]["mt-bench"]["unjudged"] == 1
    assert first["eval_notes"]["mt-bench"][0] == "marked by judge"
    kept = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(kept) > 5 and not any(KEY.encode() in path.read_bytes() for path in kept)
