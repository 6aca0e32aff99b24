"""A small HTTP server of JSON: bounds on what comes in, one bearer key, errors as JSON, streams as events.

It is for a few callers on one machine or behind a proxy that speaks TLS, and trusts none of them: requests
have to be whole, small and JSON, connections are few and cannot be held open without saying anything, and
what goes wrong is a status and a sentence, never a traceback. Nothing of a request is logged but its route,
its status and how long it took.
"""

from __future__ import annotations

import hmac
import json
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn
from urllib.parse import SplitResult, unquote, urlsplit

from fedtune.errors import FedtuneError, InputError, system_error
from fedtune.version import __version__

log = logging.getLogger("fedtune")

BODY_BYTES = 1_048_576
CONNECTIONS = 64
PASSED_OVER = 128  # reads of a body that is too long
SILENT_S = 30.0  # that a caller may take to say something
ENDING_S = 10.0  # that a request under way may take to notice that the server ends
HERE = ("127.0.0.1", "localhost", "::1")  # names of this machine alone


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: Of HTTP.
        said: What is wrong, what is allowed.
        field: Of the request, which it is about.
    """

    def __init__(self, status: int, said: str, field: str | None = None) -> None:
        super().__init__(said)
        self.status, self.field = status, field

    def document(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": None}}


class Gone(Exception):
    """Nobody waits for the answer any more."""


class Exchange:
    """What a route may ask of its caller, and send to it piece by piece."""

    def __init__(self, handler: _Handler) -> None:
        self._handler = handler
        self.streaming = False

    def check(self) -> None:
        """Raises Gone if the caller has hung up, or the server ends."""
        if self._handler.owner.stopping.is_set() or _hung_up(self._handler.connection):
            raise Gone

    def event(self, data: Mapping[str, Any] | str) -> None:
        """Sends one server-sent event; the first one says that it is a stream."""
        if not self.streaming:
            self._handler.begin(200, "text/event-stream", None)
            self.streaming = True
        text = data if isinstance(data, str) else json.dumps(data)
        self._handler.wfile.write(f"data: {text}\n\n".encode())
        self._handler.wfile.flush()


Get = Callable[[], Mapping[str, Any]]
Post = Callable[[Mapping[str, Any], Exchange], Mapping[str, Any] | None]


class JsonServer(ThreadingHTTPServer):
    """Listens, and hands what is whole and allowed to its routes.

    Args:
        host: The address to bind.
        port: Its port; 0: any that is free.
        gets: Routes by path that are asked with GET.
        posts: Those that are sent a JSON object; None as an answer: it went out as events.
        key: What a caller has to say; None: nothing, which is for an address of this machine alone.
        open_paths: Which need no key.
        quiet: No line a request.

    Raises:
        InputError: An address that others can reach without a key, or one that cannot be bound.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self,
        host: str,
        port: int,
        gets: Mapping[str, Get],
        posts: Mapping[str, Post],
        *,
        key: str | None,
        open_paths: tuple[str, ...] = (),
        quiet: bool = False,
    ) -> None:
        if key is None and host not in HERE:
            raise InputError(
                f"{host} can be reached from other machines, and there is no key; give one (--key-file), or "
                f"stay on {HERE[0]}"
            )
        self.gets, self.posts, self.key = gets, posts, key
        self.open_paths, self.quiet, self.local = open_paths, quiet, host in HERE
        self.stopping = threading.Event()
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        self._under_way, self._changed = 0, threading.Condition()
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            why = system_error(error) if isinstance(error, OSError) else f"{error}."
            raise InputError(
                f"cannot listen on {host}, port {port}: {why} Give another --host or --port."
            ) from None

    @property
    def url(self) -> str:
        """Where it is reached."""
        host, port = self.server_address[:2]
        name = str(host)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}"

    def server_bind(self) -> None:
        """Binds, without asking a name server for this machine's name as the library does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for a connection, as long as there are not too many."""
        if not self._room.acquire(blocking=False):
            body = json.dumps(Refused(503, f"{CONNECTIONS} connections are open; come back later").document())
            head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
            request.settimeout(1.0)
            with suppress(OSError):
                request.sendall(
                    f"{head}Content-Type: application/json\r\nRetry-After: 1\r\n\r\n{body}".encode()
                )
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # there is no thread, which would have given it back
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection, from its first request to its last."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    @contextmanager
    def request_under_way(self) -> Iterator[None]:
        """Around one request, until it is answered and logged."""
        with self._changed:
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Takes no more callers, and waits for the requests under way, for ten seconds at most."""
        self.stopping.set()
        self.server_close()
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way, ENDING_S)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is its caller's affair."""
        log.debug("a connection ended", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: JsonServer
    protocol_version = "HTTP/1.1"
    timeout = SILENT_S
    server_version, sys_version = f"fedtune/{__version__}", ""

    @property
    def owner(self) -> JsonServer:
        """The server."""
        return self.server

    def do_GET(self) -> None:
        """A route without a body."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """A route that is sent a JSON object."""
        self._answer(self._post)

    def _other(self) -> None:
        self._answer(self._refuse_method)

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _other

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses by itself, as JSON: a first line or headers that are none."""
        self.close_connection, self.request_version = True, self.protocol_version
        self._send(code, Refused(code, HTTPStatus(code).phrase).document())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: each request is logged once it is answered."""

    def begin(self, status: int, kind: str, length: int | None) -> None:
        """Sends status and headers; without a length the connection ends with the answer."""
        self._status = status
        self.send_response_only(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if status == 405:
            self.send_header("Allow", "GET, POST")
        if length is None:
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _answer(self, route: Callable[[str, Exchange], Mapping[str, Any] | None]) -> None:
        with self.owner.request_under_way():
            self._answer_and_log(route)

    def _answer_and_log(self, route: Callable[[str, Exchange], Mapping[str, Any] | None]) -> None:
        """Answers one request, whatever comes of it."""
        began, self._status, exchange = time.perf_counter(), 0, Exchange(self)
        path = "(no path)"
        try:
            path = unquote(_split(self.path).path)
            self._allowed(path)
            document = route(path, exchange)
            if document is not None:
                self._send(200, document)
        except Refused as error:
            self._failed(error, exchange)
        except InputError as error:
            self._failed(Refused(400, str(error)), exchange)
        except (Gone, TimeoutError, ConnectionError):
            self.close_connection = True
        except Exception as error:  # a fault of the program or the machine: the server goes on
            said = str(error) if isinstance(error, FedtuneError) else type(error).__name__
            log.error("%s failed: %s", path, said)
            log.debug("its traceback", exc_info=True)
            self._failed(Refused(500, "the request failed; the server's log says why"), exchange)
        if not self.owner.quiet:
            known = path if path in {*self.owner.gets, *self.owner.posts} else "(no route)"
            log.warning(
                "%s %s %s %.2f s", self.command, known, self._status or "gone", time.perf_counter() - began
            )

    def _failed(self, error: Refused, exchange: Exchange) -> None:
        self.close_connection = True  # what is left of its body is not read
        with suppress(OSError):
            if exchange.streaming:
                exchange.event(error.document())
            else:
                self._send(error.status, error.document())
                if error.status == 413:
                    self._pass_over()

    def _pass_over(self) -> None:
        """Reads some of a body that is too long: who is still sending sees no answer, but a broken line."""
        self.wfile.flush()
        self.connection.settimeout(1.0)
        for _ in range(PASSED_OVER):
            if not self.rfile.read1(65_536):
                return

    def _send(self, status: int, document: Mapping[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.begin(status, "application/json", len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _allowed(self, path: str) -> None:
        """Raises Refused for a caller that may not ask.

        Without a key a page in a browser of this machine must not ask either: it can send JSON to no other
        name than its own, and its own name, led here, is none of this machine's.
        """
        if self.owner.key is None:
            if _split(f"//{self.headers.get('Host', '')}").hostname not in HERE:
                raise Refused(403, f"without a key requests are for {', '.join(HERE)}, got another Host")
        elif path not in self.owner.open_paths:
            scheme, _, said = self.headers.get("Authorization", "").partition(" ")
            right = hmac.compare_digest(said.strip().encode(), self.owner.key.encode())
            if scheme.lower() != "bearer" or not right:
                raise Refused(401, "a key is needed, as in Authorization: Bearer KEY")

    def _get(self, path: str, exchange: Exchange) -> Mapping[str, Any]:
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            raise Refused(400, "a GET has no body")
        if path in self.owner.posts:
            raise Refused(405, f"{path} is asked with POST")
        if path not in self.owner.gets:
            self._unknown()
        return self.owner.gets[path]()

    def _post(self, path: str, exchange: Exchange) -> Mapping[str, Any] | None:
        if path in self.owner.gets:
            raise Refused(405, f"{path} is asked with GET")
        if path not in self.owner.posts:
            self._unknown()
        return self.owner.posts[path](self._body(), exchange)

    def _refuse_method(self, path: str, exchange: Exchange) -> NoReturn:
        raise Refused(405, "this method is not known here; there are GET and POST")

    def _unknown(self) -> NoReturn:
        raise Refused(404, f"no such route; there are {', '.join([*self.owner.gets, *self.owner.posts])}")

    def _body(self) -> dict[str, Any]:
        """The JSON object that was sent. Raises Refused for anything else."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "send JSON, with Content-Type: application/json")
        if "Transfer-Encoding" in self.headers or "Content-Length" not in self.headers:
            raise Refused(411, "say how long the body is, with Content-Length; chunks are not read")
        given = self.headers.get_all("Content-Length", [])
        if len(set(given)) > 1 or not (given[0].isascii() and given[0].isdigit()):
            raise Refused(400, "Content-Length must be one whole number")
        if len(given[0]) > 12 or int(given[0]) > BODY_BYTES:
            raise Refused(413, f"a body has at most {BODY_BYTES:,} bytes")
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        sent = self.rfile.read(int(given[0]))
        if len(sent) < int(given[0]):
            raise ConnectionError
        try:
            document = json.loads(sent.decode("utf-8"), parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise Refused(400, f"the body is no JSON: {why}") from None
        if not isinstance(document, dict):
            raise Refused(400, "the body must be a JSON object")
        return document

    def handle_expect_100(self) -> bool:
        """Not yet: a body is asked for once its length is known to be allowed."""
        return True


def _split(url: str) -> SplitResult:
    """A URL's parts. Raises Refused if it has none."""
    try:
        return urlsplit(url)
    except ValueError:
        raise Refused(400, "the address asked for is none") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _hung_up(connection: socket.socket) -> bool:
    """Whether the caller has closed its end."""
    try:
        readable, _, _ = select.select([connection], [], [], 0)
        return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True
