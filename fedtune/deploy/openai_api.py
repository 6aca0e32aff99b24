"""The OpenAI-compatible routes of one model, which answers one request at a time.

    GET  /health                  that it is there
    GET  /v1/models               its name
    POST /v1/completions          continues a text as it is, without a template
    POST /v1/chat/completions     answers a conversation in the template that the model was tuned in

A field that is not known here is refused, and not passed over: an answer without what was asked for looks
like one with it.
"""

from __future__ import annotations

import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedtune.config.schema import RunConfig
from fedtune.deploy.http_json import Exchange, JsonServer, Refused
from fedtune.errors import InputError, nearest, short, system_error
from fedtune.federation.answering import NEW_TOKENS
from fedtune.federation.completing import Completion, Told, completer, most_tokens
from fedtune.models.load import Loaded

KEY_VARIABLE = "FEDTUNE_API_KEY"
KEY_LENGTH = 16
STOPS, PROMPTS, TEXT = 4, 16, 200  # stopping texts, prompts of one request, characters of a stopping text
_SHARED = ("model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "n")
_FIELDS = {
    "/v1/completions": (*_SHARED, "prompt", "user"),
    "/v1/chat/completions": (*_SHARED, "messages", "max_completion_tokens", "user"),
}
_NEUTRAL: Mapping[str, Any] = {  # what clients send though they ask for nothing
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "echo": False,
    "best_of": 1,
    "suffix": "",
    "tools": [],
    "logit_bias": {},
    "response_format": {"type": "text"},
    "store": False,
}


class Completes(Protocol):
    """Who answers: as `complete`, with the model and its configuration filled in."""

    def __call__(
        self,
        prompt: str | Mapping[str, Any],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[str],
        told: Told | None,
    ) -> Completion:
        """One completion."""


@dataclass(frozen=True)
class _Asked:
    """A request, checked."""

    prompts: list[str | Mapping[str, Any]]
    draws: dict[str, Any]
    stream: bool
    usage: bool


@dataclass(frozen=True)
class Model:
    """A model as these routes offer it.

    Attributes:
        name: By which requests ask for it.
        complete: Answers.
        max_tokens: The most that a request may ask for.
        default_tokens: What it gets where it does not say.
    """

    name: str
    complete: Completes
    max_tokens: int
    default_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))


