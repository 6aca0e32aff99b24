from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import InputError
from fedtune.evaluation import code, sandbox
from fedtune.evaluation.code import TASKS, pass_at_k, verdicts
from fedtune.evaluation.compilers import GO_IMPORTS, Missing, Problem, Toolchain
from fedtune.evaluation.languages import LANGUAGES, closed_part, indented_part
from fedtune.evaluation.sandbox import CodeSettings, Finished, Step
from fedtune.evaluation.types import EvalEnv, EvalSettings, Outcome

# A few problems of each language, among them those that need something of their own: Boost, a name of the C
# library, OpenSSL; pattern matching and assertions of Java; imports of Go in the wrong place or twice.
SAMPLE = {"python": (0, 38, 162), "cpp": (22, 23, 162), "java": (38, 151), "go": (0, 32, 38, 65, 108)}
NO_SOLUTION = {
    "python": "    return NotImplemented\n",
    "cpp": "    throw 1;\n}\n",
    "java": "        throw new IllegalStateException();\n    }\n}\n",
    "go": "    panic(1)\n}\n",
}
ADD = {
    "python": {
        "task_id": "Python/add",
        "prompt": 'def add(x: int, y: int):\n    """Add x and y."""\n',
        "test": "\ndef check(add):\n    assert add(2, 3) == 5\n\ncheck(add)\n",
    },
    "cpp": {
        "task_id": "CPP/add",
        "prompt": "#include<stdio.h>\nusing namespace std;\nint add(int x,int y){\n",
        "test": "#undef NDEBUG\n#include<assert.h>\nint main(){\n    assert (add(2, 3)==5);\n}\n",
    },
    "java": {
        "task_id": "Java/add",
        "prompt": "import java.util.*;\n\nclass Solution {\n    public int add(int x, int y) {\n",
        "test": (
            "public class Main {\n    public static void main(String[] args) {\n"
            "        if (new Solution().add(2, 3) != 5) throw new AssertionError();\n    }\n}\n"
        ),
    },
    "go": {
        "task_id": "Go/add",
        "prompt": "// Add x and y; unlike fmt.Sum they are not text.\nfunc Add(x int, y int) int {\n",
        "import": "",
        "test_setup": (
            'package main\n\nimport (\n    "testing"\n    "github.com/stretchr/testify/assert"\n)\n'
        ),
        "test": (
            "func TestAdd(t *testing.T) {\n    assert := assert.New(t)\n    assert.Equal(5, Add(2, 3))\n}\n"
        ),
    },
}


def _isolation() -> sandbox.Isolation:
    try:
        sandbox.check("namespaces")
    except InputError:
        return "none"  # nothing in this file is dangerous
    return "namespaces"


@pytest.fixture(scope="module")
def limits() -> CodeSettings:
    if sys.platform != "linux":
        pytest.skip("generated code is run on Linux only")
    return CodeSettings(isolation=_isolation(), seconds=20.0, memory_mb=512, workers=2)


# A program of Python takes a quarter of a second, one that is compiled up to two.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LANGUAGES if name != "python"]


@pytest.fixture(scope="module", params=["python", *SLOW])
def tools(request: pytest.FixtureRequest) -> Iterator[tuple[str, Toolchain]]:
    context = LANGUAGES[request.param].toolchain()
    try:
        toolchain = context.__enter__()
    except Missing as why:
        pytest.skip(f"{request.param}: {why}")
    yield request.param, toolchain
    context.__exit__(None, None, None)


def judge(
    name: str, toolchain: Toolchain, problem: Problem, bodies: Sequence[str], limits: CodeSettings
) -> dict[str, str]:
    """The verdict on each body."""
    programs = [(problem, LANGUAGES[name].program(problem, body)) for body in bodies]
    return dict(zip(bodies, verdicts(LANGUAGES[name], toolchain, programs, limits), strict=True))


