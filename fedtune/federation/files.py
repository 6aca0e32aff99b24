"""Files that are whole or not there: JSON and folders written beside their place and renamed into it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedtune.core.permissions import as_the_umask_says
from fedtune.errors import FederationError, InputError, system_error


def write_text(path: Path, text: str) -> None:
    """Writes a file whole: a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, document: Any) -> None:
    """Writes a JSON file whole."""
    write_text(path, dumps(document, indent=2) + "\n")


def dumps(document: Any, indent: int | None = None) -> str:
    """JSON text; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(document), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises InputError if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` at the end; on an error it is removed.

    A folder already at `path` is replaced only once the new one is complete.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        files = [file for file in temporary.rglob("*") if file.is_file()]
        as_the_umask_says(files, temporary)
        for file in files:
            _fsync(file)
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns a failed write (a full disk, no permission) into an error: what it was, and what is safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
        raise FederationError(
            f"{what} could not be written: {system_error(error)} What was complete before is still there: "
            "continue with --resume."
        ) from error


def _fsync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
