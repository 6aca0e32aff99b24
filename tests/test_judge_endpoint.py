"""Questions to a judge: retries, ends, redirects and keys, against a server that plays one."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from judge_server import ASK, KEY, VARIABLE, Asked, Judge, Playing, completion, endpoint, in_turn, status

from fedtune.errors import InputError
from fedtune.evaluation.endpoint import Unanswered, check_judge, key_of
from fedtune.evaluation.judge import (
    score_in,
)


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