# The estimator


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3, abs=1e-15)
    assert pass_at_k(10, 0, 1) == pass_at_k(10, 0, 10) == 0.0
    assert pass_at_k(10, 1, 10) == pass_at_k(10, 10, 1) == 1.0
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7, abs=1e-15)  # 1 - C(3, 2) / C(5, 2) = 1 - 3 / 10
    assert pass_at_k(4, 1, 3) == pytest.approx(0.75, abs=1e-15)  # 1 - C(3, 3) / C(4, 3)
    assert pass_at_k(20, 5, 10) == pytest.approx(1 - 3003 / 184756, abs=1e-15)  # C(15, 10), C(20, 10)


@given(st.data())
def test_pass_at_k_is_the_quotient_of_binomials(data: st.DataObject) -> None:
    samples = data.draw(st.integers(1, 200))
    passed = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    exact = 1 - math.comb(samples - passed, k) / math.comb(samples, k)
    assert pass_at_k(samples, passed, k) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize(
    ("samples", "passed", "k"), [(9, 1, 10), (0, 0, 1), (5, 6, 1), (5, -1, 1), (5, 1, 0)]
)
def test_pass_at_k_refuses_what_cannot_be(samples: int, passed: int, k: int) -> None:
    with pytest.raises(InputError, match="samples"):
        pass_at_k(samples, passed, k)


# Where an answer ends, and what makes a program of it


def test_a_python_answer_ends_where_its_indentation_does() -> None:
    assert (
        indented_part("    x = 1\n\n    return x\n\ndef next():\n    pass") == "    x = 1\n\n    return x\n"
    )
    assert indented_part("\treturn 1") == "\treturn 1"
    assert indented_part("return 1") == ""


def test_an_answer_in_braces_ends_where_its_function_is_closed() -> None:
    assert closed_part("  if (a) { b(); }\n}\nint main() {}\n") == "  if (a) { b(); }\n}"
    assert closed_part("  while (a) { b(); } c(") == "  while (a) { b(); }"  # never closed
    assert closed_part("  return") == "  return"
    java = LANGUAGES["java"].cut
    assert (
        java("  return 1;\n    }\n    int more() { }") == "  return 1;\n    }\n}"
    )  # the class is closed, too


def test_go_imports_what_code_uses_and_tests_do_not_import() -> None:
    problem = {
        **ADD["go"],
        "import": 'import (\n    "sort"\n)\n',
        "prompt": 'import (\n    "sort"\n)\n\n// then sort.Do it\nfunc Add(x int, y int) int {\n',
        "test_setup": 'package main\n\nimport (\n    "testing"\n    "math"\n)\n',
    }
    body = '    rand.Seed(1) // bytes.New\n    a := "time.Now"\n    return int(math.Abs(strings.Count(a)))\n}'
    program = LANGUAGES["go"].program(problem, body)
    added = program.removeprefix(problem["test_setup"]).split("\n\n")[0]
    assert added == '\nimport "strings"\nimport "math/rand"'
    assert "math/rand" in GO_IMPORTS and 'import (\n    "sort"' not in program


def test_a_test_without_a_main_is_an_error() -> None:
    with pytest.raises(InputError, match="CPP/add: the test does not end with"):
        LANGUAGES["cpp"].program({**ADD["cpp"], "test": "int main();"}, "}")


# Programs


