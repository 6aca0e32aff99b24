"""Answers in C++, Java and Go that attack what judges them. Each is a wrong answer, and none may pass."""

from __future__ import annotations

import pytest
from code_attacks import MARK, NONCE, PROBLEMS, finished, judge, of_the_sandbox

from fedtune.errors import InputError
from fedtune.evaluation import sandbox
from fedtune.evaluation.code import verdicts
from fedtune.evaluation.compilers import Toolchain
from fedtune.evaluation.languages import LANGUAGES
from fedtune.evaluation.sandbox import CodeSettings, Step


@pytest.fixture(scope="module")
def limits() -> CodeSettings:
    return of_the_sandbox()


# C++: the answer is called in a copy of the process that has its tests

CPP_ATTACKS = {
    "prints the old mark": f'puts("\\n{MARK}"); fflush(stdout); _Exit(0);',
    "exits": "exit(0);",
    "exits at the end": "atexit([] { _Exit(0); }); at_quick_exit([] { _Exit(0); }); return x;",
    "exits quickly": "quick_exit(0);",
    "exits without the library": 'asm("mov $60, %eax; xor %edi, %edi; syscall"); return x;',
    "returns the nonce": (
        'char a[99] = "x"; fgets(a, 99, stdin);\n'
        '    FILE* f = fopen("/proc/self/fd/3", "w"); if (f) fputs(a, f); exit(0);'
    ),
    "says that it passed": "fedtune_apart::passed(); _Exit(0);",
    "is main": "extern int main(); return main();",
    "opens what the tests have open": (
        'char a[99]; sprintf(a, "/proc/%d/fd/0", getppid()); FILE* f = fopen(a, "r");\n'
        '    if (f) { puts("opened"); } sprintf(a, "/proc/%d/fd/3", getppid());\n'
        '    if (fopen(a, "w")) { puts("opened"); }\n'
        '    sprintf(a, "/proc/%d/mem", getppid()); if (fopen(a, "r+")) puts("opened"); return x;'
    ),
    "catches what ends it": "signal(SIGABRT, [](int) { _Exit(0); }); raise(SIGABRT); return x;",
    "kills its tests": "kill(getppid(), SIGTERM); return x;",
    "tells a value that is too short": (
        "for (int p = 3; p < 30; p++) { long n = 2; if (write(p, &n, 8) + write(p, &n, 2)) {} } _Exit(0);"
    ),
}


@pytest.mark.parametrize("attack", CPP_ATTACKS)
def test_no_answer_in_cpp_passes_without_the_right_values(
    attack: str, cpp: Toolchain, limits: CodeSettings
) -> None:
    done = finished("cpp", cpp, f"    {CPP_ATTACKS[attack]}\n}}\n", limits, seconds=20.0)
    assert len(done) == 2 and not done[-1].sealed and "opened" not in done[-1].output
    assert LANGUAGES["cpp"].verdict(done, 2) != "passed"


def test_what_cpp_returns_crosses_as_it_is(cpp: Toolchain, limits: CodeSettings) -> None:
    values = {
        "vector<vector<int> >": "{{1, -2}, {}, {2147483647}}",
        "map<char, string>": "{{'a', string(\"x\\0y\", 3)}, {'\\0', \"\"}}",
        "pair<bool, set<long long> >": "{true, {1LL << 40, 0}}",
        "list<float>": "{0.1f, -1e30f}",
        "vector<bool>": "{true, false}",
        "string": "string(200000, 'x')",
        "double": "0.1",
    }
    headers = "".join(f"#include<{name}>\n" for name in ("list", "map", "set", "string", "vector"))
    for kind, value in values.items():
        prompt = f"{headers}using namespace std;\n{kind} same(int x){{\n"
        main = f"int main(){{\n    {kind} wanted = {value}; assert (same(1) == wanted);\n}}\n"
        test = f"#undef NDEBUG\n#include<assert.h>\n{main}"
        problem = {"task_id": "CPP/same", "prompt": prompt, "test": test}
        programs = [
            (problem, LANGUAGES["cpp"].program(problem, f"    {kind} a = {each};\n    return a;\n}}\n"))
            for each in (value, f"{kind}()")
        ]
        assert verdicts(LANGUAGES["cpp"], cpp, programs, limits) == ["passed", "wrong answer"], kind


