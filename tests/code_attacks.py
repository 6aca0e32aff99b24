"""The problems that answers attack, and what puts an answer before those who judge it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from toolchains import need_namespaces

from fedtune.evaluation import sandbox
from fedtune.evaluation.code import verdicts
from fedtune.evaluation.compilers import Problem, Toolchain
from fedtune.evaluation.languages import LANGUAGES
from fedtune.evaluation.sandbox import CodeSettings, Finished, Step

PROBLEMS: dict[str, Problem] = {
    "python": {
        "task_id": "Python/double",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "test": (
            "def check(double):\n    assert double(3) == 6\n    assert double([1]) == [1, 1]\n\n"
            "check(double)\n"
        ),
    },
    "cpp": {
        "task_id": "CPP/double",
        "prompt": (
            "#include<signal.h>\n#include<stdio.h>\n#include<string.h>\nusing namespace std;\n"
            "int twice(int x){\n"
        ),
        "test": "#undef NDEBUG\n#include<assert.h>\nint main(){\n    assert (twice(3)==6);\n}\n",
    },
    "java": {
        "task_id": "Java/double",
        "prompt": "import java.util.*;\n\nclass Solution {\n    public int twice(int x) {\n",
        "test": (
            "public class Main {\n    public static void main(String[] args) {\n"
            "        if (new Solution().twice(3) != 6) throw new AssertionError();\n    }\n}\n"
        ),
    },
    "go": {
        "task_id": "Go/double",
        "prompt": "func Twice(x int) int {\n",
        "import": "",
        "test_setup": (
            'package main\n\nimport (\n    "testing"\n    "github.com/stretchr/testify/assert"\n)\n'
        ),
        "test": (
            "func TestTwice(t *testing.T) {\n    assert := assert.New(t)\n    assert.Equal(6, Twice(3))\n}\n"
        ),
    },
}
MARK = "humaneval-x: the end of the tests was reached"
NONCE = "c0ffee" * 5 + "c0"


def judge(name: str, tools: Toolchain, bodies: Sequence[str], limits: CodeSettings) -> list[str]:
    language, problem = LANGUAGES[name], PROBLEMS[name]
    return verdicts(language, tools, [(problem, language.program(problem, body)) for body in bodies], limits)


def finished(
    name: str, tools: Toolchain, body: str, limits: CodeSettings, seconds: float = 5.0
) -> list[Finished]:
    """How the commands for one answer ended, none of which gets more than some seconds."""
    problem = PROBLEMS[name]
    job = tools.job(problem, LANGUAGES[name].program(problem, body), limits)
    steps: list[Step] = [replace(step, seconds=min(step.seconds, seconds)) for step in job.steps]
    return sandbox.run(job.files, steps, isolation="namespaces", readable=job.readable)


def of_the_sandbox() -> CodeSettings:
    """What an answer may take; skips where there are no namespaces."""
    need_namespaces()
    return CodeSettings(seconds=20.0, memory_mb=512)
