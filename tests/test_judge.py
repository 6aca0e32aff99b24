"""MT-bench against a server on this machine that plays the judge, well or badly."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from command import write_config
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.cli.main import app
from fedtune.errors import InputError
from fedtune.evaluation.bootstrap import summarize
from fedtune.evaluation.endpoint import Endpoint, Unanswered, check_judge, key_of
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
from fedtune.evaluation.subject import EvalSettings, JudgeSettings, Outcome, Subject

KEY = "sk-not-a-real-key-4711"
VARIABLE = "FEDTUNE_TEST_JUDGE_KEY"


class Asked:
    """One request as the judge got it."""

    def __init__(self, path: str, headers: dict[str, str], body: Any) -> None:
        self.path, self.headers, self.body = path, headers, body

    @property
    def said(self) -> str:
        return str(self.body["messages"][-1]["content"])


class Judge(ThreadingHTTPServer):
    """Answers as `play` says: a status and a body, or None for a connection that `play` has served itself."""

    daemon_threads = True
    Play = Callable[[Asked, "Judge", BaseHTTPRequestHandler], "tuple[int, dict[str, str], bytes] | None"]

    def __init__(self, play: Play) -> None:
        self.play, self.asked, self.over = play, list[Asked](), threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave early are what some tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Judge)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = Asked(self.path, dict(self.headers), body)
        server.asked.append(asked)
        played = server.play(asked, server, self)
        if played is not None:
            status, headers, data = played
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def completion(text: Any) -> tuple[int, dict[str, str], bytes]:
    body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def status(code: int, **headers: str) -> tuple[int, dict[str, str], bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return code, named, f"no, and your key was {KEY}".encode()


def in_turn(*replies: tuple[int, dict[str, str], bytes]) -> Judge.Play:
    """The replies one after the other, then the last one for ever."""
    return lambda asked, server, handler: replies[min(len(server.asked), len(replies)) - 1]


@pytest.fixture
def playing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Judge.Play], Judge]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running: list[Judge] = []

    def start(play: Judge.Play) -> Judge:
        server = Judge(play)
        running.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    yield start
    for server in running:
        server.over.set()
        server.shutdown()
        server.server_close()


Playing = Callable[[Judge.Play], Judge]
ASK = [{"role": "user", "content": "well?"}]


def endpoint(server: Judge, waits: list[float] | None = None, **changes: Any) -> Endpoint:
    plain: dict[str, Any] = {
        "url": server.url,
        "model": "strict-judge",
        "key": KEY,
        "timeout_s": 20.0,
        "retries": 2,
        "sleep": (waits if waits is not None else []).append,
    }
    return Endpoint(**plain | changes)


def ask(server: Judge, waits: list[float] | None = None, **changes: Any) -> float:
    return endpoint(server, waits, **changes).ask(ASK, score_in, max_tokens=2048)[1]


def test_a_question_is_a_chat_completion_at_temperature_0(playing: Playing) -> None:
    server = playing(in_turn(completion("Fine. Rating: [[8.5]]")))
    assert ask(server, url=server.url + "/") == 8.5
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["Authorization"] == f"Bearer {KEY}"
    assert asked.body == {"model": "strict-judge", "messages": ASK, "temperature": 0, "max_tokens": 2048}
    ask(server, key=None)
    assert "Authorization" not in server.asked[1].headers


@pytest.mark.parametrize("code", [408, 409, 425, 429, 500, 502, 503, 504])
def test_a_failure_that_may_pass_is_retried(playing: Playing, code: int) -> None:
    waits: list[float] = []
    server = playing(in_turn(status(code), status(code), completion("[[3]]")))
    assert ask(server, waits) == 3
    assert len(server.asked) == 3
    assert waits == [1, 2]


def test_retries_end_and_waits_are_bounded(playing: Playing) -> None:
    waits: list[float] = []
    server = playing(in_turn(status(503)))
    with pytest.raises(Unanswered, match=r"^8 attempts, the last: status 503$"):
        ask(server, waits, retries=7)
    assert len(server.asked) == 8
    assert waits == [1, 2, 4, 8, 16, 32, 60]
    waits.clear()
    server = playing(
        in_turn(
            status(429, Retry_After="7"),
            status(429, Retry_After="86400"),
            status(429, Retry_After="-3"),
            status(429, Retry_After="nan"),
            status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
            completion("[[5]]"),
        )
    )
    assert ask(server, waits, retries=5) == 5
    assert waits == [7, 60, 4, 8, 16]


NONSENSE = {
    "no JSON": (200, {}, b"<html>"),
    "no bytes": (200, {}, b""),
    "no choices": (200, {}, b'{"choices": []}'),
    "a list": (200, {}, b"[1]"),
    "deep": (200, {}, b"[" * 100_000),
    "not UTF-8": (200, {}, b"\xff\xfe\x00"),
    "no text": completion(None),
    "parts": completion([{"type": "text", "text": "[[5]]"}]),
    "no mark": completion("I would rather not say."),
    "off the scale": completion("Rating: [[11]]"),
    "zero": completion("Rating: [[0]]"),
    "words": completion("Rating: [[eight]]"),
    "empty": completion(""),
    "huge": (200, {}, b" " * ((4 << 20) + 1)),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_retried_and_never_becomes_a_score(playing: Playing, name: str) -> None:
    server = playing(in_turn(NONSENSE[name], completion("[[6]]")))
    assert ask(server) == 6
    server = playing(in_turn(NONSENSE[name]))
    with pytest.raises(Unanswered, match="3 attempts, the last: "):
        ask(server)
    assert len(server.asked) == 3


def hang(asked: Asked, server: Judge, handler: BaseHTTPRequestHandler) -> None:
    server.over.wait(60)


def drip(asked: Asked, server: Judge, handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, so that no single wait is long."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while not server.over.wait(0.02):
        handler.wfile.write(b"x")


def hang_up(asked: Asked, server: Judge, handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
    handler.close_connection = True


@pytest.mark.parametrize(
    ("play", "why"),
    [
        (hang, "no reply within 0.3 s"),
        (drip, "no reply within 0.3 s"),
        (hang_up, "1 bytes that are not a chat completion"),
    ],
)
def test_a_request_has_an_end(playing: Playing, play: Any, why: str) -> None:
    server = playing(play)
    with pytest.raises(Unanswered, match=f"2 attempts, the last: {why}"):
        ask(server, timeout_s=0.3, retries=1)
    assert len(server.asked) == 2


def test_a_slow_reply_in_time_counts(playing: Playing) -> None:
    def slow(asked: Asked, server: Judge, handler: BaseHTTPRequestHandler) -> Any:
        server.over.wait(0.2)
        return completion("[[4]]")

    assert ask(playing(slow)) == 4


def test_nobody_listens(playing: Playing) -> None:
    server = playing(in_turn(completion("[[4]]")))
    server.shutdown()
    server.server_close()
    with pytest.raises(Unanswered, match="ConnectionRefusedError"):
        ask(server)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_the_key_stays(playing: Playing, code: int) -> None:
    other = playing(in_turn(completion("[[10]]")))
    server = playing(in_turn(status(code, Location=f"{other.url}/chat/completions?k={KEY}")))
    with pytest.raises(InputError, match=f"answered {code}, a redirect to .*which is not followed") as caught:
        ask(server)
    assert other.asked == [] and len(server.asked) == 1
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(("code", "name"), [(401, VARIABLE), (403, "model"), (404, "url"), (405, "url")])
def test_a_wrong_setting_ends_it_at_once(playing: Playing, code: int, name: str) -> None:
    server = playing(in_turn(status(code)))
    name = "key_variable" if name == VARIABLE else name
    with pytest.raises(InputError, match=f"answered {code}: .*{name}") as caught:
        ask(server)
    assert len(server.asked) == 1
    assert KEY not in str(caught.value)


def test_a_question_that_is_refused_is_not_repeated(playing: Playing) -> None:
    server = playing(in_turn(status(400)))
    with pytest.raises(Unanswered, match=r"^the question was refused with status 400$"):
        ask(server)
    assert len(server.asked) == 1


def test_a_reply_with_the_key_is_told_without_it(playing: Playing) -> None:
    server = playing(in_turn(completion(f"You sent {KEY}. [[7]]")))
    reply, score = endpoint(server).ask(ASK, score_in, max_tokens=9)
    assert (reply, score) == ("You sent [key]. [[7]]", 7)
    server = playing(in_turn(completion(f"You sent {KEY}.")))
    with pytest.raises(Unanswered, match=r"You sent \[key\]"):
        ask(server)
    assert KEY not in repr(endpoint(server))


def test_halves_of_characters_cannot_break_a_file(playing: Playing) -> None:
    server = playing(in_turn((200, {}, rb'{"choices": [{"message": {"content": "\ud800 [[7]]"}}]}')))
    assert endpoint(server).ask(ASK, score_in, max_tokens=9) == ("? [[7]]", 7)


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


@pytest.mark.parametrize(
    "url",
    [
        "",
        "judge",
        "file:///etc/passwd",
        "ftp://h/v1",
        "http://",
        "http://h:x/v1",
        "http://h/v 1",
        "http://h:0/v1",
    ],
)
def test_an_address_must_be_one(url: str) -> None:
    with pytest.raises(InputError, match="url must be the base of an OpenAI-compatible endpoint"):
        check_judge(url, None)


def test_secrets_do_not_go_into_a_configuration() -> None:
    for url in (
        f"https://me:{KEY}@h/v1",
        f"https://{KEY}@h/v1",
        f"https://h/v1?key={KEY}",
        f"https://h/v1#{KEY}",
    ):
        with pytest.raises(
            InputError, match="url must not hold a user name, a password or a query"
        ) as caught:
            check_judge(url, None)
        assert KEY not in str(caught.value)
    with pytest.raises(InputError, match="never the key itself") as caught:
        check_judge("https://h/v1", KEY)
    assert KEY not in str(caught.value)
    check_judge("https://h:8000/v1", "JUDGE_KEY")
    check_judge("http://[::1]:8000/v1", None)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_of(None) is None
    monkeypatch.setenv(VARIABLE, f" {KEY}\n")
    assert key_of(VARIABLE) == KEY
    monkeypatch.setenv(VARIABLE, f"{KEY}\r\nX-Other: 1")
    with pytest.raises(InputError, match="holds blanks") as caught:
        key_of(VARIABLE)
    assert KEY not in str(caught.value)
    for setting in (lambda: monkeypatch.setenv(VARIABLE, " "), lambda: monkeypatch.delenv(VARIABLE)):
        setting()
        with pytest.raises(InputError, match=f"environment variable {VARIABLE} is not set"):
            key_of(VARIABLE)


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


class Scripted(Subject):
    """A model that answers each prompt with its call's and place's number."""

    def __init__(self, tokenizer: Any = None, **changes: Any) -> None:
        plain: dict[str, Any] = {"template": "plain", "loss_on": "response", "max_length": 64}
        super().__init__(nn.Identity(), tokenizer, (), EvalSettings(**plain | changes))
        self.calls: list[tuple[list[str], dict[str, Any]]] = []

    def generate(self, prompts: Sequence[str], **options: Any) -> list[list[str]]:  # type: ignore[override]
        self.calls.append((list(prompts), options))
        return [[f" said{{{len(self.calls)}.{place}}} "] for place in range(len(prompts))]


def test_the_second_turn_sees_the_first_answer(tmp_path: Path) -> None:
    subject = Scripted(files=files(tmp_path))
    answers = answer(subject, load_questions(subject))
    assert [options["temperature"] for _, options in subject.calls] == [0.0, 0.1, 0.7, 0.0, 0.7]
    assert [prompts for prompts, _ in subject.calls] == [
        ["1 + 1?\nAnswer:"],
        ["Who?\nAnswer:"],
        ["Write.\nAnswer:"],
        ["1 + 1?\nAnswer: said{1.0}\n\nTwice that?\nAnswer:"],
        ["Write.\nAnswer: said{3.0}\n\nRewrite.\nAnswer:"],
    ]
    assert answers == [["said{3.0}", "said{5.0}"], ["said{1.0}", "said{4.0}"], ["said{2.0}"]]
    assert {options["max_new_tokens"] for _, options in subject.calls} == {1024}
    assert len({options["seed"] for _, options in subject.calls}) == 5


class Chat:
    chat_template = "a template"
    bos_token = "<s>"

    def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        return "<s>" + "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def test_a_chat_template_goes_before_the_runs_own() -> None:
    subject = Scripted(Chat())
    # without the begin token, which generation puts in front of any prompt
    assert conversation(subject, ["Write."], []) == "<user>Write.<assistant>"
    assert (
        conversation(subject, ["Write.", "Rewrite."], ["So."])
        == "<user>Write.<assistant>So.<user>Rewrite.<assistant>"
    )


def scores_by_prompt(marks: dict[str, str]) -> Judge.Play:
    def play(asked: Asked, server: Judge, handler: BaseHTTPRequestHandler) -> Any:
        return completion(next(reply for start, reply in marks.items() if asked.said.startswith(start)))

    return play


def run(subject: Subject, server: Judge, **changes: Any) -> Outcome:
    plain: dict[str, Any] = {"timeout_s": 20.0, "retries": 1, "key_variable": None, "model": "strict-judge"}
    judging = JudgeSettings(url=server.url, **plain | changes)
    subject.settings = EvalSettings(**{**vars(subject.settings), "judge": judging})
    return TASKS["mt-bench"].function(subject)


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
    subject = Scripted(files=files(tmp_path))
    with pytest.raises(InputError, match=r"needs a judge: set evaluation\.judge\.url"):
        TASKS["mt-bench"].function(subject)
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(InputError, match=f"{VARIABLE} is not set"):
        run(subject, server, key_variable=VARIABLE)
    with pytest.raises(ValidationError, match="never the key itself") as refused:
        JudgeSettings(url=server.url, model="judge", key_variable=KEY)
    assert KEY not in str(refused.value)
    assert subject.calls == [] and server.asked == []


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
    subject = Scripted(files=files(tmp_path, **changed))
    with pytest.raises(InputError, match=match):
        load_prompts(subject, load_questions(subject))


@pytest.mark.parametrize(
    "template",
    ["{question}", "{question} {answer.x}", "{question} {answer:>9}", "{question} {answer!r}", "{", "{} {}"],
)
def test_a_judge_prompt_has_the_published_fields(tmp_path: Path, template: str) -> None:
    prompts = [{"name": "single-v1", "system_prompt": "", "prompt_template": template}]
    subject = Scripted(files=files(tmp_path, mt_bench=QUESTIONS[2:], mt_bench_prompts=prompts))
    with pytest.raises(InputError, match="prompt_template of single-v1"):
        load_prompts(subject, load_questions(subject))


def test_a_limit_counts_questions_only(tmp_path: Path) -> None:
    subject = Scripted(files=files(tmp_path), limit=2)
    questions = load_questions(subject)
    assert [question.id for question in questions] == [81, 111]
    assert len(load_prompts(subject, questions)) == 4


def real(folder: Path) -> dict[str, str]:
    names = {
        "mt-bench": "mt_bench_question.jsonl",
        "mt-bench-references": "mt_bench_reference_answer_gpt-4.jsonl",
        "mt-bench-prompts": "judge_prompts.jsonl",
    }
    return {name: str(folder / "mt_bench" / file) for name, file in names.items()}


def test_the_published_files_are_read_whole(playing: Playing, shared_data: Path) -> None:
    subject = Scripted(files=real(shared_data))
    server = playing(in_turn(completion("Rating: [[7]]")))
    found = run(subject, server)
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
        subject = Subject(model.eval(), AutoTokenizer.from_pretrained(folder), (), settings)
        found = run(subject, server)
    assert found.metrics["score"].value == 2
    assert subject.truncated == 0
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