class Routes:
    """What is asked of a model over HTTP."""

    def __init__(self, model: Model) -> None:
        self._model, self._turn = model, threading.Lock()

    def server(self, host: str, port: int, *, key: str | None, quiet: bool) -> JsonServer:
        """A server of these routes, which listens already. Raises InputError if it cannot."""
        about = self._about()
        return JsonServer(
            host,
            port,
            {
                "/health": lambda: {"status": "ok"},
                "/v1/models": lambda: {"object": "list", "data": [about]},
                f"/v1/models/{self._model.name}": lambda: about,
            },
            {
                "/v1/completions": lambda body, exchange: self._complete(body, exchange, "/v1/completions"),
                "/v1/chat/completions": lambda body, exchange: self._complete(
                    body, exchange, "/v1/chat/completions"
                ),
            },
            key=key,
            open_paths=("/health",),
            quiet=quiet,
        )

    def _about(self) -> dict[str, Any]:
        made = self._model.created
        return {"id": self._model.name, "object": "model", "created": made, "owned_by": "fedtune"}

    def _complete(self, body: Mapping[str, Any], exchange: Exchange, path: str) -> dict[str, Any] | None:
        chat = path == "/v1/chat/completions"
        asked = self._read(body, path)
        kind = "chat.completion" if chat else "text_completion"
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{kind}.chunk" if chat and asked.stream else kind,
            "created": int(time.time()),
            "model": self._model.name,
        }
        if asked.stream:
            self._stream(asked, head, exchange, chat=chat)
            return None

        def told(piece: str) -> None:
            exchange.check()

        with self._my_turn(exchange):
            found = [self._model.complete(prompt, **asked.draws, told=told) for prompt in asked.prompts]
        choices = [_choice(place, one, chat=chat) for place, one in enumerate(found)]
        return {**head, "choices": choices, "usage": _usage(found)}

    def _stream(self, asked: _Asked, head: Mapping[str, Any], exchange: Exchange, *, chat: bool) -> None:
        first = {"role": "assistant", "content": ""}

        def piece(text: str, place: int, reason: str | None = None) -> None:
            said: dict[str, Any] = {"delta": {"content": text} if text else {}} if chat else {"text": text}
            exchange.event(
                {
                    **head,
                    "choices": [{"index": place, **said, "finish_reason": reason, "logprobs": None}],
                    **({"usage": None} if asked.usage else {}),
                }
            )

        found = []
        with self._my_turn(exchange):
            for place, prompt in enumerate(asked.prompts):
                begun = False

                def told(text: str, place: int = place) -> None:
                    nonlocal begun
                    exchange.check()
                    if chat and not begun:
                        exchange.event(
                            {**head, "choices": [{"index": place, "delta": first, "finish_reason": None}]}
                        )
                        begun = True
                    if text:
                        piece(text, place)

                found.append(self._model.complete(prompt, **asked.draws, told=told))
                piece("", place, _reason(found[-1]))
        if asked.usage:
            exchange.event({**head, "choices": [], "usage": _usage(found)})
        exchange.event("[DONE]")

    @contextmanager
    def _my_turn(self, exchange: Exchange) -> Iterator[None]:
        """Waits until nobody else is being answered. Raises Gone if the caller does not wait."""
        while not self._turn.acquire(timeout=0.2):
            exchange.check()
        try:
            exchange.check()
            yield
        finally:
            self._turn.release()

    def _read(self, body: Mapping[str, Any], path: str) -> _Asked:
        """A request's fields. Raises Refused for one that is wrong or not known."""
        known = _FIELDS[path]
        given = {key: value for key, value in body.items() if value is not None}
        for key, value in given.items():
            if key not in known and (key not in _NEUTRAL or value != _NEUTRAL[key]):
                near = "" if key in _NEUTRAL else nearest(key, known)
                said = f"{short(key)} is not supported; there are {', '.join(known)}.{near}"
                raise Refused(400, said, short(key))
        model = given.get("model")
        if model != self._model.name:
            raise Refused(404, f"model must be {self._model.name!r}, got {short(repr(model))}", "model")
        if given.get("n", 1) != 1:
            raise Refused(400, "n must be 1: ask again for another answer", "n")
        limit = self._model.max_tokens
        tokens = given.get("max_completion_tokens", given.get("max_tokens"))
        if tokens is None:
            tokens = min(self._model.default_tokens, limit)
        if not _whole(tokens) or not 1 <= tokens <= limit:
            raise Refused(400, f"max_tokens must be a whole number from 1 to {limit}", "max_tokens")
        seed = given.get("seed", secrets.randbits(31))
        if not _whole(seed) or not 0 <= seed < 2**63:
            raise Refused(400, "seed must be a whole number from 0 up", "seed")
        temperature = _number(given.get("temperature", 0.0), "temperature", 0, 2)
        top_p = _number(given.get("top_p", 1.0), "top_p", 0, 1)
        stream = given.get("stream", False)
        options = given.get("stream_options", {})
        if not isinstance(stream, bool):
            raise Refused(400, "stream must be true or false", "stream")
        usage = options.get("include_usage", False) if isinstance(options, dict) else None
        if not isinstance(usage, bool) or options.keys() - {"include_usage"}:
            raise Refused(400, "stream_options has include_usage, true or false", "stream_options")
        draws = {
            "max_new_tokens": tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "stop": _stops(given.get("stop", [])),
        }
        prompts = _messages(given) if "messages" in known else _prompts(given)
        return _Asked(prompts, draws, stream, usage)


def _messages(given: Mapping[str, Any]) -> list[str | Mapping[str, Any]]:
    messages = given.get("messages")
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(one, dict) and "role" in one for one in messages)
    ):
        raise Refused(400, 'messages must be a list as [{"role": "user", "content": "..."}]', "messages")
    if messages[-1]["role"] not in ("user", "tool", "system", "developer"):
        raise Refused(400, "the last of messages must be a user's: it is what is answered", "messages")
    return [{"messages": messages}]


