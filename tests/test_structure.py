"""Order of imports, no circles, no borrowed private names, files of a readable length.

Each rule is a function over sources. It finds nothing in this project, and it finds what is planted.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from structure import (
    BOTTOM,
    HOME,
    ORDER,
    around,
    blind,
    circles,
    imports,
    missing_files,
    missing_tests,
    package,
    prose,
    strangers,
    too_long,
    underscored,
    unpickling,
    upward,
)

PACKAGE = package()
AROUND = around()
FILES = [
    path
    for folder in ("fedtune", "tests", "scripts", "reproduce", "configs", "docs")
    for path in sorted((HOME / folder).rglob("*.py"))
]


def test_the_package_is_what_is_read() -> None:
    assert {"fedtune", "fedtune.cli.main", "fedtune.core.loop", "fedtune.methods.fedavg.method"} <= set(
        PACKAGE
    )
    assert "tests/test_structure.py" in AROUND
    found = {module.split(".")[1] for module in PACKAGE if "." in module}
    assert found <= {*ORDER, *BOTTOM}


def test_imports_point_down() -> None:
    assert upward(PACKAGE) == []


def test_there_is_no_circle() -> None:
    assert circles(PACKAGE) == []


def test_nobody_takes_an_underscored_name() -> None:
    assert underscored(PACKAGE, AROUND) == []


def test_flower_has_one_home() -> None:
    assert strangers(PACKAGE) == []


def test_core_knows_no_method_no_transport_and_no_protection() -> None:
    assert blind(PACKAGE) == []


def test_files_can_be_read_in_one_sitting() -> None:
    lines = {str(path.relative_to(HOME)): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert too_long(lines) == []


def test_files_that_texts_name_are_there() -> None:
    pages = [HOME / "README.md", *sorted((HOME / "docs").rglob("*.md"))]
    texts = {module: prose(source) for module, source in (PACKAGE | AROUND).items()}
    texts |= {str(page.relative_to(HOME)): page.read_text(encoding="utf-8") for page in pages}
    assert missing_files(texts, [str(path.relative_to(HOME)) for path in FILES]) == []


def test_nothing_is_unpickled() -> None:
    assert unpickling(PACKAGE) == []


def test_each_promise_of_security_names_a_test_that_is_there() -> None:
    text = (HOME / "SECURITY.md").read_text(encoding="utf-8")
    assert missing_tests(text, AROUND) == []
    promises, _, _ = text.partition("## What is not promised")
    rows = [line for line in promises.splitlines() if line.startswith("| ") and "held by" not in line]
    assert len(rows) > 20 and [row for row in rows if "::test_" not in row] == []


def test_importing_fedtune_brings_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "peft", "datasets", "numba", "flwr", "pydantic", "numpy", "rich"]
    program = f"import sys, fedtune; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# What each rule finds

CHECKED_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
CORE = {"fedtune": "", "fedtune.core": "", "fedtune.core.loop": "", "fedtune.core.types": ""}


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        (
            "fedtune.models.load",
            "from fedtune.core import loop",
            "fedtune.models.load:1 imports fedtune.core.loop",
        ),
        (
            "fedtune.models.load",
            "import fedtune.core.loop",
            "fedtune.models.load:1 imports fedtune.core.loop",
        ),
        (
            "fedtune.models.load",
            "def f():\n    from fedtune.core.loop import RoundLoop",
            "fedtune.models.load:2 imports fedtune.core.loop",
        ),
        (
            "fedtune.models.load",
            CHECKED_ONLY + "from fedtune.core.loop import RoundLoop",
            "fedtune.models.load:3 imports fedtune.core.loop",
        ),
        ("fedtune.models.load", "from fedtune import version", "fedtune.models.load:1 imports fedtune"),
        ("fedtune.errors", "import fedtune.core.types", "fedtune.errors:1 imports fedtune.core.types"),
        (
            "fedtune.models.load",
            "LAZY = 'fedtune.core.loop:Loop'",
            "fedtune.models.load:1 imports fedtune.core.loop",
        ),
        ("fedtune.extras.more", "", "fedtune.extras.more: extras has no place in the order"),
        ("fedtune", "from fedtune.core.types import Payload", "fedtune:1 imports fedtune.core.types"),
    ],
)
def test_an_import_upward_is_found(module: str, source: str, found: str) -> None:
    assert upward({**CORE, module: source}) == [found]


def test_an_import_downward_is_none() -> None:
    sources = {
        "fedtune": "from fedtune.version import __version__\nfrom fedtune.api.runs import Run",
        "fedtune.api.runs": "from fedtune.core.loop import RoundLoop",
        "fedtune.cli.main": "import torch\nfrom fedtune.api import runs",
        "fedtune.core.loop": "from fedtune.core.types import Payload\nfrom fedtune.errors import InputError",
        "fedtune.errors": "from fedtune.registry import Registry",
        "fedtune.registry": "",
        "fedtune.version": "",
    }
    assert upward({**CORE, **sources}) == []


def test_a_circle_is_found_and_named_once() -> None:
    sources = {
        "fedtune.core.a": "from fedtune.core.b import B",
        "fedtune.core.b": CHECKED_ONLY + "from fedtune.core import c",
        "fedtune.core.c": "def f():\n    import fedtune.core.a",
        "fedtune.core.d": "from fedtune.core.a import A",
    }
    circle = "fedtune.core.a -> fedtune.core.b -> fedtune.core.c -> fedtune.core.a"
    assert circles(sources) == [circle]
    assert circles({**sources, "fedtune.core.c": ""}) == []


def test_every_form_of_import_is_read() -> None:
    source = "import fedtune.core.loop as own\nfrom fedtune.core import loop, other\nimport torch"
    found = [(each.module, each.name, each.bound) for each in imports(source, CORE)]
    assert found == [
        ("fedtune.core.loop", "", "own"),
        ("fedtune.core.loop", "", "loop"),
        ("fedtune.core", "other", "other"),
        ("torch", "", "torch"),
    ]
    with pytest.raises(ValueError, match="line 1: a relative import"):
        list(imports("from .core import loop", CORE))


OWNER = {
    "fedtune.core.owner": """
