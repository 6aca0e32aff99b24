"""Asks pip-audit whether a version in requirements/ has a known hole, and fails where one has.

requirements/ignored.toml names the holes that we live with for a while: each with its reason and the last day
on which it is let pass. After that day it fails again.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"


def ignored(text: str, today: date) -> list[str]:
    """The ids that are let pass today.

    Raises:
        ValueError: An entry is not id, reason and until, or its last day is more than 180 days away.
    """
    passing = []
    for hole in tomllib.loads(text).get("hole", []):
        if set(hole) != {"id", "reason", "until"} or not hole["reason"] or type(hole["until"]) is not date:
            raise ValueError(f"a hole has id, reason and until (a date, such as 2027-01-31), got {hole}.")
        days = (hole["until"] - today).days
        if days > 180:
            raise ValueError(f"{hole['id']}: until must be within 180 days, got {hole['until']}.")
        if days >= 0:
            passing.append(hole["id"])
    return passing


def command(file: Path, passing: list[str]) -> list[str]:
    """Audits the lines of a file as they are: with --strict, a package that is not found is a failure too."""
    options = ["--strict", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    return [
        sys.executable,
        "-m",
        "pip_audit",
        *options,
        *(f"--ignore-vuln={i}" for i in passing),
        "-r",
        str(file),
    ]


def main() -> None:
    """Audits every file."""
    passing = ignored((REQUIREMENTS / "ignored.toml").read_text(encoding="utf-8"), date.today())
    failed = [
        file.name
        for file in sorted(REQUIREMENTS.glob("py*.txt"))
        if subprocess.run(command(file, passing)).returncode != 0
    ]
    if failed:
        sys.exit(
            f"known holes, or no answer, for {', '.join(failed)}: raise the version (pyproject.toml, then sh "
            "scripts/lock.sh), or enter the hole in requirements/ignored.toml with a reason and an end."
        )


if __name__ == "__main__":
    main()
