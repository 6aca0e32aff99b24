"""A server on this machine that plays the judge, well or badly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fedtune.evaluation.endpoint import Endpoint

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
