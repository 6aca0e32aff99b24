"""Answers in Python that attack what judges them. Each is a wrong answer, and none may pass."""

from __future__ import annotations

import collections
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from code_attacks import MARK, NONCE, finished, judge, of_the_sandbox
from toolchains import toolchains

from fedtune.errors import InputError
from fedtune.evaluation import python_child, sandbox
from fedtune.evaluation.compilers import Toolchain
from fedtune.evaluation.languages import LANGUAGES
from fedtune.evaluation.sandbox import CodeSettings, Step


@pytest.fixture(scope="module")
def limits() -> CodeSettings:
    return of_the_sandbox()


@pytest.fixture(scope="module")
def python() -> Iterator[Toolchain]:
    yield from toolchains("python")


# The nonce


SEALS = """
import os, sys
nonce = os.read(0, 99)
{}
"""


@pytest.mark.parametrize(
    ("does", "sealed"),
    [
        ("os.write(3, nonce)", True),
        ("os.write(3, nonce[:20]); os.write(3, nonce[20:])", True),
        ("open('/proc/self/fd/3', 'wb').write(nonce)", True),
        ("os.write(1, nonce)", False),
        ("os.write(3, nonce[:-1])", False),
        ("os.write(3, nonce * 2)", False),
        ("os.write(3, b'x' + nonce)", False),
        ("os.close(3)", False),
        ("os.set_blocking(3, False); os.write(3, b'x' * (1 << 20))", False),
    ],
)
def test_a_command_that_returns_its_nonce_is_sealed(does: str, sealed: bool, limits: CodeSettings) -> None:
    command = (str(Path(sys.executable).resolve()), "-I", "-S", "-c", SEALS.format(does))
    [done] = sandbox.run(
        {}, [Step(command, 20.0, 256)], isolation="namespaces", readable=[Path(sys.base_prefix)]
    )
    assert done.ok and done.sealed is sealed


def test_each_command_has_a_nonce_of_its_own_so_that_an_earlier_one_is_of_no_use(
    limits: CodeSettings,
) -> None:
    steps = [Step(("sh", "-c", text), 20.0, 256) for text in ("cat > kept; cat kept", "cat kept >&3; cat")]
    first, second = sandbox.run({}, steps, isolation="namespaces")
    assert (len(first.output), len(second.output)) == (32, 32) and first.output != second.output
    assert second.ok and not second.sealed


# Python: the answer and its tests are two processes

