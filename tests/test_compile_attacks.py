"""Answers that attack the compiler: it runs in the sandbox too, with limits of its own.

Go's are tried where a Go compiler is; the others on any machine with g++ and javac.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from toolchains import need_namespaces

from fedtune.evaluation import sandbox
from fedtune.evaluation.compilers import Problem, Toolchain
from fedtune.evaluation.languages import LANGUAGES
from fedtune.evaluation.sandbox import CodeSettings, Finished, Step

CPP: Problem = {
    "task_id": "CPP/twice",
    "prompt": "#include<stdio.h>\nusing namespace std;\nint twice(int x){\n",
    "test": "#undef NDEBUG\n#include<assert.h>\nint main(){\n    assert (twice(3)==6);\n}\n",
}
JAVA: Problem = {
    "task_id": "Java/twice",
    "prompt": "import java.util.*;\n\nclass Solution {\n    public int twice(int x) {\n",
    "test": (
        "public class Main {\n    public static void main(String[] args) {\n"
        "        if (new Solution().twice(3) != 6) throw new AssertionError();\n    }\n}\n"
    ),
}
GO: Problem = {
    "task_id": "Go/twice",
    "prompt": "func Twice(x int) int {\n",
    "import": "",
    "test_setup": 'package main\n\nimport (\n    "testing"\n    "github.com/stretchr/testify/assert"\n)\n',
    "test": "func TestTwice(t *testing.T) {\n    assert := assert.New(t)\n    assert.Equal(6, Twice(3))\n}\n",
}
SECONDS = 6.0  # instead of a compiler's 60


@pytest.fixture(scope="module", autouse=True)
def isolated() -> None:
    need_namespaces()


def compiled(
    name: str, tools: Toolchain, problem: Problem, body: str, seconds: float = SECONDS
) -> list[Finished]:
    """How the commands for one answer ended, none of which gets more than some seconds."""
    limits = CodeSettings(seconds=seconds, memory_mb=512)
    job = tools.job(problem, LANGUAGES[name].program(problem, body), limits)
    steps: list[Step] = [replace(step, seconds=min(step.seconds, seconds)) for step in job.steps]
    return sandbox.run(job.files, steps, isolation="namespaces", readable=job.readable)


def marker(folder: Path) -> Path:
    """A file of the user, open to all."""
    folder.chmod(0o755)
    path = folder / "private.txt"
    path.write_text("hunter2 hunter2\n")
    path.chmod(0o644)
    return path


@pytest.mark.parametrize(
    "line",
    [
        '#include "{private}"',
        '#include "/etc/passwd"',
        '#include "/etc/hostname"',
        '#include "/proc/1/environ"',
        '#include "/proc/1/cmdline"',
        '#include "/proc/self/environ"',
        '#include "/proc/self/fd/0"',
        '#include_next "../../../..{private}"',
        'asm(".incbin \\"{private}\\"");',
        'asm(".include \\"{private}\\"");',
        'asm(".incbin \\"/etc/passwd\\"");',
        "#pragma GCC plugin {private}",
        '#pragma GCC optimize ("-fplugin={private}")',
        "#pragma GCC poison main",
        '#pragma GCC dependency "{private}"',
    ],
)
def test_a_cpp_answer_compiles_nothing_from_outside(line: str, cpp: Toolchain, tmp_path: Path) -> None:
    done = compiled(
        "cpp", cpp, CPP, f"    return x;\n{line.replace('{private}', str(marker(tmp_path)))}\n}}\n"
    )
    assert not done[-1].sealed
    for text in ("hunter2", "root:", os.uname().nodename, *os.environ.get("HOME", "").split()):
        assert not any(text in each.output for each in done), text


def test_the_nonce_of_a_compiler_is_not_that_of_its_program(cpp: Toolchain) -> None:
    """It takes in what the compiler has at its standard input, and sends that."""
    body = """
    asm(".pushsection .rodata; got: .incbin \\"/proc/self/fd/0\\"; .popsection");
    const char* nonce; asm("lea got(%%rip), %0" : "=r"(nonce));
    FILE* f = fopen("/proc/self/fd/3", "w"); fwrite(nonce, 1, 32, f); fclose(f);
    _Exit(0);
}
"""
    done = compiled("cpp", cpp, CPP, body)
    assert not any(each.sealed for each in done)


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        '    return x;\n#include "/dev/zero"\n}\n',
        '    return x;\n#include "/dev/urandom"\n}\n',
        '    return x;\n#include "/dev/full"\n}\n',
        '    asm(".incbin \\"/dev/zero\\""); return x;\n}\n',
        '    asm(".fill 0x7fffffffffff"); return x;\n}\n',
        '    asm(".rept 2000000000\\n.quad 1, 2, 3, 4, 5, 6, 7, 8\\n.endr"); return x;\n}\n',
        "    static char a[1UL << 36] = {1}; return a[x];\n}\n",
        "    static char a[100UL << 20] = {1}; return a[x];\n}\n",
        '    return x;\n#include "main.cpp"\n#include "main.cpp"\n}\n',
        "    return x; }\ntemplate<int n, int m> struct Tree { enum { v = Tree<n - 1, 2 * m>::v + "
        "Tree<n - 1, 2 * m + 1>::v }; };\ntemplate<int m> struct Tree<0, m> { enum { v = 1 }; };\n"
        "int a = Tree<28, 1>::v;\n",
        "    return x; }\nconstexpr long f(long n, long k) "
        "{ return n ? f(n - 1, 2 * k) + f(n - 1, 2 * k + 1) : k; }\nconstexpr long a = f(50, 1);\n",
        "    return x; }\n"
        + "".join(f"#define {b} {','.join([a] * 10)}\n" for a, b in zip("aABCDEFG", "ABCDEFGH", strict=True))
        + "int a, b[] = {H,H,H,H,H};\n",
    ],
    ids=(
        *("zero", "random", "full", "incbin", "fill", "repeat", "huge array", "array", "itself", "templates"),
        *("constants", "macros"),
    ),
)
def test_a_cpp_compiler_that_is_made_to_work_is_stopped(body: str, cpp: Toolchain) -> None:
    done = compiled("cpp", cpp, CPP, body, seconds=3.0)
    assert len(done) == 1 and not done[0].ok and not done[0].sealed
    assert len(done[0].output) <= sandbox.MAX_OUTPUT_BYTES
    assert LANGUAGES["cpp"].verdict(done, 2) in ("compile error", "timeout", "memory")


@pytest.mark.slow
def test_java_compiles_and_runs_nothing_while_it_compiles(java: Toolchain, tmp_path: Path) -> None:
    """A processor of annotations, a static initialiser, letters that close the class; all print when run."""
    processor = (
        "        return x;\n    }\n}\n"
        "class Processor extends javax.annotation.processing.AbstractProcessor {\n"
        '    static { System.err.println("ran"); }\n'
        "    public boolean process(Set<? extends javax.lang.model.element.TypeElement> a,\n"
        "        javax.annotation.processing.RoundEnvironment e) { return false; }\n}\n"
    )
    initialiser = (
        '        return x;\n    }\n    static { System.err.println("ran"); }\n'
        "    static final String A = new Object() { String f() { "
        'System.err.println("ran"); return ""; } }.f();\n}\n'
    )
    for body in (processor, initialiser):
        done = compiled("java", java, JAVA, body)
        assert done[0].ok and "ran" not in done[0].output and not done[-1].sealed


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        '        return x;\n    }\n    static final String A = "'
        + "x" * 1000
        + '";\n'
        + "".join(
            f"    static final String {b} = {'+'.join([a] * 10)};\n"
            for a, b in zip("ABCDEFG", "BCDEFGH", strict=True)
        )
        + "    static final int Z = H.length();\n}\n",
        "        return x;\n    }\n    static long[] a = {"
        + ",".join(map(str, range(3_000_000_000, 3_000_020_000)))
        + "};\n}\n",
        "        int[] a = " + "{" * 3000 + "}" * 3000 + "; return x;\n    }\n}\n",
        "        return " + "(" * 20_000 + "x" + ")" * 20_000 + ";\n    }\n}\n",
    ],
    ids=["constants", "constant pool", "braces", "parentheses"],
)
def test_a_java_compiler_that_is_made_to_work_is_stopped(body: str, java: Toolchain) -> None:
    done = compiled("java", java, JAVA, body)
    assert not done[-1].sealed and len(done) == 1
    assert LANGUAGES["java"].verdict(done, 2) in ("compile error", "timeout", "memory")


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        '    return x\n}\n\nimport _ "embed"\n\n//go:embed main.go\nvar Text string\n',
        '    return x\n}\n\nimport "C"\n',
        '    return x\n}\n\n// #cgo CFLAGS: -fplugin=x.so\n// #include "/etc/passwd"\nimport "C"\n',
        '    return x\n}\n\nimport _ "unsafe"\n\n//go:linkname exit os.Exit\nfunc exit(int)\n',
        "    return x\n}\n\n//go:linkname exit os.Exit\nfunc exit(int)\n\nfunc init() { exit(0) }\n",
        "    return x\n}\n\nfunc main() {}\n",
        "    var a [1 << 46]byte; return int(a[x])\n}\n",
        "    const a = 1 << (1 << 40); return a >> (1 << 40)\n}\n",
    ],
    ids=["embed", "cgo", "cgo flags", "unsafe", "linkname", "main", "array", "constant"],
)
def test_a_go_answer_compiles_nothing_but_itself(body: str, go: Toolchain) -> None:
    done = compiled("go", go, GO, body)
    assert not done[-1].sealed and not done[-1].ok and "root:" not in done[-1].output


def test_a_header_that_lies_elsewhere_is_one_that_is_not_there(cpp: Toolchain) -> None:
    for name in ("../../../../dev/zero", "sys/../../../../dev/zero", "no/such.h"):
        assert cpp.lacks({**CPP, "prompt": f"#include <{name}>\n"}) == f"the header {name}"
    assert cpp.lacks({**CPP, "prompt": "#include <sys/types.h>\n"}) == ""
