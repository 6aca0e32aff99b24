"""Questions to a language model behind an OpenAI-compatible endpoint (`POST <url>/chat/completions`).

Written for judges: each request has a time limit as a whole, what fails is tried again a set number of times,
and then it is over. The key goes into one header of requests to the configured address and nowhere else:
redirects are not followed, and neither replies nor errors are handed on before it is cut out of them.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedtune.errors import InputError

T = TypeVar("T")
LONGEST_WAIT_S = 60.0
_LARGEST_REPLY = 4 << 20  # bytes
# What another request cannot mend, whatever it asks: address, key or model are wrong.
_MISCONFIGURED = {
    401: "it does not take the key; set the environment variable that evaluation.judge.key_variable names",
    403: "the key has no right to this model; see evaluation.judge.key_variable and model",
    404: "it has no such address or model; see evaluation.judge.url (as http://host:port/v1) and model",
    405: "this address takes no questions; evaluation.judge.url is the base, as http://host:port/v1",
}
_WORTH_RETRYING = (408, 409, 425, 429)


class Unanswered(Exception):
    """No usable reply after all attempts; the text says why."""


class _Again(Exception):
    """One attempt failed and another may not."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Endpoint:
    """Where to ask.

    Attributes:
        url: Base of the endpoint, as `http://host:port/v1`.
        model: The name the endpoint knows the model by.
        key: Sent as bearer token; None where none is needed.
        timeout_s: Seconds one request may take, from the first byte sent to the last one received.
        retries: Further attempts after a failed one.
        sleep: Waits that many seconds between attempts.
    """

    url: str
    model: str
    key: str | None = field(repr=False)
    timeout_s: float
    retries: int
    sleep: Callable[[float], None] = time.sleep

    def ask(
        self, messages: Sequence[Mapping[str, str]], read: Callable[[str], T | None], *, max_tokens: int
    ) -> tuple[str, T]:
        """Asks with temperature 0 until a reply can be read.

        Args:
            messages: `{"role": ..., "content": ...}`, in their order.
            read: From the reply's text to what was asked for; None where it is not in there.
            max_tokens: The most tokens of a reply.

        Returns:
            The reply, and what was read.

        Raises:
            Unanswered: Each attempt timed out, failed (connection, 408, 409, 425, 429, 5xx), or brought
                nothing that can be read; or the endpoint refused this question (another 4xx), which is not
                repeated.
            InputError: The endpoint redirects, or answers 401, 403, 404 or 405.
        """
        question = {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        body = json.dumps(question).encode()
        reason, wait_s = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                self.sleep(min(max(wait_s, 2.0 ** (attempt - 1)), LONGEST_WAIT_S))
            try:
                reply = self._without_key(_within(self.timeout_s, lambda: self._post(body)))
            except _Again as error:
                reason, wait_s = self._without_key(str(error)), error.wait_s
                continue
            found = read(reply)
            if found is not None:
                return reply, found
            reason, wait_s = f"nothing to be read in the reply {reply[:80]!r}", 0.0
        raise Unanswered(f"{self.retries + 1} attempts, the last: {reason}")

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        try:
            with _OPENER.open(request, timeout=self.timeout_s) as response:
                raw = response.read(_LARGEST_REPLY + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            what = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(what, TimeoutError):
                raise _Again(f"no reply within {self.timeout_s:g} s") from None
            raise _Again(f"{type(what).__name__}: {what}") from None
        return _content(raw)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        # never the body: endpoints like to repeat the key in it
        told = f"the judge at {self.url} answered {error.code}"
        if 300 <= error.code < 400:
            target = self._without_key(str(error.headers.get("Location")))
            return InputError(
                f"{told}, a redirect to {target!r}, which is not followed: set evaluation.judge.url to the "
                "address that answers itself"
            )
        if error.code in _MISCONFIGURED:
            return InputError(f"{told}: {_MISCONFIGURED[error.code]}")
        if error.code in _WORTH_RETRYING or error.code >= 500:
            return _Again(f"status {error.code}", _seconds(error.headers.get("Retry-After")))
        return Unanswered(f"the question was refused with status {error.code}")

    def _without_key(self, text: str) -> str:
        return text if self.key is None else text.replace(self.key, "[key]")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Hands redirects back as errors; the library would take the key along to any host."""

    def redirect_request(self, *args: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def check_judge(url: str, key_variable: str | None) -> None:
    """Refuses an address that is none or holds a secret, since a run's folder has the configuration.

    Raises:
        InputError: Says what is wrong, without repeating what may be a secret.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or any(not "!" <= character <= "~" for character in url):
        raise InputError("url must be the base of an OpenAI-compatible endpoint, as http://host:port/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            "url must not hold a user name, a password or a query, since it is written to the run's folder; "
            "put the key into an environment variable and its name into key_variable"
        )
    if key_variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key_variable):
        raise InputError(
            "key_variable must be the name of an environment variable, as JUDGE_KEY, and never the key itself"
        )


def key_of(variable: str | None) -> str | None:
    """The key in an environment variable; None where none is named.

    Raises:
        InputError: The variable is not set, or its value cannot stand in a header.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"evaluation.judge.key_variable: the environment variable {variable} is not set; put the judge's "
            "key into it, or leave key_variable out if the endpoint needs none"
        )
    if any(not "!" <= character <= "~" for character in key):  # or it would show in the library's error
        raise InputError(
            f"evaluation.judge.key_variable: {variable} holds blanks or characters outside ASCII"
        )
    return key


def _content(raw: bytes) -> str:
    """The text of a chat completion."""
    if len(raw) > _LARGEST_REPLY:
        raise _Again(f"a reply of more than {_LARGEST_REPLY} bytes")
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        content = None
    if not isinstance(content, str):
        raise _Again(f"{len(raw)} bytes that are not a chat completion")  # not shown: the key may be in them
    return content.encode("utf-8", "replace").decode()  # JSON can hold halves of characters, files cannot


def _seconds(header: str | None) -> float:
    """What Retry-After asks for; 0 where it is missing or a date."""
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, or `_Again` once the time is over.

    A socket's own time limit starts again with every byte. The thread left behind ends with its socket.
    """
    results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((True, work()))
        except Exception as error:  # raised again by the caller
            results.put((False, error))

    threading.Thread(target=run, name="judge", daemon=True).start()
    try:
        good, value = results.get(timeout=seconds)
    except queue.Empty:
        raise _Again(f"no reply within {seconds:g} s") from None
    if not good:
        raise value
    result: T = value
    return result