_LIMIT: int = 3
def _secret(): ...
class Open:
    def _step(self):
        self._held = 1
"""
}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from fedtune.core.owner import _secret", "_secret"),
        ("from fedtune.core import owner\nowner._secret()", "_secret"),
        ("import fedtune.core.owner\nfedtune.core.owner._LIMIT", "_LIMIT"),
        ("from fedtune.core.owner import Open\nOpen._step", "_step"),
        ("def f(thing):\n    return thing._held", "_held"),
        (
            "class Mine(Open):\n    def f(self):\n        return self._held",
            "_held",
        ),
        ("def f(thing):\n    thing._held = 2", "_held"),
        ("monkeypatch.setattr(owner, '_LIMIT', 1)", "_LIMIT"),
        ("monkeypatch.setattr('fedtune.core.owner._LIMIT', 1)", "_LIMIT"),
        ("getattr(owner, '_secret')", "_secret"),
    ],
)
def test_an_underscored_name_is_found_wherever_it_is_taken(source: str, name: str) -> None:
    line = source.count("\n") + 1
    said = f":{line} takes {name}, a name of fedtune.core.owner"
    assert underscored(OWNER, {"tests/test_x.py": source}) == [f"tests/test_x.py{said}"]
    assert underscored({**OWNER, "fedtune.cli.x": source}) == [f"fedtune.cli.x{said}"]


@pytest.mark.parametrize(
    "source",
    [
        "def _secret(): ...\n_secret()",
        "class Own:\n    def f(self):\n        self._held = 1\n        return other._held",
        "import torch\ntorch._dynamo.reset()",
        "fedtune.__version__\nrow._asdict()",
        "print('_LIMIT')",
    ],
)
def test_names_of_ones_own_and_of_others_are_free(source: str) -> None:
    assert underscored(OWNER, {"tests/test_x.py": source}) == []


def test_a_library_outside_its_home_is_found() -> None:
    sources = {
        "fedtune.transport.flower": "from flwr.app import Message",
        "fedtune.deploy.server": "def f():\n    import flwr.server",
    }
    assert strangers(sources) == ["fedtune.deploy.server:2 imports flwr.server"]


@pytest.mark.parametrize("folder", ["protection.noise", "methods.tuning", "transport.remote"])
def test_core_that_knows_too_much_is_found(folder: str) -> None:
    sources = {"fedtune.core.loop": f"if True:\n    import fedtune.{folder}", f"fedtune.{folder}": ""}
    assert blind(sources) == [f"fedtune.core.loop:2 imports fedtune.{folder}"]
    assert blind({"fedtune.federation.run": f"import fedtune.{folder}"}) == []


def test_a_file_that_is_too_long_is_found() -> None:
    lines = {
        "fedtune/a.py": 401,
        "fedtune/b.py": 400,
        "scripts/c.py": 401,
        "tests/d.py": 600,
        "tests/e.py": 601,
    }
    assert too_long(lines) == [
        "fedtune/a.py: 401 lines, 400 are allowed",
        "scripts/c.py: 401 lines, 400 are allowed",
        "tests/e.py: 601 lines, 600 are allowed",
    ]


def test_a_file_that_is_not_there_is_found_in_pages_docstrings_and_comments() -> None:
    source = '''"""As in `core/loop.py`."""
def f():
    """See method.py, and old/method.py."""
    return "text.py"  # gone.py
'''
    texts = {
        "docs/a.md": "in `fedtune/core/loop.py`, not core.py or configs/*.py",
        "fedtune.b": prose(source),
    }
    files = ["fedtune/core/loop.py", "fedtune/methods/fedavg/method.py"]
    assert missing_files(texts, files) == [
        "docs/a.md names core.py",
        "fedtune.b names gone.py",
        "fedtune.b names old/method.py",
    ]


def test_the_page_has_the_order() -> None:
    page = (HOME / "docs" / "structure.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE) == ORDER
    (bottom,) = re.findall(r"^\| (`errors.py`.*?) \|", page, re.MULTILINE)
    assert re.findall(r"`(\w+).py`", bottom) == BOTTOM
    steps = re.findall(r"^\d\. `([\w/.]+)`", page, re.MULTILINE)
    assert len(steps) == 6 and all((HOME / "fedtune" / step).is_file() for step in steps)


def test_a_test_that_is_not_there_is_found() -> None:
    text = "`tests/test_a.py::test_one`, `tests/test_a.py::test_two`, `tests/test_b.py::test_one`"
    found = missing_tests(text, {"tests/test_a.py": "def test_one() -> None: ...\n"})
    assert found == ["tests/test_a.py::test_two", "tests/test_b.py::test_one"]


@pytest.mark.parametrize(
    "source",
    ["import json, pickle", "from dill import loads", "def f():\n    import marshal", "torch.load(path)"],
)
def test_unpickling_is_found(source: str) -> None:
    assert len(unpickling({"fedtune.a": source, "fedtune.b": "import json\ntorch.save(1, path)"})) == 1


def test_what_is_a_record_stays_as_it_was_made() -> None:
    """Only what counts or collects over time can be changed."""
    changing = {
        f"{module}.{node.name}"
        for module, source in PACKAGE.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
        for decorator in map(ast.unparse, node.decorator_list)
        if decorator.startswith("dataclass") and "frozen=True" not in decorator
    }
    assert changing == {
        "fedtune.data.reading.Reading",
        "fedtune.core.cohort.RoundOutcome",
        "fedtune.evaluation.code._Tally",
        "fedtune.federation.assembly.Assembly",
        "fedtune.federation.consent.Consent",
        "fedtune.methods.fedbiot.server.Server",
        "fedtune.methods.step_loss.TokenMean",
        "fedtune.models.alignment.Teacher",
        "fedtune.planning.traffic.Traffic",
        "fedtune.theory.one_shot._Running",
        "fedtune.transport.remote._Open",
        "fedtune.transport.worker._Incoming",
    }
