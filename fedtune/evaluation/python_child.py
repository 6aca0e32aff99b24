"""Runs the tests of a Python function in one process, and the function, which a model wrote, in another.

Started as a program of its own inside of the sandbox, in a folder with `job.json`: `tests` is the source text
of the tests, in which the function is one that we put there, `answer` that with the function itself, `name`
the function. The process of the tests has the run's nonce and the descriptor that wants it; it takes both
source texts into its memory, which no other process of the sandbox may read, before it starts the second one.
That is told arguments and tells results, as JSON.

So results are plain data: None, numbers, texts, bytes, and lists, tuples, sets and dictionaries of them, with
the equality of Python's own types. An iterator is made a sequence that equals nothing but can be listed; what
is anything else equals nothing. Tests do not see what a function does to its arguments.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

SEAL = 3
PR_SET_DUMPABLE = 4


class Items:
    """What iterated over comes from the other process, without its type: equal to itself alone."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def encode(value: Any) -> Any:
    """A value as JSON: what JSON does not know is a list of a word and parts."""
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        value = value.item()  # a number of NumPy's
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, Mapping):
        return ["dict", *([encode(key), encode(each)] for key, each in value.items())]
    for name, kind in (("list", list), ("tuple", tuple), ("frozenset", frozenset), ("set", set)):
        if isinstance(value, kind):
            return [name, *map(encode, value)]
    return ["items", *map(encode, value)] if isinstance(value, Iterable) else ["other"]


def decode(value: Any) -> Any:
    """The inverse of `encode`, which raises for what that does not make."""
    if not isinstance(value, list | dict):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("no value")
    kind, *parts = value
    if kind == "complex":
        return complex(*parts)
    if kind == "bytes":
        return bytes.fromhex(*parts)
    if kind == "dict":
        return {decode(key): decode(each) for key, each in parts}
    if kind == "other":
        return object()
    made = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "items": Items}[kind]
    return made([decode(part) for part in parts])


def test() -> None:
    """Runs the tests, then sends the nonce."""
    nonce = os.read(0, 64)
    if ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0) != 0:
        raise OSError("this process cannot be closed to others")
    with open("job.json", encoding="utf-8") as file:
        job = json.load(file)
    os.remove("job.json")
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(job["setup"], "setup.py", "exec"), space)
    space[job["name"]] = _elsewhere(job["answer"], job["name"])
    exec(compile(job["tests"], "tests.py", "exec"), space)
    os.write(SEAL, nonce)


def _elsewhere(source: str, name: str) -> Callable[..., Any]:
    """Starts the second process; returns a function that asks it."""
    call_read, call_write = os.pipe()
    result_read, result_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(call_read, 0)
        os.dup2(result_write, SEAL)  # which it does not get
        os.execv(sys.executable, [*sys.orig_argv, name])
    os.close(call_read)
    os.close(result_write)
    calls = os.fdopen(call_write, "w", encoding="utf-8")
    results = os.fdopen(result_read, encoding="utf-8")

    def exchange(value: Any) -> Any:
        try:
            calls.write(json.dumps(value) + "\n")
            calls.flush()
            line = results.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            _end_as(child)
        outcome, *found = json.loads(line)
        if outcome == "value":
            return decode(*found)
        raise _error(*found)

    exchange(source)
    return lambda *arguments, **named: exchange([encode(arguments), encode(named)])


def _end_as(child: int) -> None:
    """Ends as the second process did."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    raise RuntimeError(f"the function ended its process with status {status}")


def _error(name: str, text: str) -> BaseException:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:
            pass  # it is made of more than a text
    return RuntimeError(f"{name}: {text}")


def answer(name: str) -> None:
    """Loads a source text, and calls a function of it until no one asks any more."""
    calls = os.fdopen(os.dup(0), encoding="utf-8")
    results = os.fdopen(os.dup(SEAL), "w", encoding="utf-8")
    os.close(SEAL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    space: dict[str, Any] = {"__name__": "__main__"}
    for line in calls:
        try:
            asked = json.loads(line)
            if isinstance(asked, str):
                exec(compile(asked, "answer.py", "exec"), space)
                value = None
            else:
                arguments, named = map(decode, asked)
                value = space[name](*arguments, **named)
            told = json.dumps(["value", encode(value)])
        except Exception as error:
            told = json.dumps(["error", type(error).__name__, str(error)])
        results.write(told + "\n")
        results.flush()


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)
    test() if len(sys.argv) == 1 else answer(sys.argv[1])