def test_right_and_wrong_answers_and_each_kind_of_failure(
    tools: tuple[str, Toolchain], limits: CodeSettings
) -> None:
    name, toolchain = tools
    bodies = {
        "python": {
            "    return x + y\n": "passed",
            "    return np.array([x, y]).sum()\n": "passed",
            "    return x - y\n": "wrong answer",
            "    return x +\n": "compile error",
            "    return x / 0\n": "runtime error",
            "    sys.exit(0)\n": "runtime error",
            "    return bytearray(1 << 34)\n": "memory",
            "    while True: pass\n": "timeout",
            "    import os\n    while True: os.fork()\n": "processes",
        },
        "cpp": {
            "    return x + y;\n}\n": "passed",
            "    return x - y;\n}\n": "wrong answer",
            "    return x + z;\n}\n": "compile error",
            "    throw 1;\n}\n": "runtime error",
            "    exit(0);\n}\n": "runtime error",
            "    vector<long> a(1L << 34, 1); return a[7];\n}\n": "memory",
            "    volatile int z = 0; while (true) z++;\n}\n": "timeout",
        },
        "java": {
            "        return x + y;\n    }\n}\n": "passed",
            "        return x - y;\n    }\n}\n": "wrong answer",
            "        return x + z;\n    }\n}\n": "compile error",
            "        return x / 0;\n    }\n}\n": "runtime error",
            "        System.exit(0); return 0;\n    }\n}\n": "runtime error",
            "        int[][] a = new int[99][]; return (a[x] = new int[1 << 30])[y];\n    }\n}\n": "memory",
        },
        "go": {
            "    return x + y\n}\n": "passed",
            "    return x - y\n}\n": "wrong answer",
            "    return x + z\n}\n": "compile error",
            "    return x / (y - 3)\n}\n": "runtime error",
            "    a := [][]byte{}\n    for { a = append(a, bytes.Repeat([]byte{1}, 1 << 24)) }\n}\n": "memory",
        },
    }[name]
    ending = [body for body, kind in bodies.items() if kind != "timeout"]
    endless = [body for body, kind in bodies.items() if kind == "timeout"]
    shorter = limits.model_copy(update={"seconds": 1.0})
    found = judge(name, toolchain, ADD[name], ending, limits)
    assert {**found, **judge(name, toolchain, ADD[name], endless, shorter)} == bodies


def test_canonical_solutions_pass_and_others_fail(
    tools: tuple[str, Toolchain], limits: CodeSettings, shared_data: Path
) -> None:
    """All 164 problems a language: reproduce/evaluation.py."""
    name, toolchain = tools
    problems = _problems(shared_data, name)
    kept = [problems[i] for i in SAMPLE[name] if not toolchain.lacks(problems[i])]
    assert kept
    language = LANGUAGES[name]
    right = [(each, language.program(each, each["canonical_solution"])) for each in kept]
    wrong = [(each, language.program(each, NO_SOLUTION[name])) for each in kept]
    found = verdicts(language, toolchain, [*right, *wrong], limits)
    assert found[: len(kept)] == ["passed"] * len(kept)
    assert "passed" not in found[len(kept) :]


