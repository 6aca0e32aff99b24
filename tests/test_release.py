"""A release: what it writes, what it refuses, and that a folder is as it was if one fails."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DAY = date(2027, 3, 1)


def _release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / "scripts" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release = _release()


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project with all that a release reads and writes."""
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "t")
        monkeypatch.setenv(f"{name}_EMAIL", "t@example.org")
    folder = tmp_path / "project"
    for name, text in {
        "CHANGELOG.md": "# Changelog\n\n## 0.2.0 (unreleased)\n\n* New.\n\n## 0.1.0 (2026-12-01)\n",
        "CITATION.cff": "title: x\nversion: 0.1.0\nlicense: Apache-2.0\n",
        "README.md": "Text.\n\n```python\nimport fedtune\n```\n",
        "LICENSE": "text\n",
        ".gitignore": "dist/\n",
        ".ci/run": "#!/bin/sh\n",
        ".github/workflows/ci.yml": "on: push\n",
        "configs/demo.yaml": "{}\n",
        "fedtune/__init__.py": "",
        "fedtune/version.py": '"""The version."""\n\n__version__ = "0.1.0"\n',
        "pyproject.toml": (ROOT / "pyproject.toml").read_text(),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init", "--quiet", "--initial-branch", "main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "begin")
    return folder


def test_one_is_built_tried_committed_and_tagged(project: Path) -> None:
    seen = list[str]()

    def tried(root: Path, made: Sequence[Path]) -> None:
        seen.extend(file.name for file in made)
        assert git(root, "tag") == ""  # nothing is committed before it was tried

    wheel, sdist = release.release(project, "0.2.0", DAY, tried)
    assert seen == ["fedtune-0.2.0-py3-none-any.whl", "fedtune-0.2.0.tar.gz"] == [wheel.name, sdist.name]
    assert wheel.parent == sdist.parent == project / "dist"
    assert (project / "CHANGELOG.md").read_text().splitlines()[2] == "## 0.2.0 (2027-03-01)"
    assert (project / "CITATION.cff").read_text() == "title: x\nversion: 0.2.0\nlicense: Apache-2.0\n"
    assert (project / "fedtune/version.py").read_text() == '"""The version."""\n\n__version__ = "0.2.0"\n'
    assert git(project, "status", "--porcelain") == "" and git(project, "tag") == "v0.2.0"
    assert git(project, "log", "-1", "--format=%s") == "Version 0.2.0"
    with tarfile.open(sdist) as archive:
        assert not any("/.ci" in name or "/.github" in name for name in archive.getnames())
    with zipfile.ZipFile(wheel) as archive:
        assert "fedtune/configs/demo.yaml" in archive.namelist()
        assert b'"0.2.0"' in archive.read("fedtune/version.py")


def test_one_that_fails_leaves_the_folder_as_it_was(project: Path) -> None:
    def tried(root: Path, made: Sequence[Path]) -> None:
        raise release.Refused("the demo does not run")

    before = {path: path.read_text() for path in map(project.joinpath, release.CHANGED)}
    with pytest.raises(release.Refused, match="the demo does not run"):
        release.release(project, "0.2.0", DAY, tried)
    assert {path: path.read_text() for path in before} == before
    assert git(project, "status", "--porcelain") == git(project, "tag") == ""


def test_what_is_no_release(project: Path) -> None:
    def refused(version: str, why: str) -> None:
        with pytest.raises(release.Refused, match=why):
            release.release(project, version, DAY, lambda root, made: None)
        assert git(project, "tag", "--list", f"v{version}") == ""

    for version in ("1.2", "v1.2.3", "01.2.3", "1.2.3rc1", "../x"):
        with pytest.raises(release.Refused, match="three numbers"):
            release.numbers(version)
    refused("0.3.0", r"CHANGELOG.md needs one line '## 0\.3\.0 \(unreleased\)'")
    git(project, "tag", "v0.10.0")
    refused("0.2.0", r"v0\.10\.0 is there already; 0\.2\.0 must be newer")
    git(project, "tag", "--delete", "v0.10.0")
    (project / "new").write_text("x")
    refused("0.2.0", "not committed")
    (project / "new").unlink()
    git(project, "checkout", "--quiet", "-b", "other")
    refused("0.2.0", "made on main, and this is other")


def test_the_project_itself_is_ready_for_one() -> None:
    """Its files have the lines that a release changes."""
    text = (ROOT / "CHANGELOG.md").read_text()
    version = text.partition("\n## ")[2].split()[0]
    assert f"## {version} (2027-03-01)\n" in release.dated(text, version, DAY)
    compile(release.readme_example((ROOT / "README.md").read_text()), "README.md", "exec")
    done = subprocess.run([sys.executable, ROOT / "scripts/release.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "version" in done.stderr
