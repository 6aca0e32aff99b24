"""The compilers and interpreters of HumanEval-X as this machine has them, and the commands for a program.

C++ is compiled as C++11 and Go as Go 1.18, as in the evaluation published with the data. Boost's `any` and
testify's `assert` have stand-ins of our own where the machine has none (`standins/`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.core.temporary import temporary_folder
from fedtune.evaluation.sandbox import CodeSettings, Step

Problem = Mapping[str, Any]  # one line of the data

COMPILE_SECONDS = 60.0
COMPILE_MB = 2048
STANDINS = Path(__file__).with_name("standins")
GO_IMPORTS = (
    *("math", "strings", "fmt", "strconv", "time", "bytes", "regexp", "sort", "math/rand", "crypto/md5"),
)


class Missing(Exception):
    """What a language needs is not on this machine."""


@dataclass(frozen=True)
class Job:
    """What `sandbox.run` is given."""

    files: Mapping[str, str]
    steps: tuple[Step, ...]
    readable: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Toolchain:
    """Compiler and interpreter as they are on this machine.

    Attributes:
        job: From a source text, and a problem, to what is run.
        lacks: What a problem needs and this machine has not, for people; "" for nothing.
    """

    job: Callable[[Problem, str, CodeSettings], Job]
    lacks: Callable[[Problem], str] = lambda problem: ""


def version_line(tool: str, *arguments: str) -> str:
    """The first line that a tool prints about itself."""
    done = subprocess.run([_find(tool), *arguments], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise Missing(f"{tool} does not work: {(done.stderr or done.stdout).strip()[:200]}")
    return (done.stdout or done.stderr).split("\n")[0].strip()


def _find(tool: str) -> str:
    if (path := shutil.which(tool)) is None:
        raise Missing(f"there is no {tool} on this machine")
    return path


def _home(tool: str) -> Path:
    """The folder that a tool is installed in: the parent of its bin."""
    return Path(os.path.realpath(_find(tool))).parents[1]


def _at_least(version: str, least: tuple[int, int]) -> None:
    found = re.search(r"(\d+)(?:\.(\d+))?", version)
    if not found or (int(found[1]), int(found[2] or 0)) < least:
        raise Missing(f"the problems need version {least[0]}.{least[1]} or newer, this is {version}")


def python_version() -> str:
    """Name and version of the interpreter."""
    return f"Python {platform.python_version()}"


@contextmanager
def python() -> Iterator[Toolchain]:
    """The interpreter that runs fedtune, with its NumPy and nothing else of its packages."""
    spec = importlib.util.find_spec("numpy")
    assert spec is not None and spec.origin is not None  # torch's own requirement
    packages = Path(spec.origin).parents[1]
    readable = (Path(sys.base_prefix), packages / "numpy", packages / "numpy.libs")
    variables = {"PYTHONPATH": str(packages), "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    # not the virtual environment's own name for it, whose other packages are not there
    command = (os.path.realpath(sys.executable), "-B", "-s", "-P", "main.py")

    def job(problem: Problem, source: str, settings: CodeSettings) -> Job:
        step = Step(command, settings.seconds, settings.memory_mb, environment=variables)
        return Job({"main.py": source}, (step,), readable)

    yield Toolchain(job)


def cpp_version() -> str:
    """Name and version of the compiler. Raises Missing."""
    return version_line("g++", "--version")


@contextmanager
def cpp() -> Iterator[Toolchain]:
    """The compiler of GNU. Raises Missing."""
    compiler = _find("g++")
    home = _home("g++")
    standins = {"standins/boost/any.hpp": (STANDINS / "any.hpp").read_text(encoding="utf-8")}

    def job(problem: Problem, source: str, settings: CodeSettings) -> Job:
        libraries = ("-lcrypto",) if "<openssl/" in source else ()
        options = ("-std=c++11", "-w", "-idirafter", "standins", "main.cpp", "-o", "main", *libraries)
        steps = (
            Step((compiler, *options), COMPILE_SECONDS, COMPILE_MB),
            Step(("./main",), settings.seconds, settings.memory_mb),
        )
        return Job({"main.cpp": source, **standins}, steps, (home,))

    @functools.cache
    def compiles(header: str) -> bool:
        command = [compiler, "-std=c++11", "-fsyntax-only", "-x", "c++", "-"]
        text = f"#include<{header}>\n"
        return subprocess.run(command, input=text, text=True, capture_output=True).returncode == 0

    def lacks(problem: Problem) -> str:
        headers = re.findall(r"#\s*include\s*<([\w.+-]+/[\w./+-]+)>", problem["prompt"])
        gone = [name for name in headers if name != "boost/any.hpp" and not compiles(name)]
        return f"the header {gone[0]}" if gone else ""

    yield Toolchain(job, lacks)


def java_version() -> str:
    """Name and version of the compiler. Raises Missing."""
    version = version_line("javac", "-version")
    _at_least(version, (16, 0))  # Java/151 matches patterns with instanceof
    return version


@contextmanager
def java() -> Iterator[Toolchain]:
    """A Java development kit. Raises Missing."""
    java_version()
    compiler, machine = _find("javac"), _find("java")
    # few threads and little beside the heap, whatever the machine
    common = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-XX:ActiveProcessorCount=2")
    options = (f"-J-Xmx{COMPILE_MB // 2}m", *(f"-J{option}" for option in common))

    def job(problem: Problem, source: str, settings: CodeSettings) -> Job:
        compile_ = (compiler, *options, "-encoding", "UTF-8", "-nowarn", "-proc:none", "Main.java")
        run = (machine, f"-Xmx{settings.memory_mb * 3 // 4}m", *common, "-ea", "Main")
        steps = (
            Step(compile_, COMPILE_SECONDS, COMPILE_MB, address_space=False),
            Step(run, settings.seconds, settings.memory_mb, address_space=False),
        )
        return Job({"Main.java": source}, steps, (_home("java"), _home("javac")))

    yield Toolchain(job)


def go_version() -> str:
    """Name and version of the compiler. Raises Missing."""
    version = version_line("go", "version").removeprefix("go version ")
    _at_least(version, (1, 18))
    return version


@contextmanager
def go() -> Iterator[Toolchain]:
    """Compiles what programs may import, once; later only the program itself, without the go command.

    That command writes to a cache of compiled packages, which programs must not share. Raises Missing.
    """
    go_version()
    with temporary_folder() as name:
        folder = Path(os.path.realpath(name))
        packages = _go_packages(folder)
        compiler, linker = (_go_command(folder, "tool", "-n", tool).strip() for tool in ("compile", "link"))
        readable = (packages.parent, Path(os.path.realpath(compiler)).parent)
        listed = ("-importcfg", str(packages))

        def job(problem: Problem, source: str, settings: CodeSettings) -> Job:
            tests = ", ".join(
                f'{{"{name}", {name}}}' for name in re.findall(r"(?m)^func (Test\w*)\(", problem["test"])
            )
            main = (
                'package main\n\nimport "testing"\n\nfunc main() {\n'
                "\ttesting.Main(func(_, _ string) (bool, error) { return true, nil },\n"
                f"\t\t[]testing.InternalTest{{{tests}}}, nil, nil)\n}}\n"
            )
            options = ("-p", "main", "-lang=go1.18", *listed, "-o", "main.a", "program.go", "main.go")
            own = {"GOMAXPROCS": "2"}
            steps = (
                Step((compiler, *options), COMPILE_SECONDS, COMPILE_MB, address_space=False, environment=own),
                Step(
                    (linker, *listed, "-s", "-o", "main", "main.a"),
                    COMPILE_SECONDS,
                    COMPILE_MB,
                    address_space=False,
                    environment=own,
                ),
                Step(("./main",), settings.seconds, settings.memory_mb, address_space=False, environment=own),
            )
            return Job({"program.go": source, "main.go": main}, steps, readable)

        yield Toolchain(job)


def _go_packages(folder: Path) -> Path:
    """Compiles the packages that programs may import into a folder; returns the list that compilers read."""
    module = "github.com/stretchr/testify"
    (folder / "testify" / "assert").mkdir(parents=True)
    (folder / "testify" / "go.mod").write_text(f"module {module}\n\ngo 1.18\n", encoding="utf-8")
    shutil.copy(STANDINS / "assert.go", folder / "testify" / "assert" / "assert.go")
    (folder / "go.mod").write_text(
        f"module packages\n\ngo 1.18\n\nrequire {module} v0.0.0\n\nreplace {module} => ./testify\n",
        encoding="utf-8",
    )
    names = (*GO_IMPORTS, "testing", f"{module}/assert")
    imports = "".join(f'import _ "{name}"\n' for name in names)
    (folder / "packages.go").write_text(f"package packages\n\n{imports}", encoding="utf-8")
    form = "{{if .Export}}{{.ImportPath}}={{.Export}}{{end}}"
    lines = _go_command(folder, "list", "-export", "-deps", "-f", form, ".").split()
    compiled = folder / "compiled"
    compiled.mkdir()
    listed = []
    for place, line in enumerate(lines):
        package, _, archive = line.partition("=")
        shutil.copy(archive, compiled / f"{place}.a")  # out of a cache that others may empty
        listed.append(f"packagefile {package}={compiled / f'{place}.a'}\n")
    (compiled / "packages.txt").write_text("".join(listed), encoding="utf-8")
    return compiled / "packages.txt"


def _go_command(folder: Path, *arguments: str) -> str:
    """Runs the go command on texts of ours, offline."""
    offline = {"GOFLAGS": "-mod=mod", "GOPROXY": "off", "GOTOOLCHAIN": "local", "GOWORK": "off"}
    cache = {} if "HOME" in os.environ or "GOCACHE" in os.environ else {"GOCACHE": str(folder / "cache")}
    done = subprocess.run(
        [_find("go"), *arguments],
        cwd=folder,
        env={**os.environ, **offline, **cache, "CGO_ENABLED": "0"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise Missing(f"go {arguments[0]} does not work: {done.stderr.strip()[:300]}")
    return done.stdout
