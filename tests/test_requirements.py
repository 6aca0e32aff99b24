"""The exact versions that scripts/setup.sh installs, and what is said where newer ones fail."""

from __future__ import annotations

import re
import runpy
import tomllib
from datetime import date
from pathlib import Path
from typing import get_args

import pytest
from packaging.requirements import Requirement

from fedtune.config.tracking import Tracker
from fedtune.version import __version__

PROJECT = Path(__file__).resolve().parents[1]
FILES = sorted((PROJECT / "requirements").glob("py*.txt"))
SCRIPT = runpy.run_path(str(PROJECT / "scripts" / "differences.py"))


def test_who_cites_it_cites_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (PROJECT / "CITATION.cff").read_text()


def test_the_oldest_python_and_those_after_it_have_a_file() -> None:
    assert [file.name for file in FILES] == ["py311.txt", "py312.txt", "py313.txt", "py314.txt"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_pyproject_requires_is_there_and_within_its_bounds(file: Path) -> None:
    versions = SCRIPT["read_lock"](file.read_text())
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = dict(project["optional-dependencies"])
    for name in get_args(Tracker):  # one each, in a version that was tried by itself
        (line,) = extras.pop(name)
        assert Requirement(line).name == name
    (everything,) = map(Requirement, extras.pop("all"))
    assert (everything.name, everything.extras) == ("fedtune", extras.keys() - {"dev"})
    required = [Requirement(line) for group in (project["dependencies"], *extras.values()) for line in group]
    assert len(required) > 20
    for requirement in required:
        version = versions[SCRIPT["normal"](requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, got {version}: run scripts/lock.sh"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_line_is_one_exact_version_from_any_index(file: Path) -> None:
    first, *lines = file.read_text().splitlines()
    assert first.startswith("# ")
    assert len(lines) == len(set(lines)) > 100
    for line in lines:
        requirement = Requirement(line)
        assert [bound.operator for bound in requirement.specifier] == ["=="], line
        assert requirement.url is None and requirement.marker is None, line
        # of CUDA only; torch's CPU build has none of them
        assert not requirement.name.startswith(("cuda-", "nvidia-")), line


def test_all_files_name_one_torch() -> None:
    """scripts/setup.sh looks for its CPU build before it knows the Python."""
    assert len({SCRIPT["read_lock"](file.read_text())["torch"] for file in FILES}) == 1


def test_differences_are_other_versions_and_packages_that_were_not_there() -> None:
    lock = {"torch": "2.13.0", "peft": "0.21.2", "rich": "14.3.4"}
    installed = {"torch": "2.13.0+cpu", "peft": "0.22.0", "new-one": "1.0", "fedtune": "0.1.0", "pip": "25.0"}
    changed = SCRIPT["differences"](lock, installed)
    assert changed == ["new-one not there -> 1.0", "peft 0.21.2 -> 0.22.0"]
    failed = [f"tests/test_a.py::test_{place:02}" for place in range(22)]
    assert SCRIPT["summary"]("requirements/py311.txt", changed, failed) == (
        "differs from requirements/py311.txt: new-one not there -> 1.0, peft 0.21.2 -> 0.22.0; "
        f"tests that failed: {', '.join(failed[:20])} and 2 more"
    )
    assert SCRIPT["summary"]("requirements/py311.txt", [], []) == (
        "nothing differs from requirements/py311.txt; no test failed"
    )


def test_actions_are_named_by_their_commit() -> None:
    """A tag can be moved; its version stands beside it for people and for updates."""
    lines = (PROJECT / ".github" / "workflows" / "ci.yml").read_text().splitlines()
    used = [line.strip() for line in lines if "uses:" in line]
    assert len(used) >= 6
    for line in used:
        assert re.fullmatch(r"- uses: actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    assert len({line.split("@")[1] for line in used}) == len({line.split("@")[0] for line in used})


def test_what_audits_let_pass_has_a_reason_and_an_end() -> None:
    audit = runpy.run_path(str(PROJECT / "scripts" / "audit.py"))
    today = date(2026, 11, 29)
    entry = '[[hole]]\nid = "A-1"\nreason = "not reached"\nuntil = {}\n'
    assert audit["ignored"]("", today) == []
    assert audit["ignored"](entry.format("2026-11-29"), today) == ["A-1"]
    assert audit["ignored"](entry.format("2026-11-28"), today) == []  # it fails again
    for text in (entry.format("2027-11-29"), entry.format('"soon"'), '[[hole]]\nid = "A-1"\n'):
        with pytest.raises(ValueError, match="until"):
            audit["ignored"](text, today)
    command = audit["command"](FILES[0], ["A-1"])
    assert "--strict" in command and "--ignore-vuln=A-1" in command and command[-1] == str(FILES[0])
    audit["ignored"]((PROJECT / "requirements" / "ignored.toml").read_text(), date.today())