def _prompts(given: Mapping[str, Any]) -> list[str | Mapping[str, Any]]:
    prompt = given.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= PROMPTS:
        raise Refused(400, f"prompt must be a text, or a list of 1 to {PROMPTS} texts", "prompt")
    for text in prompts:
        if not isinstance(text, str) or not text.strip() or not _unicode(text):
            raise Refused(400, "prompt must be text and not empty", "prompt")
    return prompts


def _stops(given: Any) -> list[str]:
    stops = [given] if isinstance(given, str) else given
    right = isinstance(stops, list) and len(stops) <= STOPS
    if not right or not all(isinstance(one, str) and 0 < len(one) <= TEXT and _unicode(one) for one in stops):
        raise Refused(400, f"stop must be up to {STOPS} texts of 1 to {TEXT} characters", "stop")
    return stops


def _unicode(text: str) -> bool:
    """Whether there is no half of a surrogate pair in it."""
    return not re.search("[\ud800-\udfff]", text)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any, name: str, low: float, high: float) -> float:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not low <= value <= high or (name == "top_p" and value == 0):
        above = "above" if name == "top_p" else "from"
        raise Refused(400, f"{name} must be a number {above} {low} to {high}", name)
    return float(value)


def _choice(place: int, found: Completion, *, chat: bool) -> dict[str, Any]:
    said = {"message": {"role": "assistant", "content": found.text}} if chat else {"text": found.text}
    return {"index": place, **said, "finish_reason": _reason(found), "logprobs": None}


def _reason(found: Completion) -> str:
    return "stop" if found.ended else "length"


def _usage(found: Sequence[Completion]) -> dict[str, int]:
    asked, said = sum(one.prompt_tokens for one in found), sum(one.completion_tokens for one in found)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def read_key(file: Path | None, environment: Mapping[str, str]) -> str | None:
    """The key that callers must know, from a file or an environment variable; None where there is neither.

    Raises:
        InputError: It is too short or no plain text, both are there, or others can read the file.
    """
    if file is None:
        text, where = environment.get(KEY_VARIABLE), KEY_VARIABLE
        if text is None:
            return None
    elif KEY_VARIABLE in environment:
        raise InputError(f"there are --key-file and {KEY_VARIABLE}; give one of them")
    else:
        where = str(file)
        try:
            if stat.S_IMODE(file.stat().st_mode) & 0o077:
                raise InputError(f"{file} can be read by others; chmod 600 {file}")
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = system_error(error) if isinstance(error, OSError) else "it is no text."
            raise InputError(f"the key in {file} cannot be read: {why}") from None
    key = text.strip()
    if len(key) < KEY_LENGTH or not re.fullmatch(r"[!-~]+", key):
        raise InputError(
            f"the key in {where} must be {KEY_LENGTH} or more letters, digits and signs without blanks; one "
            "is made by: openssl rand -hex 32"
        )
    return key


def serve_forever(server: JsonServer, announce: Callable[[], None]) -> None:
    """Answers until a signal comes; returns once the requests under way are answered and logged.

    Args:
        server: Of the routes.
        announce: Called once a signal ends it well.
    """
    try:
        announce()
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.end()


def serve_run(
    config: RunConfig,
    loaded: Loaded,
    name: str,
    max_tokens: int,
    *,
    host: str,
    port: int,
    key: str | None,
    quiet: bool,
) -> None:
    """Serves a run's result until a signal comes.

    Args:
        config: Of the run.
        loaded: The result.
        name: What requests call it.
        max_tokens: The most of an answer that a request may ask for.
        host: Address to bind; one that other machines reach needs a key.
        port: Its port; 0: one that is free.
        key: What callers must say.
        quiet: No line a request.

    Raises:
        InputError: The address cannot be bound.
    """
    most = most_tokens(loaded, max_tokens)
    default = config.evaluation.max_new_tokens or NEW_TOKENS
    routes = Routes(Model(name, completer(config, loaded), most, default))
    server = routes.server(host, port, key=key, quiet=quiet)
    serve_forever(server, lambda: print(f"{name} answers at {server.url}/v1", flush=True))
