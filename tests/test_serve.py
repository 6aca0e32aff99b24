"""The OpenAI-compatible routes, asked by good callers, hostile ones, and many at once."""

from __future__ import annotations

import http.client
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served_run import CHAT, KEY, RIGHT, chat, run_to_serve

import fedtune
from fedtune.deploy import http_json
from fedtune.deploy.http_json import BODY_BYTES, CONNECTIONS, JsonServer
from fedtune.deploy.openai_api import Model, Routes
from fedtune.federation.completing import complete, completer

QUESTIONS = ["Add 2 and 3.", "Reverse: a b c", "Count: x x x", "What comes next: 1 2 3"]
TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> fedtune.Run:
    return run_to_serve(tmp_path_factory.mktemp("serve"))


def started(lora: fedtune.Run, key: str | None) -> JsonServer:
    model = Model("mine", completer(lora.config, fedtune_loaded(lora)), max_tokens=40, default_tokens=8)
    server = Routes(model).server("127.0.0.1", 0, key=key, quiet=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def fedtune_loaded(lora: fedtune.Run) -> Any:
    from fedtune.federation.results import one_result

    return one_result(lora.folder, lora.config, "global", None)


@pytest.fixture(scope="module")
def server(lora: fedtune.Run) -> Iterator[JsonServer]:
    server = started(lora, None)
    yield server
    server.shutdown()
    server.server_close()


def ask(server: JsonServer, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """The status and the JSON of one request; GET without a body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        named = {"Content-Type": "application/json"} | named
    connection.request("GET" if body is None else "POST", path, sent, named)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text)


def events(server: JsonServer, path: str, body: Any) -> list[Any]:
    """What a stream says, up to its [DONE]."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/event-stream"
    parts = answer.read().decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_a_conversation_has_the_answer_of_generate(server: JsonServer, lora: fedtune.Run) -> None:
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        (said,) = lora.generate([{"messages": turns}], max_new_tokens=8)
        status, found = ask(server, CHAT, chat(question))
        assert (status, found["choices"][0]["message"]) == (200, {"role": "assistant", "content": said})
        assert found["object"] == "chat.completion" and found["model"] == "mine"
        usage = found["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        drawn = {"temperature": 0.9, "top_p": 0.95, "seed": 5}
        (said,) = lora.generate([{"messages": turns}], max_new_tokens=8, **drawn)  # type: ignore[arg-type]
        assert ask(server, CHAT, chat(question, **drawn))[1]["choices"][0]["message"]["content"] == said


def test_draws_without_a_seed_differ(server: JsonServer) -> None:
    body = {"model": "mine", "prompt": "Add", "temperature": 2, "max_tokens": 12}
    assert len({ask(server, TEXT, body)[1]["choices"][0]["text"] for _ in range(6)}) > 1


def test_a_text_is_continued_without_a_template(server: JsonServer, lora: fedtune.Run) -> None:
    said = [complete(lora.config, fedtune_loaded(lora), prompt, max_new_tokens=5) for prompt in QUESTIONS[:2]]
    status, found = ask(server, TEXT, {"model": "mine", "prompt": QUESTIONS[:2], "max_tokens": 5})
    assert status == 200 and found["object"] == "text_completion"
    assert [(one["index"], one["text"]) for one in found["choices"]] == [
        (place, one.text) for place, one in enumerate(said)
    ]
    assert [one["finish_reason"] for one in found["choices"]] == [
        "stop" if one.ended else "length" for one in said
    ]
    assert found["usage"]["completion_tokens"] == sum(one.completion_tokens for one in said)


def test_special_tokens_in_a_prompt_are_text(server: JsonServer, lora: fedtune.Run) -> None:
    end = lora.tokenizer().eos_token
    plain = ask(server, TEXT, {"model": "mine", "prompt": "Add 2", "max_tokens": 2})[1]["usage"]
    marked = ask(server, TEXT, {"model": "mine", "prompt": f"Add 2{end}", "max_tokens": 2})[1]["usage"]
    assert marked["prompt_tokens"] > plain["prompt_tokens"] + 1  # spelled out, and not one control token


@pytest.mark.parametrize("draws", [{}, {"temperature": 1.5, "seed": 3}])
def test_a_stream_says_the_same(server: JsonServer, draws: dict[str, Any]) -> None:
    for question in QUESTIONS[:2]:
        body = chat(question, max_tokens=20, **draws)
        whole = ask(server, CHAT, body)[1]
        *pieces, last = events(
            server, CHAT, body | {"stream": True, "stream_options": {"include_usage": True}}
        )
        assert last["choices"] == [] and last["usage"] == whole["usage"]
        deltas = [one["choices"][0]["delta"] for one in pieces]
        assert deltas[0] == {"role": "assistant", "content": ""}
        said = "".join(delta.get("content", "") for delta in deltas)
        assert said == whole["choices"][0]["message"]["content"]
        reasons = [one["choices"][0]["finish_reason"] for one in pieces]
        assert reasons[-1] == whole["choices"][0]["finish_reason"] and set(reasons[:-1]) == {None}
        assert pieces[0]["object"] == "chat.completion.chunk"
    text = {"model": "mine", "prompt": "Add 2 and", "max_tokens": 12, **draws}
    joined = "".join(one["choices"][0]["text"] for one in events(server, TEXT, text | {"stream": True}))
    assert joined == ask(server, TEXT, text)[1]["choices"][0]["text"]


def test_pieces_joined_are_the_answer_whatever_stops_it(lora: fedtune.Run) -> None:
    """Over random draws, with texts out of the answer to stop at, which fall into the middle of tokens."""
    loaded, chance = fedtune_loaded(lora), random.Random(0)
    stopped = 0
    for case in range(25):
        prompt: Any = (
            {"messages": [{"role": "user", "content": QUESTIONS[case % 4]}]} if case % 2 else "Write: ü é "
        )
        how: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.8, "seed": case}
        free = complete(lora.config, loaded, prompt, **how)
        start = chance.randrange(max(1, len(free.text)))
        stop = [free.text[start : start + chance.randint(1, 4)]] if free.text else []
        stop = [one for one in stop if one] + ["never said"]
        pieces: list[str] = []
        found = complete(lora.config, loaded, prompt, **how, stop=stop, told=pieces.append)
        assert "".join(pieces) == found.text
        assert all(one not in found.text for one in stop)
        cut = min((place for one in stop if (place := free.text.find(one)) >= 0), default=None)
        if cut is not None and not isinstance(prompt, str):
            assert found.text == free.text[:cut].strip() and found.ended
            stopped += 1
        elif cut is not None:
            assert found.text == free.text[:cut] and found.ended
            stopped += 1
        else:
            assert found == free
    assert stopped > 10


def test_many_at_once_get_what_each_alone_gets(server: JsonServer) -> None:
    bodies = [chat(question, max_tokens=10, temperature=1, seed=s) for question in QUESTIONS for s in (1, 2)]
    alone = [ask(server, CHAT, body)[1]["choices"] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: ask(server, CHAT, body)[1]["choices"], bodies))
    assert together == alone


def test_what_is_there(server: JsonServer) -> None:
    assert ask(server, "/health") == (200, {"status": "ok"})
    status, listed = ask(server, "/v1/models")
    assert (status, [one["id"] for one in listed["data"]]) == (200, ["mine"])
    assert ask(server, "/v1/models/mine") == (200, listed["data"][0])
    assert ask(server, "/v1/models/other")[0] == 404
    assert ask(server, CHAT)[0] == 405 and ask(server, "/health", {})[0] == 405
    assert ask(server, "/etc/passwd")[0] == 404


DEEP = b'{"model": "mine", "messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        (b"", 400, "no JSON"),
        (b"{", 400, "no JSON"),
        (b"\xff\xfe{}", 400, "no JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b'{"model": NaN}', 400, "NaN is no number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "no JSON"),
        (DEEP, 400, "nested too deeply"),
        (RIGHT | {"model": "../mine"}, 404, "model must be 'mine'"),
        ({"messages": RIGHT["messages"]}, 404, "model must be 'mine', got None"),
        (RIGHT | {"messages": []}, 400, "messages must be a list"),
        (RIGHT | {"messages": "hello"}, 400, "messages must be a list"),
        (RIGHT | {"messages": [{"content": "x"}]}, 400, "messages must be a list"),
        (RIGHT | {"messages": [{"role": "user", "content": 3}]}, 400, "must be text"),
        (RIGHT | {"messages": [{"role": "king", "content": "x"}]}, 400, "last of messages"),
        (chat("\ud800"), 400, "turn 1"),
        (RIGHT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
        (RIGHT | {"max_tokens": 0}, 400, "from 1 to 40"),
        (RIGHT | {"max_tokens": 41}, 400, "from 1 to 40"),
        (RIGHT | {"max_completion_tokens": True}, 400, "from 1 to 40"),
        (RIGHT | {"max_tokens": 10**400}, 400, "from 1 to 40"),
        (RIGHT | {"temperature": "hot"}, 400, "temperature must be a number"),
        (RIGHT | {"temperature": 10**400}, 400, "temperature must be a number"),
        (
            b'{"model": "mine", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
            400,
            "temp",
        ),
        (RIGHT | {"top_p": 0}, 400, "top_p must be a number above 0"),
        (RIGHT | {"seed": -1}, 400, "seed must be"),
        (RIGHT | {"seed": 1.5}, 400, "seed must be"),
        (RIGHT | {"n": 2}, 400, "n must be 1"),
        (RIGHT | {"stop": [""]}, 400, "stop must be"),
        (RIGHT | {"stop": ["x"] * 5}, 400, "stop must be"),
        (RIGHT | {"stream": "yes"}, 400, "stream must be"),
        (RIGHT | {"stream_options": []}, 400, "stream_options has"),
        (RIGHT | {"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        (RIGHT | {"temprature": 1}, 400, 'Did you mean "temperature"'),
        (chat("a " * 4000), 400, "too long"),
        (chat("a " * 4000, stream=True), 400, "too long"),
        (b" " * (BODY_BYTES + 1), 413, "at most 1,048,576 bytes"),
    ],
)
def test_a_wrong_request_is_a_sentence(server: JsonServer, body: Any, status: int, part: str) -> None:
    got, found = ask(server, CHAT, body)
    assert (got, found["error"]["type"]) == (status, "invalid_request_error")
    assert part in found["error"]["message"] and "Traceback" not in found["error"]["message"]
    assert len(json.dumps(found)) < 1500  # what was sent is not sent back
    assert ask(server, "/health")[0] == 200


def test_fields_that_ask_for_nothing_are_let_pass(server: JsonServer) -> None:
    body = RIGHT | {"frequency_penalty": 0, "tools": [], "user": "me", "stop": None, "logprobs": False}
    assert ask(server, CHAT, body)[1]["choices"] == ask(server, CHAT, RIGHT)[1]["choices"]


def raw(server: JsonServer, sent: bytes, *, ends: bool = True) -> bytes:
    """What comes back for bytes, after which nothing more is sent, until the server closes."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(sent)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


LINE = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # somebody speaks TLS
        (b"GET\r\n\r\n", 400),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(200)) + b"\r\n", 431),
        (b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: [::\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc", 400),
        (b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (LINE + b"\r\n", 411),
        (LINE + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
        (LINE + b"Content-Length: -1\r\n\r\n", 400),
        (LINE + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (LINE + b"Content-Length: 99999999999999999999\r\n\r\n", 413),
        (LINE.replace(b"application/json", b"text/plain") + b"Content-Length: 2\r\n\r\n{}", 415),
    ],
)
def test_a_hostile_request_is_refused(server: JsonServer, sent: bytes, status: int) -> None:
    answer = raw(server, sent)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == str(status).encode(), answer
    assert json.loads(body)["error"]["type"] in ("invalid_request_error", "server_error")
    assert ask(server, "/health")[0] == 200


def test_a_body_that_never_comes_whole_gets_no_answer(server: JsonServer) -> None:
    assert raw(server, LINE + b"Content-Length: 500\r\n\r\n{") == b""
    assert ask(server, "/health")[0] == 200


def test_who_asks_first_may_be_told_to_send(server: JsonServer) -> None:
    body = json.dumps({"model": "mine", "prompt": "Add", "max_tokens": 1}).encode()
    head = LINE + b"Expect: 100-continue\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    assert raw(server, head + body, ends=False).startswith(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n"
    )


def test_more_connections_than_there_is_room_for_are_turned_away(server: JsonServer) -> None:
    held = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(CONNECTIONS)]
    try:
        for connection in held:  # each has its thread once it is answered
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(9) == b"HTTP/1.1 "
        assert b"503" in raw(server, b"")
    finally:
        for connection in held:
            connection.close()


def test_who_hangs_up_is_not_answered_on(lora: fedtune.Run) -> None:
    """A request whose caller is gone ends at its next token, and the next one has its turn."""
    tokens = list[int]()
    hung_up = threading.Event()

    def slow(prompt: Any, *, told: Any, **how: Any) -> Any:
        for token in range(100_000):
            tokens.append(token)
            told("")
            if token == 3:
                begun.set()
                assert hung_up.wait(60)
        raise AssertionError("nobody ended it")

    begun = threading.Event()
    server = Routes(Model("mine", slow, 100_000, 8)).server("127.0.0.1", 0, key=None, quiet=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    body = json.dumps({"model": "mine", "prompt": "x"}).encode()
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(LINE + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert begun.wait(60)
    hung_up.set()
    server.shutdown()
    server.end()
    assert len(tokens) < 100_000


def test_the_end_waits_until_who_was_answered_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The line of a request comes after its answer: who then ends the server finds both."""
    being_logged, end_began = threading.Event(), threading.Event()

    class Slow(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            being_logged.set()
            assert end_began.wait(60)
            time.sleep(0.2)  # the end is waiting by now; were it not, it would be over
            return True

    server = Routes(Model("mine", lambda *_, **__: None, 9, 8)).server("127.0.0.1", 0, key=None, quiet=False)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    slow = Slow()
    http_json.log.addFilter(slow)
    try:
        assert ask(server, "/health")[0] == 200 and being_logged.wait(60)
        server.shutdown()
        end_began.set()
        server.end()
        assert [record.getMessage()[:15] for record in caplog.records] == ["GET /health 200"]
    finally:
        http_json.log.removeFilter(slow)


def test_a_fault_of_the_model_is_500_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def broken(prompt: Any, **how: Any) -> Any:
        raise MemoryError("secret words of a prompt")

    server = Routes(Model("mine", broken, 9, 8)).server("127.0.0.1", 0, key=None, quiet=False)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    status, found = ask(server, TEXT, {"model": "mine", "prompt": "a private question"})
    assert (status, found["error"]["type"]) == (500, "server_error")
    assert "secret" not in json.dumps(found)
    assert ask(server, "/health")[0] == 200
    server.shutdown()
    server.server_close()
    said = " ".join(record.getMessage() for record in caplog.records if record.levelname != "DEBUG")
    assert "/v1/completions failed: MemoryError" in said and "private" not in said and "secret" not in said


def test_a_key_is_asked_of_all_but_health(lora: fedtune.Run) -> None:
    server = started(lora, KEY)
    assert ask(server, "/health", Host="proxy.example")[0] == 200
    assert ask(server, "/v1/models")[0] == 401
    for wrong in ("", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer \xe4"):
        assert ask(server, CHAT, RIGHT, Authorization=wrong)[0] == 401
    assert ask(server, CHAT, RIGHT, Authorization=f"Bearer {KEY}", Host="proxy.example")[0] == 200
    server.shutdown()
    server.server_close()