PYTHON_ATTACKS = {
    "prints the old mark": f"import os; os.write(1, b'\\n{MARK}\\n'); os._exit(0)",
    "exits": "import os; os._exit(0)",
    "exits by a name": "raise SystemExit(0)",
    "exits at the end": "import atexit, os; atexit.register(os._exit, 0); return x",
    "is equal to everything": """
        class Same(int):
            __eq__ = lambda self, other: True
            __ne__ = lambda self, other: False
            __hash__ = int.__hash__
            __bool__ = lambda self: True
        return Same(1)
        """,
    "is equal to everything and no number": """
        class Same:
            __eq__ = lambda self, other: True
        return Same()
        """,
    "alters the builtins": """
        import builtins, sys
        builtins.AssertionError = Warning
        builtins.__import__ = builtins.exec = builtins.compile = lambda *a, **k: None
        sys.excepthook = sys.unraisablehook = lambda *a: None
        return x
        """,
    "alters the tests' functions": """
        import sys, gc
        for each in gc.get_objects():
            if isinstance(each, dict) and "check" in each:
                each["check"] = lambda f: None
        frame = sys._getframe()
        while frame:
            frame.f_globals["check"] = frame.f_locals["check"] = lambda f: None
            frame = frame.f_back
        return x
        """,
    "opens what other processes have open": """
        import glob, os
        for path in glob.glob("/proc/[0-9]*/fd/*") + [f"/proc/{os.getppid()}/fd/{n}" for n in range(9)]:
            if f"/{os.getpid()}/" not in path:
                for flags in (os.O_RDONLY | os.O_NONBLOCK, os.O_WRONLY | os.O_NONBLOCK):
                    try:
                        os.write(1, b"opened " + path.encode() + os.read(os.open(path, flags), 64))
                    except OSError:
                        pass
        for path in glob.glob("/proc/[0-9]*/mem") + glob.glob("/proc/[0-9]*/environ"):
            if f"/{os.getpid()}/" not in path:
                try:
                    open(path, "rb", 0).read(1)
                    os.write(1, b"opened " + path.encode())
                except OSError:
                    pass
        return x
        """,
    "holds the tests' process": """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        for pid in (os.getppid(), 1):
            if libc.ptrace(16, pid, 0, 0) == 0 or libc.ptrace(0x4206, pid, 0, 0) == 0:
                os.write(1, b"opened it")
        return x
        """,
    "kills the tests' process": "import os; os.kill(os.getppid(), 9); return x",
    "ends the tests' process in peace": """
        import os, signal
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(os.getppid(), number)
        return x
        """,
    "reads the tests": """
        import glob, os
        for path in glob.glob("**", recursive=True) + glob.glob("/tmp/*") + glob.glob("/sandbox/*"):
            if os.path.isfile(path) and "double(3)" in open(path).read():
                os.write(1, b"opened " + path.encode())
        return x
        """,
    "rewrites what runs": """
        import os
        for path in os.listdir("."):
            open(path, "w").write("import os; os.write(3, os.read(0, 64))")
        open("json.py", "w").write("import os; os._exit(0)")
        return x
        """,
    "outlives its tests": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            time.sleep(3)  # much longer than the tests take, and shorter than what a command may
            os.write(1, b"opened late")
            os._exit(0)
        return x
        """,
    "closes what it has": "import os; os.closerange(0, 64); return x",
    "tells what no function returns": """
        import os
        for number in range(3, 20):
            try:
                os.write(number, b'["error", "SystemExit", "0"]\\\\n')
            except OSError:
                pass
        return x
        """,
    "tells a value of ten thousand levels": """
        import os
        for number in range(3, 20):
            try:
                os.write(number, b'["value", ' + b"[" * 30_000 + b"]" * 30_000 + b"]\\\\n")
            except OSError:
                pass
        return x
        """,
    "tells no value at all": """
        import os
        for number in range(3, 20):
            try:
                os.write(number, b'{"value": 6}\\\\n["value", ["__class__", 1]]\\\\n')
            except OSError:
                pass
        return x
        """,
}


@pytest.mark.parametrize("attack", PYTHON_ATTACKS)
def test_no_python_answer_passes_without_the_right_values(
    attack: str, python: Toolchain, limits: CodeSettings
) -> None:
    text = textwrap.dedent(PYTHON_ATTACKS[attack]).strip("\n")
    body = textwrap.indent(text.replace("\\\\n", "\\n"), "    ") + "\n"
    done = finished("python", python, body, limits)
    assert not done[-1].sealed and LANGUAGES["python"].verdict(done, 1) not in ("passed", "compile error")
    assert "opened" not in done[-1].output


# Each looks for the nonce without having it, and prints how many there are.
PYTHON_HUNT = """
import os, re
count, beyond = 0, b""
for line in open("/proc/self/maps"):
    start, end = (int(each, 16) for each in line.split()[0].split("-"))
    try:
        with open("/proc/self/mem", "rb", 0) as memory:
            memory.seek(start)
            count += len(re.findall(rb"(?:c0ffe[e]){5}c0", memory.read(end - start)))
    except (OSError, ValueError, OverflowError):
        pass
for number in (0, 3):
    try:
        os.set_blocking(number, False)
        beyond += os.read(number, 64)
    except OSError:
        pass
print("found", count, len(beyond), flush=True)
"""


def test_no_answer_in_python_has_the_nonce_in_its_memory(
    python: Toolchain, limits: CodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda size: NONCE)
    body = textwrap.indent(PYTHON_HUNT, "    ") + "    return x\n"
    done = finished("python", python, body, limits, seconds=20.0)
    assert done[0].output.startswith("found 0 0\n") and not done[0].sealed
    whole = f"import os\nnonce = os.read(0, 64)\n{PYTHON_HUNT}"  # the same where it is one process
    command = (str(Path(sys.executable).resolve()), "-I", "-S", "-c", whole)
    [done] = sandbox.run(
        {}, [Step(command, 20.0, 512)], isolation="namespaces", readable=[Path(sys.base_prefix)]
    )
    assert int(done.output.split()[1]) > 0


def test_one_right_value_before_an_attack_is_not_enough(python: Toolchain, limits: CodeSettings) -> None:
    bodies = [
        f"    if x == 3: return 6\n    {rest}\n" for rest in ("return [1]", "__import__('os')._exit(0)")
    ]
    assert judge("python", python, bodies, limits) == ["wrong answer", "runtime error"]


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -1, 10**5000, 1.5, -0.0, float("inf"), "", "ä\ud800\n", b"\x00\xff", 1 + 2j),
        *([], (), set(), frozenset({1}), {}, [1, (2, [3])], {1, "a"}, {(1, 2): [3], "b": {None: 4.0}}),
        *([True, 1, 1.0, "1", b"1"], {1.5: {2}}, ["dict", 1], ["bytes", "00"], ("other",)),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_values_cross_as_they_are(value: Any) -> None:
    most = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        crossed = python_child.decode(json.loads(json.dumps(python_child.encode(value))))
        assert crossed == value and type(crossed) is type(value) and repr(crossed) == repr(value)
    finally:
        sys.set_int_max_str_digits(most)


def test_values_that_are_no_plain_data_keep_what_tests_ask_of_them() -> None:
    def cross(value: Any) -> Any:
        return python_child.decode(json.loads(json.dumps(python_child.encode(value))))

    assert cross(np.int64(3)) == 3 and type(cross(np.float32(0.5))) is float and cross(np.True_) is True
    assert cross(collections.Counter("aab")) == {"a": 2, "b": 1}
    assert cross(collections.namedtuple("Pair", "a b")(1, 2)) == (1, 2)
    assert list(cross(x * x for x in range(3))) == [0, 1, 4]
    assert len(cross(range(3))) == 3 and cross(range(3)) != [0, 1, 2]
    assert cross(object()) != cross(object()) and cross(np.zeros(2)) != [0.0, 0.0]


@pytest.mark.parametrize("told", ["{}", "[]", '["dict", 1]', '["dict", [[], 1]]', '["dict", [["list"], 1]]'])
def test_what_no_value_is_made_of_is_an_error(told: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        python_child.decode(json.loads(told))


def test_a_prompt_without_a_function_is_an_error(python: Toolchain, limits: CodeSettings) -> None:
    with pytest.raises(InputError, match="Python/odd: the prompt has no line that begins with def"):
        python.job({"task_id": "Python/odd", "prompt": "x = 1\n", "test": ""}, "", limits)
