"""What a run ran on: versions, processor, revision of the code. No name, path or variable of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from fedtune.version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "datasets",
    "pydantic",
    "numpy",
    "numba",
    "triton",
    "bitsandbytes",
    "flwr",
    "rouge-score",
    "lm-eval",
)


def environment() -> dict[str, object]:
    """What `environment.json` says of the software and the machine.

    Returns:
        `packages` {name: version} of those installed, `python`, `platform` (system, architecture),
        `device` {type, name, count}, `threads`, and `git` {revision, dirty} of the project, both None when it
        does not run from a checkout.
    """
    return {
        "packages": _versions(),
        "python": platform.python_version(),
        "platform": {"system": platform.system(), "machine": platform.machine()},
        "device": _device(),
        "threads": torch.get_num_threads(),
        "git": git_state(Path(__file__).resolve().parents[2]),
    }


def git_state(root: Path) -> dict[str, str | bool | None]:
    """Revision of the checkout whose top folder is `root`, and whether its files differ from it.

    A copy installed into some other project's repository must not report that one's revision, so a folder
    without a `.git` of its own is no checkout. Without git, or without a first commit, both are None.
    """
    revision = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    changes = _git(root, "status", "--porcelain") if revision else None
    return {"revision": revision, "dirty": None if changes is None else changes != ""}


def _git(root: Path, *command: str) -> str | None:
    try:
        # --no-optional-locks: asking for the state must not write to the index
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *command],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):  # git is absent, or the file system hangs
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    versions = {"fedtune": __version__}  # its metadata may be of an older, installed copy
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed
    return versions


def _device() -> dict[str, object]:
    if torch.cuda.is_available():
        return {"type": "cuda", "name": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
    return {"type": "cpu", "name": platform.processor() or platform.machine(), "count": os.cpu_count()}
