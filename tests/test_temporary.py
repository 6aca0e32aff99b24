"""Temporary folders: gone at the end, and after a kill gone at the next start; never another process's."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import IO, cast

import pytest

from fedtune.core import temporary
from fedtune.core.store import Store
from fedtune.core.temporary import PREFIX, sweep, temporary_folder
from fedtune.core.types import Payload

HOLD = """
import sys
from fedtune.core.temporary import temporary_folder
with temporary_folder() as folder:
    (folder / "inside").mkdir()
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(temporary.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def holder() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    said = cast(IO[str], process.stdout).readline()  # a pipe, as asked for
    return process, Path(said.strip())


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(place: Path) -> None:
    dead, left = holder()
    alive, kept = holder()
    others = [place / name for name in (f"{PREFIX}0123.lock", "fedtune-abcdefgh", "someone-elses")]
    others[0].touch()
    for other in others[1:]:
        other.mkdir()
    (place / f"{PREFIX}link").symlink_to(others[2])
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert (left / "inside").is_dir() and (kept / "inside").is_dir()
    with temporary_folder() as own:
        assert not left.exists() and (kept / "inside").is_dir()
        assert own.parent == place and stat.S_IMODE(own.stat().st_mode) == 0o700
        sweep.__wrapped__(str(place))  # another thread of this process, or the next process
        assert own.is_dir() and kept.is_dir()
    assert not own.exists()
    assert all(other.exists() for other in others) and (place / f"{PREFIX}link").is_symlink()
    alive.communicate("")  # its end is as it was meant
    assert not kept.exists()


def test_a_folder_that_is_swept_before_it_is_locked_is_made_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = temporary.tempfile.TemporaryDirectory
    swept: list[Path] = []

    def swept_at_once(prefix: str) -> object:
        found = made(prefix=prefix)
        if not swept:
            swept.append(Path(found.name))
            sweep.__wrapped__(str(place))
        return found

    monkeypatch.setattr(temporary.tempfile, "TemporaryDirectory", swept_at_once)
    with temporary_folder() as folder:
        assert folder.is_dir() and folder != swept[0] and not swept[0].exists()
    assert list(place.iterdir()) == []


def test_a_run_takes_away_what_was_left(place: Path) -> None:
    from fedtune.federation.claim import claimed

    dead, left = holder()
    dead.kill()
    dead.wait()
    sweep.cache_clear()
    with claimed(place / "run", place):
        assert not left.exists()


def test_a_store_drops_what_a_killed_process_was_writing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(Payload(scalars={"a": 1}))
    ended = subprocess.Popen(["true"])
    ended.wait()
    half, written = tmp_path / f".{'a' * 64}.{ended.pid}.new", tmp_path / f".{'b' * 64}.{os.getppid()}.new"
    half.touch()
    written.touch()
    store.retain([])
    assert not half.exists() and written.exists()
