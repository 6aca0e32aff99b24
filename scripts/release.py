"""Makes a release, by one command: `python scripts/release.py 0.2.0`.

From a clean main: dates CHANGELOG.md's `## 0.2.0 (unreleased)`, sets the version, builds wheel and sdist, has
twine check them, installs the wheel in an empty environment, runs the demo and README.md's example there,
and then commits, tags, and leaves both files in dist/. If anything of that fails, every file is as it was.
Nothing is pushed or uploaded: the last lines say how.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
CHANGED = ("CHANGELOG.md", "CITATION.cff", "fedtune/version.py")
LEFT_OUT = (".ci", ".github")  # of the sdist


class Refused(Exception):
    """There can be no release; the message says why."""


def call(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """A command's output. Raises Refused, with what it said, if it fails."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise Refused(f"{' '.join(map(str, command))} ended with {done.returncode}: {said}")
    return done.stdout.strip()


def numbers(version: str) -> tuple[int, ...]:
    """Its three numbers. Raises Refused for anything else."""
    found = NUMBER.fullmatch(version)
    if found is None:
        raise Refused(f"a version is three numbers, such as 0.2.0; got {version!r}")
    return tuple(map(int, found.groups()))


def dated(changelog: str, version: str, day: date) -> str:
    """The changelog with the version's day. Raises Refused if it has no unreleased part of that version."""
    title = f"## {version} (unreleased)\n"
    if changelog.count(title) != 1:
        raise Refused(f"CHANGELOG.md needs one line {title.strip()!r}, with what is new below it")
    return changelog.replace(title, f"## {version} ({day.isoformat()})\n")


def readme_example(readme: str) -> str:
    """The Python that README.md shows first."""
    found = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    if found is None:
        raise Refused("README.md has no example in Python")
    return found.group(1)


def check(root: Path, version: str) -> None:
    """Raises Refused unless the folder is a clean main that has no such release, nor a newer one."""
    if call("git", "status", "--porcelain", cwd=root):
        raise Refused("there are changes that are not committed; commit or remove them")
    if (branch := call("git", "branch", "--show-current", cwd=root)) != "main":
        raise Refused(f"a release is made on main, and this is {branch or 'no branch'}")
    for tag in call("git", "tag", "--list", "v*", cwd=root).split():
        if NUMBER.fullmatch(tag[1:]) and numbers(tag[1:]) >= numbers(version):
            raise Refused(f"{tag} is there already; {version} must be newer")


def write(root: Path, version: str, day: date) -> None:
    """Sets the version and its day wherever they stand."""
    log = root / "CHANGELOG.md"
    log.write_text(dated(log.read_text(encoding="utf-8"), version, day), encoding="utf-8")
    for name, old, new in (
        ("fedtune/version.py", r'(?m)^__version__ = ".*"$', f'__version__ = "{version}"'),
        ("CITATION.cff", r"(?m)^version: .*$", f"version: {version}"),
    ):
        text, count = re.subn(old, new, (root / name).read_text(encoding="utf-8"))
        if count != 1:
            raise Refused(f"{name} must have one line with the version, and has {count}")
        (root / name).write_text(text, encoding="utf-8")


def build(root: Path, folder: Path) -> list[Path]:
    """The wheel and the sdist, in this order. Raises Refused if the sdist has what is not for users."""
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", folder, cwd=root)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/")[1] for name in archive.getnames()}
    if inside := names & set(LEFT_OUT):
        raise Refused(f"the sdist has {', '.join(sorted(inside))} in it; see pyproject.toml")
    return [wheel, sdist]


def try_out(root: Path, made: Sequence[Path]) -> None:
    """Has twine check both files, and uses the wheel in an empty environment, outside of the project."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quiet = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
        quiet.pop("PYTHONPATH", None)
        for what, package in (("checks", ["twine"]), ("empty", [str(made[0]), *locked(root)])):
            venv.create(folder / what, with_pip=True)
            python = folder / what / "bin" / "python"
            print(f"installing {package[0]}", flush=True)
            call(python, "-m", "pip", "install", "--quiet", *package, cwd=folder, env=quiet)
        call(folder / "checks" / "bin" / "python", "-m", "twine", "check", "--strict", *made, cwd=folder)
        program = folder / "empty" / "bin" / "fedtune"
        print("running the demo and README.md's example", flush=True)
        call(program, "run", "demo", "--out", "demo", "--quiet", cwd=folder, env=quiet)
        example = readme_example((root / "README.md").read_text(encoding="utf-8"))
        call(folder / "empty" / "bin" / "python", "-c", example, cwd=folder, env=quiet)


def locked(root: Path) -> list[str]:
    """Pip's options for the versions that the tests are run with."""
    file = root / "requirements" / f"py{sys.version_info.major}{sys.version_info.minor}.txt"
    return ["--constraint", str(file)] if file.exists() else []


def release(root: Path, version: str, day: date, tried: Callable[[Path, Sequence[Path]], None]) -> list[Path]:
    """Makes the release in a folder.

    Args:
        root: The project's.
        version: Three numbers.
        day: Of the release.
        tried: Uses what was built; raises if it is not fit.

    Returns:
        The wheel and the sdist, in dist/.

    Raises:
        Refused: There can be none; the folder is as it was.
    """
    numbers(version)
    check(root, version)
    try:
        write(root, version, day)
        with tempfile.TemporaryDirectory() as name:
            made = build(root, Path(name))
            tried(root, made)
            (root / "dist").mkdir(exist_ok=True)
            kept = [root / "dist" / file.name for file in made]
            for file, place in zip(made, kept, strict=True):
                place.write_bytes(file.read_bytes())
        call("git", "commit", "--all", "--message", f"Version {version}", cwd=root)
        call("git", "tag", "--annotate", f"v{version}", "--message", f"Version {version}", cwd=root)
    except BaseException:
        call("git", "checkout", "--", *CHANGED, cwd=root)
        raise
    return kept


def main() -> None:
    """Makes the release that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", help="three numbers, such as 0.2.0")
    version = parser.parse_args().version
    try:
        made = release(ROOT, version, date.today(), try_out)
    except Refused as error:
        sys.exit(f"no release: {error}")
    files = " ".join(str(file.relative_to(ROOT)) for file in made)
    print(f"made {files}, and the tag v{version}. To publish:")
    print(f"  git push origin main v{version}")
    print(f"  twine upload {files}")


if __name__ == "__main__":
    main()