def test_the_same_program_is_run_once(limits: CodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(files: dict[str, str], *rest: Any, **options: Any) -> list[Finished]:
        ran.append(json.loads(files["job.json"])["answer"])
        return [Finished(1, "", 0, "AssertionError")]

    monkeypatch.setattr(sandbox, "run", run)
    with LANGUAGES["python"].toolchain() as toolchain:
        programs = [(ADD["python"], text) for text in ("a", "b", "a", "a")]
        assert verdicts(LANGUAGES["python"], toolchain, programs, limits) == ["wrong answer"] * 4
    assert sorted(ran) == ["a", "b"]


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_rule_on_where_answers_end_keeps_canonical_solutions(name: str, shared_data: Path) -> None:
    language = LANGUAGES[name]
    for problem in _problems(shared_data, name):
        whole = problem["canonical_solution"]
        ends = [whole.find(text) for text in language.stop if text in whole]
        kept = language.cut(whole[: min(ends)] if ends else whole)
        if problem["task_id"] in ("Go/72", "CPP/94"):  # after the function: a helper; includes
            assert whole.startswith(kept) and len(kept) < len(whole)
        else:
            assert "".join(kept.split()) == "".join(whole.split())


def _problems(shared_data: Path, name: str) -> list[dict[str, Any]]:
    text = (shared_data / "humaneval_x" / f"humaneval_{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def test_the_stand_in_for_boost_any(limits: CodeSettings) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ on this machine")
    program = """
    #include <string>
    #include <list>
    #undef NDEBUG
    #include <cassert>
    #include "any.hpp"
    int main() {
        boost::any number = 3, text = std::string("x"), nothing, letters = "ab";
        std::list<boost::any> list = {1, {}, 2.5, text};
        assert(list.size() == 4 && nothing.empty() && nothing.type() == typeid(void));
        assert(number.type() == typeid(int) && letters.type() == typeid(const char*));
        boost::any copy = number;
        number = 4;
        assert(boost::any_cast<int>(copy) == 3 && boost::any_cast<int>(number) == 4);
        *boost::any_cast<int>(&copy) += 1;
        assert(boost::any_cast<const int&>(copy) == 4 && boost::any_cast<long>(&copy) == nullptr);
        try { boost::any_cast<double>(copy); assert(false); } catch (const boost::bad_any_cast&) {}
        text.swap(copy);
        assert(boost::any_cast<std::string>(copy) == "x");
    }
    """
    header = (Path(code.__file__).parent / "standins" / "any.hpp").read_text(encoding="utf-8")
    steps = [
        Step(("g++", "-std=c++11", "-Wall", "-Werror", "a.cpp", "-o", "a"), 60.0, 2048),
        Step(("./a",), 5.0, 256),
    ]
    done = sandbox.run({"a.cpp": program, "any.hpp": header}, steps, isolation=limits.isolation)
    assert [each.ok for each in done] == [True, True], done[-1].output


@pytest.mark.parametrize(
    ("finished", "verdict"),
    [
        ([Finished(0, "", 0, "Assertion `false' failed")], "runtime error"),  # the second step never came
        ([Finished(1, "", 0, "error: expected ;")], "compile error"),
        ([Finished(-9, "time", 0, "")], "timeout"),
        ([Finished(1, "", 0, "cc1plus: out of memory allocating 9 bytes")], "memory"),
        ([Finished(0, "", 0, ""), Finished(-6, "", 0, "main.cpp:9: Assertion `a' failed.")], "wrong answer"),
        ([Finished(0, "", 0, ""), Finished(-11, "", 0, "")], "runtime error"),
        ([Finished(0, "", 0, ""), Finished(-9, "processes", 0, "")], "processes"),
    ],
)
def test_verdicts_of_a_compiled_language(finished: list[Finished], verdict: str) -> None:
    if finished[0].ok and len(finished) == 1:
        finished = [*finished, Finished(0, "", 0, "exited early")]
    assert LANGUAGES["cpp"].verdict(finished, 2) == verdict


# The tasks


class Writer(EvalEnv):
    """An environment whose model writes what it is told to."""

    def __init__(self, files: dict[str, Path], texts: Sequence[Sequence[str]], **settings: Any) -> None:
        named = {name: str(path) for name, path in files.items()}
        options = EvalSettings(template="plain", loss_on="response", max_length=64, files=named, **settings)
        super().__init__(None, None, [], options)  # type: ignore[arg-type]
        self.texts, self.asked = texts, list[dict[str, Any]]()

    def generate(self, prompts: Sequence[str], **options: Any) -> list[list[str]]:
        self.asked.append({"prompts": list(prompts), **options})
        return [list(texts) for texts in self.texts]


def _write(folder: Path, name: str, problems: Sequence[Problem]) -> dict[str, Path]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")
    return {f"humaneval-x-{name}": path}


def test_pass_at_1_and_10_of_answers_with_known_verdicts(tmp_path: Path, limits: CodeSettings) -> None:
    files = _write(tmp_path, "python", [ADD["python"], {**ADD["python"], "task_id": "Python/other"}])
    right, wrong, broken = "    return x + y\n\nprint(1)", "    return x\n", "    return (\n"
    texts = [[right] * 3 + [wrong] * 5 + [broken] * 2, [wrong] * 10]
    env = Writer(files, texts, samples=10, temperature=0.7, top_p=0.9, code=limits)
    outcome = TASKS["humaneval-x-python"].function(env)
    assert list(outcome.metrics) == ["pass@1", "pass@10"]
    assert outcome.metrics["pass@1"].items == pytest.approx([0.3, 0.0])
    assert outcome.metrics["pass@10"].items == [1.0, 0.0]
    assert outcome.metrics["pass@1"].value == pytest.approx(0.15)
    assert outcome.more == {
        "samples": 10,
        "failures/wrong answer": 15,
        "failures/compile error": 2,
        **{f"failures/{kind}": 0 for kind in ("runtime error", "timeout", "memory", "processes")},
        "skipped": 0,
    }
    asked = env.asked[0]
    assert asked["prompts"] == [ADD["python"]["prompt"]] * 2  # no template around it
    assert (asked["samples"], asked["temperature"], asked["top_p"]) == (10, 0.7, 0.9)
    assert asked["max_new_tokens"] == code.NEW_TOKENS and "\ndef" in asked["stop"]


def test_one_sample_is_greedy_and_has_no_pass_at_10(tmp_path: Path, limits: CodeSettings) -> None:
    env = Writer(_write(tmp_path, "python", [ADD["python"]]), [["    return y + x"]], code=limits)
    outcome = TASKS["humaneval-x-python"].function(env)
    assert {name: scored.items for name, scored in outcome.metrics.items()} == {"pass@1": [1.0]}
    assert env.asked[0]["temperature"] == 0.0


def test_a_language_without_a_compiler_is_skipped_and_not_zero(
    tmp_path: Path, limits: CodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {}
    for name in LANGUAGES:
        files |= _write(tmp_path, name, [ADD[name]])
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    alone = TASKS["humaneval-x-go"].function(Writer(files, [["}"]], code=limits))
    assert alone.metrics == {} and alone.more["skipped"] == 1
    assert alone.notes[0] == "go: 1 problems skipped: there is no go on this machine."
    env = Writer(files, [["    return x + y\n"]], code=limits)
    every = TASKS["humaneval-x"].function(env)
    assert every.metrics["pass@1"].items == [1.0]  # Python needs no other tool
    assert (every.more["pass@1/python"], every.more["skipped"]) == (1.0, 3)
    assert "pass@1/go" not in every.more and len(env.asked) == 1
    assert TASKS["humaneval-x"].scorer().endswith("go skipped: there is no go on this machine")


def test_a_compiler_that_is_too_old_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.evaluation import compilers

    monkeypatch.setattr(compilers, "version_line", lambda tool, *arguments: "javac 11.0.2")
    with pytest.raises(Missing, match=r"need version 16\.0 or newer, this is javac 11"):
        compilers.java_version()
    monkeypatch.setattr(compilers, "version_line", lambda tool, *arguments: "go version go1.9.7 linux/amd64")
    with pytest.raises(Missing, match=r"need version 1\.18"):
        compilers.go_version()


def test_a_problem_whose_header_is_not_there_is_skipped(tmp_path: Path, limits: CodeSettings) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ on this machine")
    other = {**ADD["cpp"], "task_id": "CPP/other", "prompt": "#include<no/such.h>\n" + ADD["cpp"]["prompt"]}
    env = Writer(_write(tmp_path, "cpp", [ADD["cpp"], other]), [["    return x + y;\n}"]], code=limits)
    outcome = TASKS["humaneval-x-cpp"].function(env)
    assert outcome.metrics["pass@1"].items == [1.0] and outcome.more["skipped"] == 1
    assert outcome.notes == ("CPP/other skipped: this machine has not the header no/such.h.",)


def test_missing_isolation_is_written_beside_the_score(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("generated code is run on Linux only")
    env = Writer(
        _write(tmp_path, "python", [ADD["python"]]),
        [["    return x + y"]],
        code=CodeSettings(isolation="none"),
    )
    outcome: Outcome = TASKS["humaneval-x-python"].function(env)
    assert outcome.metrics["pass@1"].items == [1.0]
    assert outcome.notes == (
        "programs ran without isolation from network and files (evaluation.code.isolation).",
    )


def test_where_isolation_is_not_permitted_nothing_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sandbox, "run_child", lambda job, patience: {"refused": "unshare: Operation not permitted"}
    )
    env = Writer(_write(tmp_path, "python", [ADD["python"]]), [["    return x + y"]])
    with pytest.raises(InputError, match="cannot be isolated"):
        TASKS["humaneval-x-python"].function(env)
    assert env.asked == []


def test_a_file_without_tests_is_an_error(tmp_path: Path, limits: CodeSettings) -> None:
    files = _write(tmp_path, "go", [{"task_id": "Go/0", "prompt": "func A() {"}])
    with pytest.raises(InputError, match=r"go\.jsonl, line 1: .*test is missing"):
        TASKS["humaneval-x-go"].function(Writer(files, [], code=limits))