def test_a_prompt_without_a_function_of_cpp_is_an_error() -> None:
    with pytest.raises(InputError, match="CPP/odd: the prompt has no line that begins a function"):
        LANGUAGES["cpp"].program({**PROBLEMS["cpp"], "task_id": "CPP/odd", "prompt": "int x;\n"}, "")


@pytest.mark.parametrize(
    "body",
    [
        "    return x;\n#define main(...) main() { fedtune_apart::passed(); } int other()\n}\n",
        "    return x;\n}\nint early = (fedtune_apart::passed(), _exit(0), 1);\n",
    ],
    ids=["a macro", "a constructor"],
)
def test_what_the_description_says_can_be_forged_in_cpp_can_be(
    body: str, cpp: Toolchain, limits: CodeSettings
) -> None:
    assert judge("cpp", cpp, [body], limits) == ["passed"]


# Java, Go: the answer is in one process with its tests

JAVA_ATTACKS = [
    f'System.out.println("\\n{MARK}"); System.exit(0); return x;',
    "Runtime.getRuntime().halt(0); return x;",
    "Thread.setDefaultUncaughtExceptionHandler((t, e) -> Runtime.getRuntime().halt(0)); return x;",
    "try { byte[] a = System.in.readAllBytes();\n"
    '    new java.io.FileOutputStream("/proc/self/fd/3").write(a); } catch (Exception e) {}\n'
    "System.exit(0); return x;",
    "System.setIn(null); Main.main(null); return 6;",
]
GO_ATTACKS = [
    f'println("\\n{MARK}\\nPASS"); main(); return x',
    "testing.Main(func(a, b string) (bool, error) { return true, nil }, nil, nil, nil); return x",
    "panic(nil)",
]


@pytest.mark.slow
def test_no_answer_in_java_passes_by_ending_early(java: Toolchain, limits: CodeSettings) -> None:
    found = judge("java", java, [f"        {text}\n    }}\n}}\n" for text in JAVA_ATTACKS], limits)
    assert "passed" not in found and "compile error" not in found


@pytest.mark.slow
def test_no_answer_in_go_passes_by_ending_early(go: Toolchain, limits: CodeSettings) -> None:
    found = judge("go", go, [f"    {text}\n}}\n" for text in GO_ATTACKS], limits)
    assert found == ["runtime error"] * len(GO_ATTACKS)


# Each looks for the nonce without having it, and prints how many there are.
CPP_HUNT = """
    char text[256], beyond[64]; int count = 0;
    FILE* maps = fopen("/proc/self/maps", "r");
    if (!maps) puts("no maps");
    while (maps && fgets(text, 256, maps)) {
        unsigned long from, to; char may;
        if (sscanf(text, "%lx-%lx %c", &from, &to, &may) != 3 || may != 'r' || strstr(text, "[v")) continue;
        for (char* at = (char*)from; at + 32 < (char*)to; at++) {
            int letters = 0;
            while (letters < 32 && at[letters] == "c0ffee"[letters % 6]) letters++;
            count += letters == 32;
        }
    }
    printf("found %d %d\\n", count, (int)fread(beyond, 1, 32, stdin)); fflush(stdout);
"""


def test_no_answer_in_cpp_has_the_nonce_in_its_memory(
    cpp: Toolchain, limits: CodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda size: NONCE)
    done = finished("cpp", cpp, f"{CPP_HUNT}    return x;\n}}\n", limits, seconds=20.0)
    assert done[1].output.startswith(("found 0 0\n", "no maps\n")) and not done[1].sealed
    whole = (
        "#include<stdio.h>\n#include<string.h>\n"
        "int main(){ char n[32]; if (!fread(n, 1, 32, stdin)) return 1;\n"
        f"{CPP_HUNT} return n[0]; }}\n"
    )
    steps = [Step(("g++", "-O0", "a.cpp", "-o", "a"), 60.0, 2048), Step(("./a",), 20.0, 512)]
    done = sandbox.run({"a.cpp": whole}, steps, isolation="namespaces")
    assert int(done[1].output.split()[1]) > 0
