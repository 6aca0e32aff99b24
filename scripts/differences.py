"""Says in one line which packages are not in the versions of requirements/, and which tests failed last.

For a red run with the newest ones (FEDTUNE_NEWEST=1 sh scripts/test.sh): what differs can have broken it.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ("fedtune", "pip", "setuptools")  # the project and what every environment brings
SHOWN = 20  # failing tests by name; one cause often fails hundreds


def normal(name: str) -> str:
    """A package's name as the lock writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(text: str) -> dict[str, str]:
    """The versions of a file of requirements/, by normal name."""
    pairs = [line.split("==") for line in text.splitlines() if "==" in line]
    return {normal(name): version for name, version in pairs}


def differences(lock: dict[str, str], installed: dict[str, str]) -> list[str]:
    """What is installed in another version than the lock's or is not in it; a build tag (+cpu) is none."""
    return [
        f"{name} {lock.get(name, 'not there')} -> {version}"
        for name, version in sorted(installed.items())
        if name not in OURS and version.partition("+")[0] != lock.get(name)
    ]


def summary(file: str, changed: list[str], failed: list[str]) -> str:
    """The line."""
    packages = f"differs from {file}: {', '.join(changed)}" if changed else f"nothing differs from {file}"
    more = f" and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
    tests = f"tests that failed: {', '.join(failed[:SHOWN])}{more}" if failed else "no test failed"
    return f"{packages}; {tests}"


def main() -> None:
    """Prints it."""
    file = f"requirements/py{sys.version_info.major}{sys.version_info.minor}.txt"
    lock = ROOT / file
    if not lock.is_file():
        sys.exit(
            f"there is no {file} to compare with: Python 3.{sys.version_info.minor} has no tested versions."
        )
    installed = {normal(package.name): package.version for package in distributions()}
    last = ROOT / ".pytest_cache" / "v" / "cache" / "lastfailed"  # pytest's own record
    failed = sorted(json.loads(last.read_text())) if last.is_file() else []
    print(summary(file, differences(read_lock(lock.read_text()), installed), failed))


if __name__ == "__main__":
    main()
