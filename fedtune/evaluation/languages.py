"""The languages of HumanEval-X: where an answer ends, what makes a program of it, how it did.

Zheng et al. 2023, "CodeGeeX: A Pre-Trained Model for Code Generation with Multilingual Benchmarking on
HumanEval-X", and the evaluation published with the data, whose rules are followed for stop texts, added
imports, order of the parts and language versions (C++11, Go 1.18). Where we differ:

* A program passes if it also reaches the end of its tests: one that exits before with status 0 fails. What
  shows that is a nonce of the run, which tests send at their end. In Python and C++ the answer is called in
  another process than its tests (`python_child.py`, `standins/apart.hpp`), which has neither the nonce nor
  the descriptor that wants it; results come back as plain values. But in C++ both are one text, so a macro
  or what runs before main can alter the tests. In Java and Go answer and tests are one process: an answer
  that prints, exits, or writes where the nonce is due does not pass, but one that searches its own memory
  for the nonce, or alters what its tests are made of, can. A score is no proof against a model that attacks
  its judge.
* Java runs with assertions on: the only check of Java/151 is an `assert`, without which any answer passes.
* The tests of CPP/23 hand texts of C to a function that the problem calls strlen, and so test that of the C
  library; ours hand it a `string`, without which any answer passes.
* Go's helper imports are those that the code uses outside of comments and texts; the published test for the
  letters "sort." imports what is then unused, which does not compile.
* NumPy is imported where the code names it, not always.
* Go/95 is as published: its tests are right, but its own solution fails them in one run of five or so, since
  it looks at no more than two keys of a map, whose order Go draws anew each time.
* One wall-clock limit for a program, another for its compiler; the published one has both in one for Go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from fedtune.errors import InputError
from fedtune.evaluation import compilers
from fedtune.evaluation.compilers import GO_IMPORTS, PYTHON_IMPORTS, Problem, Toolchain
from fedtune.evaluation.sandbox import SEAL, Finished

KINDS = ("wrong answer", "compile error", "runtime error", "timeout", "memory", "processes")

CPP_INCLUDES = (
    *("stdlib.h", "algorithm", "math.h", "stdio.h", "vector", "string", "climits", "cstring", "iostream"),
)


@dataclass(frozen=True)
class Language:
    """One language of the data.

    Attributes:
        fields: What each problem must have.
        stop: Texts before which an answer ends.
        cut: From what a model wrote to the function body: the rest of the published rule on where it ends.
        program: From a problem and a body to a source text; with the tests, but for Python and its own.
        toolchain: Finds and prepares the compiler. Raises Missing.
        version: Name and version of the compiler. Raises Missing.
        wrong: Marks, in what a program printed, a test that was not met.
        memory: Marks memory that was refused.
        malformed: Marks, in what a program printed when run, a source text that is not of this language.
    """

    fields: Mapping[str, type]
    stop: tuple[str, ...]
    cut: Callable[[str], str]
    program: Callable[[Problem, str], str]
    toolchain: Callable[[], AbstractContextManager[Toolchain]]
    version: Callable[[], str]
    wrong: str
    memory: str
    malformed: str = r"(?!)"

    def verdict(self, finished: Sequence[Finished], steps: int) -> str:
        """How a program did: "passed", or the kind of its failure, one of `KINDS`."""
        last = finished[-1]
        if last.stopped:
            return {"time": "timeout", "memory": "memory", "processes": "processes"}[last.stopped]
        if last.ok and len(finished) == steps:
            return "passed" if last.sealed else "runtime error"
        if re.search(self.memory, last.output):
            return "memory"
        if len(finished) < steps or re.search(self.malformed, last.output):
            return "compile error"
        return "wrong answer" if re.search(self.wrong, last.output) else "runtime error"


def indented_part(text: str) -> str:
    """The lines up to the first that is neither blank nor indented: a Python function's body."""
    lines = text.split("\n")
    end = next((i for i, line in enumerate(lines) if line.strip() and line[0] not in " \t"), len(lines))
    return "\n".join(lines[:end])


