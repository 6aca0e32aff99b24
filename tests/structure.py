"""The rules of the package's structure: functions over sources, with a line for every break of a rule."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]

# From top to bottom. A module imports from its own folder and from those below it.
ORDER = [
    "cli",
    "api",
    "deploy",
    "bench",
    "planning",
    "report",
    "federation",
    "theory",
    "config",
    "methods",
    "protection",
    "transport",
    "evaluation",
    "core",
    "models",
    "data",
    "zeroth",
    "measure",
]
BOTTOM = ["errors", "registry", "version"]  # single files that may know each other
LEVEL: dict[str, float] = {name: level for level, name in enumerate(ORDER)}
LEVEL |= dict.fromkeys(BOTTOM, len(ORDER)) | {"": 0.5}  # `import fedtune` itself: the command line reads it
FRONT_DOOR = {"api", "errors", "version"}  # what `import fedtune` itself may take
BLIND = {"core": {"protection", "methods", "transport"}}  # told what they need by whoever calls them
OF_TORCH = {
    "_parameters",
    "_buffers",
    "_modules",
    "_apply",
    "_version",
}  # of every nn.Module, of every tensor
ONE_HOME = {"flwr": "fedtune.transport.flower"}  # a library that one module alone knows
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PROGRAM_LINES, TEST_LINES = 400, 600

Sources = Mapping[str, str]  # text by module name, or by path for what is no part of the package


def package() -> dict[str, str]:
    """The package's modules."""
    found = {}
    for path in sorted((HOME / "fedtune").rglob("*.py")):
        parts = path.relative_to(HOME).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def around() -> dict[str, str]:
    """What stands beside the package and uses it."""
    return {
        str(path.relative_to(HOME)): path.read_text(encoding="utf-8")
        for folder in ("tests", "scripts", "reproduce")
        for path in sorted((HOME / folder).rglob("*.py"))
    }


@cache
def _tree(source: str) -> ast.Module:
    return ast.parse(source)


@dataclass(frozen=True)
class Import:
    """One name that a module takes.

    Attributes:
        line: Where.
        module: The module that it is taken from, or is.
        name: What is taken out of that module; empty for the module itself.
        bound: What the taker calls it.
    """

    line: int
    module: str
    name: str
    bound: str


