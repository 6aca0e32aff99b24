"""Plants single-line mistakes at random places and says which of them no test sees.

    COVERAGE_FILE=w/cov pytest -n 2 --cov=fedtune --cov-context=test --cov-report= --junitxml=w/junit.xml
    python scripts/mutants.py map w/cov w/junit.xml w/map.json
    python scripts/mutants.py run w/map.json w/result.json --seed 1 --count 100

The first line needs pytest-cov. The map says which tests run which line, and how long they take. `run` works
on copies of the tree, two mistakes at a time, so that the files here stay as they are; for each mistake it
runs the tests that reach its line, the quickest first, until one fails. A test that fails here without any
mistake too catches nothing, and is left out. `--judged FILE` (JSON, mistake: reason) names mistakes that
change nothing.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("core", "methods", "models", "data", "protection")
PRELOADED = ("torch", "transformers", "peft", "numba", "hypothesis", "pytest")  # once, for all children
OPERATORS = {
    ast.Lt: "<= >", ast.LtE: "< >=", ast.Gt: ">= <", ast.GtE: "> <=", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is_not", ast.IsNot: "is", ast.In: "not_in", ast.NotIn: "in",
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/ +", ast.Div: "* //", ast.FloorDiv: "/", ast.Mod: "//",
    ast.Pow: "*", ast.BitOr: "&", ast.BitAnd: "|",
}  # fmt: skip
OTHER_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "sum": "max"}
OUTCOMES = {0: "survived", 4: "not run", 5: "not run"}  # by pytest's status: no such test, or none
WITHOUT_EFFECT = ("strict", "encoding", "errors", "separators")  # arguments that say what holds anyway

Edit = tuple[int, int, int, str]  # line, first and last column in bytes, new text


def edits(source: str) -> Iterator[Edit]:
    """All single-line mistakes of a module."""
    lines = source.splitlines()
    skipped: set[ast.AST] = set()

    def between(left: ast.AST, right: ast.AST, text: str) -> Edit | None:
        """Puts an operator between two operands; what stands around it there (a bracket) stays."""
        if left.end_lineno != right.lineno:
            return None
        old = lines[right.lineno - 1].encode()[left.end_col_offset : right.col_offset].decode()
        sign = old.strip("() ")
        at = left.end_col_offset + old.index(sign)
        return right.lineno, at, at + len(sign), text.replace("_", " ")

    def instead(node: ast.AST, text: str) -> Edit | None:
        one_line = node.lineno == node.end_lineno
        return (node.lineno, node.col_offset, node.end_col_offset, text) if one_line else None

    def of(node: ast.AST) -> Iterator[Edit | None]:
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                yield from (between(left, right, text) for text in OPERATORS[type(op)].split())
            case ast.BinOp(left=left, op=op, right=right):
                yield from (between(left, right, text) for text in OPERATORS.get(type(op), "").split())
                yield from (instead(node, f"({ast.unparse(kept)})") for kept in (left, right))
            case ast.BoolOp(op=op, values=values):
                word = "or" if isinstance(op, ast.And) else "and"
                yield from (between(a, b, word) for a, b in pairwise(values))
                yield from (instead(node, ast.unparse(value)) for value in values[:2])
            case ast.UnaryOp(operand=operand):
                yield instead(node, ast.unparse(operand))
            case ast.If(test=test) | ast.While(test=test):
                yield instead(test, f"not ({ast.unparse(test)})")
            case ast.IfExp(test=test, body=body, orelse=other):
                yield instead(test, f"not ({ast.unparse(test)})")
                yield from (instead(node, f"({ast.unparse(kept)})") for kept in (body, other))
            case ast.comprehension(ifs=[test]):
                yield instead(test, "True")
            case ast.Constant(value=bool(value)):
                yield instead(node, str(not value))
            case ast.Constant(value=int(value)):
                yield from (
                    instead(node, str(other) if other >= 0 else "(-1)") for other in (value + 1, value - 1)
                )
            case ast.Constant(value=float(value)):
                yield from (instead(node, repr(value * times + (not value))) for times in (0.5, 2.0))
            case ast.Call(func=ast.Name(id=name)) if name in OTHER_NAMES:
                yield instead(node.func, OTHER_NAMES[name]) if not node.keywords else None
                yield from dropped(node)
            case ast.Call():
                yield from dropped(node)
            case ast.List(elts=parts, ctx=ast.Load()) | ast.Tuple(elts=parts, ctx=ast.Load()) if (
                len(parts) > 2
            ):
                yield instead(parts[-1], "*[]")
            case ast.Slice(lower=lower, upper=upper):
                yield from (instead(end, f"({ast.unparse(end)}) + 1") for end in (lower, upper) if end)
                yield instead(lower, "") if lower else None
            case ast.Expr(value=ast.Call()) | ast.AugAssign():
                yield instead(node, "pass")
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                yield instead(node, "pass")
            case ast.Break() | ast.Continue():
                yield instead(node, "continue" if isinstance(node, ast.Break) else "break")

    def dropped(call: ast.Call) -> Iterator[Edit | None]:
        """An argument less, or two in the other order."""
        plain = call.args
        for first, second in pairwise(plain):
            if first.lineno == second.end_lineno and type(first) is type(second):
                swapped = f"{ast.unparse(second)}, {ast.unparse(first)}"
                yield first.lineno, first.col_offset, second.end_col_offset, swapped
        yield from (instead(word, "**{}") for word in call.keywords if word.arg not in WITHOUT_EFFECT)

    tree = ast.parse(source)
    for node in ast.walk(tree):  # messages, annotations and what only the type checker runs
        kinds = getattr(node, "annotation", None), getattr(node, "returns", None)
        match node:
            case ast.Raise() | ast.JoinedStr() | ast.If(test=ast.Name(id="TYPE_CHECKING")):
                silent = True
            case ast.Call(func=ast.Name(id=name)):
                silent = name in ("cast", "TypeVar")
            case _:
                silent = isinstance(node, ast.keyword) and node.arg in WITHOUT_EFFECT
        for part in (*kinds, node if silent else None):
            skipped.update(ast.walk(part) if part else ())
    for node in ast.walk(tree):
        if node not in skipped:
            yield from (edit for edit in of(node) if edit is not None)


def planted(source: str, edit: Edit) -> str:
    """The module with the mistake in it."""
    line, first, last, text = edit
    lines = source.splitlines(keepends=True)
    raw = lines[line - 1].encode()
    lines[line - 1] = (raw[:first] + text.encode() + raw[last:]).decode()
    return "".join(lines)


def draw(seed: int, count: int) -> Iterator[tuple[str, Edit, str]]:
    """Mistakes at random lines: file, edit and the new text of the file. Every line with any is as likely."""
    by_line: dict[tuple[str, int], list[Edit]] = {}
    for path in sorted(path for part in PARTS for path in (ROOT / "fedtune" / part).rglob("*.py")):
        for edit in edits(path.read_text(encoding="utf-8")):
            by_line.setdefault((str(path.relative_to(ROOT)), edit[0]), []).append(edit)
    chance = random.Random(seed)
    places = sorted(by_line)
    chance.shuffle(places)
    for place in places:
        source, edit = (ROOT / place[0]).read_text(encoding="utf-8"), chance.choice(by_line[place])
        try:
            changed = ast.dump(ast.parse(mutant := planted(source, edit))) != ast.dump(ast.parse(source))
        except SyntaxError:
            continue
        if changed:
            yield place[0], edit, mutant
            count -= 1
            if not count:
                return


def write_map(coverage: str, junit: str, result: str) -> None:
    """Turns what coverage and pytest recorded into the map: tests by file and line, seconds by test."""
    seconds = {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        path = case.attrib["classname"].replace(".", "/") + ".py"
        seconds[f"{path}::{case.attrib['name']}"] = float(case.attrib["time"])
    rows = sqlite3.connect(coverage).execute(
        "select path, context, numbits from line_bits"
        " join file on file.id = file_id join context on context.id = context_id"
    )
    reached: dict[str, dict[int, set[str]]] = {}
    by_file: dict[str, set[str]] = {}
    shared: list[tuple[str, int, str]] = []  # what a fixture ran for a test serves the others of its file
    for path, context, bits in rows:
        test, _, phase = context.rpartition("|")
        if not test:  # imports
            continue
        by_file.setdefault(test.split("::")[0], set()).add(test)
        of_file = reached.setdefault("fedtune/" + path.split("/fedtune/")[-1], {})
        for line in (8 * at + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1):
            of_file.setdefault(line, set()).add(test)
            if phase == "setup":
                shared.append(("fedtune/" + path.split("/fedtune/")[-1], line, test.split("::")[0]))
    for path, line, file in shared:
        reached[path][line] |= by_file[file]
    for tests in by_file.values():
        seconds = dict.fromkeys(tests, 1.0) | seconds  # a second where no time is known
    told = {path: {n: sorted(tests) for n, tests in found.items()} for path, found in reached.items()}
    Path(result).write_text(json.dumps({"seconds": seconds, "lines": told}), encoding="utf-8")


def tests_of(known: dict, path: str, line: int, source: str, budget: float) -> list[str]:
    """Tests that reach a line's statement, or its module where only imports run it: the quickest first."""
    found, seconds = known["lines"].get(path, {}), known["seconds"]
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    around = [node for node in statements if node.lineno <= line <= (node.end_lineno or 0)]
    inside = any(isinstance(node, ast.FunctionDef) and node.body[0].lineno <= line for node in around)
    reached = {test for tests in found.values() for test in tests}
    if not reached:  # a module without functions runs in imports alone: what reaches those that import it
        module = path.removesuffix(".py").replace("/", ".")
        for other, lines in known["lines"].items():
            if f"from {module} import" in (ROOT / other).read_text(encoding="utf-8"):
                reached |= {test for tests in lines.values() for test in tests}
    if inside:
        narrow = max(around, key=lambda node: node.lineno)
        span = [line, *range(narrow.lineno, (narrow.end_lineno or line) + 1)]
        reached = {test for number in span for test in found.get(str(number), [])} or reached
    chosen, total = [], 0.0
    for test in sorted(reached, key=lambda test: (seconds[test], test)):
        total += seconds[test] + 0.02
        if total < budget or not chosen:
            chosen.append(test)
    return chosen