def closed_part(text: str) -> str:
    """The text up to the brace that closes the function; where none does, up to the last closing brace."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            return text[: place + 1]
    return text[: text.rfind("}") + 1] or text


def _before_last(test: str, ending: str, line: str, problem: Problem) -> str:
    """Puts a line before the braces that end a test."""
    if not (found := re.search(ending, test)):
        raise InputError(f"{problem['task_id']}: the test does not end with the closing brace of its main.")
    return f"{test[: found.start()]}\n{line}\n{test[found.start() :]}"


def _python_program(problem: Problem, body: str) -> str:
    numpy = "import numpy, numpy as np\n" if re.search(r"\b(np|numpy)\b", body) else ""
    return f"{PYTHON_IMPORTS}{numpy}{problem['prompt']}{body}\n"


def _cpp_program(problem: Problem, body: str) -> str:
    """The answer's text knows its function; the tests' text means by its name one that calls it apart."""
    prompt = problem["prompt"]
    lines = [f"#include<{name}>" for name in CPP_INCLUDES]
    added = "".join(f"{line}\n" for line in lines if line not in prompt)
    holder = "#define BOOST_ANY_INCLUDED\n" if "boost/any.hpp" in prompt else ""
    test = _before_last(problem["test"], r"\}\s*$", "fedtune_apart::passed();", problem)
    if not (names := re.findall(r"(?m)^[\w:][\w:<>,&* ]*[ >&*](\w+)\s*\([^()]*\)\s*\{", prompt)):
        raise InputError(f"{problem['task_id']}: the prompt has no line that begins a function.")
    given = "string(__VA_ARGS__)" if problem["task_id"] == "CPP/23" else "__VA_ARGS__"
    asked = f"#define {names[-1]}(...) fedtune_apart::apart([&] {{ return {names[-1]}({given}); }})"
    return f"{holder}#include<apart.hpp>\n{added}#include<iostream>\n{prompt}{body}\n{asked}\n{test}\n"


def _java_program(problem: Problem, body: str) -> str:
    failed = "catch (java.io.IOException error) { throw new RuntimeException(error); }"
    first = f"byte[] fedtuneNonce; try {{ fedtuneNonce = System.in.readNBytes(32); }} {failed}"
    opened = f'java.io.FileOutputStream fedtuneSeal = new java.io.FileOutputStream("/proc/self/fd/{SEAL}")'
    last = f"try ({opened}) {{ fedtuneSeal.write(fedtuneNonce); }} {failed}"
    test = _before_last(problem["test"], r"\}\s*\}\s*$", last, problem)
    test, mains = re.subn(
        r"\bvoid main\s*\([^)]*\)[^{]*\{", lambda found: f"{found[0]}\n{first}\n", test, count=1
    )
    if not mains:
        raise InputError(f"{problem['task_id']}: the test has no main.")
    return f"{problem['prompt']}{body}\n{test}\n"


def _java_cut(text: str) -> str:
    body = closed_part(text)
    return f"{body}\n}}" if body.count("}") == body.count("{") + 1 else body  # the class's own


def _go_program(problem: Problem, body: str) -> str:
    prompt = problem["prompt"].replace(problem["import"], "", 1) if problem["import"] else problem["prompt"]
    present = set(re.findall(r'"([\w./-]+)"', problem["test_setup"]))
    code = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|`[^`]*`', " ", prompt + body, flags=re.DOTALL)
    used = [p for p in GO_IMPORTS if re.search(rf"(?<![\w.]){p.rpartition('/')[2]}\.[A-Z]", code)]
    added = "".join(f'import "{name}"\n' for name in used if name not in present)
    return f"{problem['test_setup']}\n{added}{prompt}{body}\n{problem['test']}\n"


_FIELDS = {"task_id": str, "prompt": str, "test": str}

LANGUAGES = {
    "python": Language(
        fields=_FIELDS,
        stop=("\ndef", "\nclass", "\nif", "\n#", "\nprint", "\nassert"),
        cut=indented_part,
        program=_python_program,
        toolchain=compilers.python,
        version=compilers.python_version,
        wrong=r"(?m)^AssertionError",
        memory=r"(?m)^MemoryError",
        malformed=r"(?m)^(SyntaxError|IndentationError|TabError)\b",
    ),
    "cpp": Language(
        fields=_FIELDS,
        stop=("\nint main(",),
        cut=closed_part,
        program=_cpp_program,
        toolchain=compilers.cpp,
        version=compilers.cpp_version,
        wrong=r"Assertion `.*' failed",
        memory=r"std::bad_alloc|out of memory|memory exhausted",
    ),
    "java": Language(
        fields=_FIELDS,
        stop=("public static void main",),
        cut=_java_cut,
        program=_java_program,
        toolchain=compilers.java,
        version=compilers.java_version,
        wrong=r"java\.lang\.AssertionError",
        memory=r"java\.lang\.OutOfMemoryError",
    ),
    "go": Language(
        fields={**_FIELDS, "import": str, "test_setup": str},
        stop=("\n//", "\nfunc main("),
        cut=closed_part,
        program=_go_program,
        toolchain=compilers.go,
        version=compilers.go_version,
        wrong=r"Not equal: expected",
        memory=r"out of memory|cannot allocate memory",
    ),
}