def imports(source: str, modules: Iterable[str]) -> Iterator[Import]:
    """Every import of a source: those inside functions and for the type checker alone too.

    Raises:
        ValueError: One is relative; all say the whole name here.
    """
    modules = set(modules)
    for node in ast.walk(_tree(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, "", alias.asname or alias.name)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: a relative import")
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in modules:
                    yield Import(node.lineno, whole, "", alias.asname or alias.name)
                else:
                    yield Import(node.lineno, str(node.module), alias.name, alias.asname or alias.name)


def named_in_text(source: str, modules: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Modules that stand in a string, as "module" or "module:name": imported when they are asked for."""
    modules = set(modules)
    for node in ast.walk(_tree(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if "." in name and name in modules:
                yield node.lineno, name


def _folder(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def upward(sources: Sources) -> list[str]:
    """Imports that point up, and folders that have no place in the order."""
    found = []
    for module, source in sources.items():
        folder = _folder(module)
        if folder not in LEVEL:
            found.append(f"{module}: {folder} has no place in the order")
            continue
        taken = [(each.line, each.module) for each in imports(source, sources) if _ours(each.module)]
        for line, other in [*taken, *named_in_text(source, sources)]:
            if not folder:
                wrong = _folder(other) not in FRONT_DOOR
            else:
                wrong = LEVEL.get(_folder(other), -1) < LEVEL[folder]
            if wrong:
                found.append(f"{module}:{line} imports {other}")
    return list(dict.fromkeys(found))  # one line may take several names


def circles(sources: Sources) -> list[str]:
    """Modules that import each other in a circle, each circle once."""
    needs = {
        module: sorted({each.module for each in imports(source, sources)} & set(sources))
        for module, source in sources.items()
    }
    found: dict[frozenset[str], str] = {}
    done: set[str] = set()

    def follow(path: list[str]) -> None:
        for other in needs[path[-1]]:
            if other in path:
                circle = path[path.index(other) :]
                found.setdefault(frozenset(circle), " -> ".join([*circle, other]))
            elif other not in done:
                follow([*path, other])
        done.add(path[-1])

    for module in needs:
        if module not in done:
            follow([module])
    return list(found.values())


def _private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not name.endswith("__")


def _defined(source: str) -> set[str]:
    """The underscored names that a source gives to something: functions, classes, variables, attributes."""
    names = set()
    for node in ast.walk(_tree(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"self", "cls"}:
            if isinstance(node.ctx, ast.Store):
                names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return {name for name in names if _private(name)}


def underscored(sources: Sources, users: Sources | None = None) -> list[str]:
    """Underscored names of the package that another module, a test or a script takes.

    By import, as an attribute of anything (a module, a class, an object), or in a string that is patched.

    Args:
        sources: The package.
        users: What else must not take them; the package itself is always held to it.
    """
    defined = {module: _defined(source) for module, source in sources.items()}
    owners: dict[str, list[str]] = {}
    for module, names in defined.items():
        for name in names - OF_TORCH:
            owners.setdefault(name, []).append(module)
    found = []
    for user, source in [*sources.items(), *(users or {}).items()]:
        foreign = set(owners) - (defined[user] if user in defined else _defined(source))
        taken = [
            (each.line, each.name)
            for each in imports(source, sources)
            if _ours(each.module) and _private(each.name)
        ]
        for node in ast.walk(_tree(source)):
            if isinstance(node, ast.Attribute) and node.attr in foreign:
                taken.append((node.lineno, node.attr))
            elif isinstance(node, ast.Call):
                taken += [(node.lineno, name) for name in _patched(node) if name in foreign]
        for line, name in taken:
            found.append(
                f"{user}:{line} takes {name}, a name of {' or '.join(owners.get(name, ['fedtune']))}"
            )
    return found


def _patched(call: ast.Call) -> Iterator[str]:
    """The last part of each string that says what `setattr` and its kind set, get or patch."""
    if ast.unparse(call.func).rpartition(".")[2] in {"setattr", "getattr", "hasattr", "delattr", "patch"}:
        for each in call.args[:2]:
            if isinstance(each, ast.Constant) and isinstance(each.value, str):
                yield each.value.rpartition(".")[2]


def _ours(module: str) -> bool:
    return module.split(".")[0] == "fedtune"


def strangers(sources: Sources) -> list[str]:
    """Imports of a library outside the one module that knows it."""
    return [
        f"{module}:{each.line} imports {each.module}"
        for module, source in sources.items()
        for each in imports(source, sources)
        if ONE_HOME.get(each.module.split(".")[0], module) != module
    ]


def blind(sources: Sources) -> list[str]:
    """Imports of what a folder must not know."""
    return [
        f"{module}:{each.line} imports {each.module}"
        for module, source in sources.items()
        for each in imports(source, sources)
        if _ours(each.module) and _folder(each.module) in BLIND.get(_folder(module), set())
    ]


def too_long(lines: Mapping[str, int]) -> list[str]:
    """Files over the limit of their kind.

    Args:
        lines: Number of lines by path, from the top folder.
    """
    found = []
    for path, count in lines.items():
        limit = TEST_LINES if path.startswith("tests/") else PROGRAM_LINES
        if count > limit:
            found.append(f"{path}: {count} lines, {limit} are allowed")
    return found


FOREIGN = {"train.py", "my_method.py"}  # files of other projects and of users that a text names
_PATH = re.compile(r"(?<![\w./*{}-])(?:[\w-]+/)*[\w-]+\.py\b")


def prose(source: str) -> str:
    """The comments and docstrings of a source."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = [token.string for token in tokens if token.type == tokenize.COMMENT]
    for node in ast.walk(_tree(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts.append(ast.get_docstring(node) or "")
    return "\n".join(texts)


def missing_files(texts: Mapping[str, str], files: Iterable[str]) -> list[str]:
    """Program files that a text names and that are not there.

    Args:
        texts: By the name of the file that they stand in.
        files: All files that there are, as paths from the top folder.
    """
    there = {f"/{path}" for path in files}
    return [
        f"{name} names {path}"
        for name, text in texts.items()
        for path in sorted(set(_PATH.findall(text)) - FOREIGN)
        if not any(each.endswith(f"/{path}") for each in there)
    ]


def missing_tests(text: str, tests: Mapping[str, str]) -> list[str]:
    """Tests that a text names, as FILE::FUNCTION, and that are not there.

    Args:
        text: The text.
        tests: Sources of test files, by path.
    """
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", text)
    there = {
        (path, node.name)
        for path in {path for path, _ in named} & set(tests)
        for node in _tree(tests[path]).body
        if isinstance(node, ast.FunctionDef)
    }
    return [f"{path}::{name}" for path, name in named if (path, name) not in there]


def unpickling(sources: Sources) -> list[str]:
    """Modules that take a library whose files can run code when read, or call `torch.load`."""
    return [
        f"{name}:{node.lineno}"
        for name, source in sources.items()
        for node in ast.walk(_tree(source))
        if (isinstance(node, ast.Import) and any(each.name.split(".")[0] in PICKLES for each in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES)
        or (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load")
    ]