def name_of(drawn: tuple[str, Edit, str]) -> str:
    """A mistake as the results name it: place, line as it was, line as it is."""
    path, (line, *_), mutant = drawn
    was = (ROOT / path).read_text(encoding="utf-8").splitlines()[line - 1].strip()
    return f"{path}:{line}: {was} -> {mutant.splitlines()[line - 1].strip()}"


def start(copy: Path, tests: list[str], log: Path) -> int:
    """Runs tests in a copy of the tree, in a process of its own."""
    if pid := os.fork():
        return pid
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    os.chdir(copy)
    sys.path[0] = os.environ["PYTHONPATH"] = str(copy)
    import pytest

    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", *tests])
    sys.stdout.flush()
    os._exit(int(status))


def run(args: argparse.Namespace) -> None:
    """Plants and tests, two at a time, and prints what was seen."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
    for name in PRELOADED:
        __import__(name)
    known = json.loads(args.map.read_text(encoding="utf-8"))
    judged = json.loads(args.judged.read_text(encoding="utf-8")) if args.judged else {}
    work = args.result.with_suffix(".copies").resolve()
    shutil.rmtree(work, ignore_errors=True)
    clean, *free = [work / str(number) / "tree" for number in range(3)]
    listed = ["git", "ls-files", "-co", "--exclude-standard"]
    for copy in (clean, *free):
        for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    results: list[dict] = []
    running: dict[int, tuple[Path, dict, float]] = {}
    sound: dict[str, bool] = {}  # whether a test that caught something passes on the tree as it is
    mistakes = list(draw(args.seed, args.count))
    if args.again:
        before = json.loads(args.again.read_text(encoding="utf-8"))
        left = {entry["mistake"] for entry in before if entry["outcome"] == "survived"}
        mistakes = [drawn for drawn in mistakes if name_of(drawn) in left]
    waiting = deque(mistakes)

    def catches(log: str) -> bool:
        """Whether the test that failed passes without the mistake."""
        found = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - |$)", log, re.MULTILINE)
        if found is None:
            return True
        test = found[1]
        if test not in sound:
            _, status = os.waitpid(start(clean, [test], clean.parent / "log"), 0)
            sound[test] = os.waitstatus_to_exitcode(status) != 1
        return sound[test]

    def ended(pid: int, outcome: str) -> None:
        copy, entry, _ = running.pop(pid)
        harmless = outcome == "survived" and entry["mistake"] in judged
        entry |= {"outcome": "equivalent" if harmless else outcome}
        entry |= {"seconds": round(time.monotonic() - entry["seconds"], 1)}
        shutil.copy2(ROOT / entry["file"], copy / entry["file"])
        free.append(copy)
        results.append(entry)
        args.result.write_text(json.dumps(results, indent=1), encoding="utf-8")
        print(f"{entry['outcome']:10} {entry['mistake']}", flush=True)

    while True:
        while free and waiting:
            path, edit, mutant = drawn = waiting.popleft()
            source = (ROOT / path).read_text(encoding="utf-8")
            tests = tests_of(known, path, edit[0], source, args.budget)
            tests = [test for test in tests if (ROOT / test.split("::")[0]).is_file()] + args.also
            tests = [test for test in tests if sound.get(test, True)]
            entry = {
                "mistake": name_of(drawn),
                "file": path,
                "tests": len(tests),
                "seconds": time.monotonic(),
            }
            copy = free.pop()
            (copy / path).write_text(mutant, encoding="utf-8")
            limit = 120 + 5 * sum(known["seconds"].get(test, 1.0) for test in tests)
            pid = start(copy, tests, copy.parent / "log") if tests else -len(results) - 1
            running[pid] = copy, entry, time.monotonic() + limit
            if not tests:
                ended(pid, "survived")
        if not running:
            break
        for pid, (copy, entry, end) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                log = (copy.parent / "log").read_text(errors="replace")
                entry["said"] = log.strip().splitlines()[-3:]
                outcome = OUTCOMES.get(os.waitstatus_to_exitcode(status), "caught")
                broken = outcome == "not run" and "ERROR collecting" in log
                if outcome == "caught" and not catches(log):
                    waiting.appendleft(
                        next(drawn for drawn in mistakes if name_of(drawn) == entry["mistake"])
                    )
                    running.pop(pid)
                    shutil.copy2(ROOT / entry["file"], copy / entry["file"])
                    free.append(copy)
                    continue
                ended(pid, "caught" if broken else outcome)  # a test file that cannot be imported any more
            elif time.monotonic() > end:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ended(pid, "endless")  # which counts as caught
        time.sleep(0.05)
    shutil.rmtree(work)
    print(dict(Counter(entry["outcome"] for entry in results)))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    mapping = commands.add_parser("map", help="which tests run which line")
    for name in ("coverage", "junit", "result"):
        mapping.add_argument(name)
    running = commands.add_parser("run", help="plant mistakes and run the tests that reach them")
    running.add_argument("map", type=Path)
    running.add_argument("result", type=Path)
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--count", type=int, default=100)
    running.add_argument("--budget", type=float, default=120.0, help="seconds of tests for one mistake")
    running.add_argument("--judged", type=Path, help="mistakes without effect, by name")
    running.add_argument("--again", type=Path, help="results: only the mistakes that survived there")
    running.add_argument(
        "--also", nargs="*", default=[], help="tests to run for each mistake beside the map's"
    )
    args = parser.parse_args()
    write_map(args.coverage, args.junit, args.result) if args.command == "map" else run(args)


if __name__ == "__main__":
    main()
