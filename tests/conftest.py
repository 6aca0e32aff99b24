from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from judge_server import Judge, Playing
from toolchains import toolchains

from fedtune.evaluation.compilers import Toolchain
from fedtune.registry import forgotten_afterwards

# no deadline for one example: on a busy machine the first takes long, which says nothing about the code
settings.register_profile("fedtune", deadline=None)
settings.load_profile("fedtune")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, which only the project's own machines have."""
    return _present(SHARED / "data")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of small real models, which only the project's own machines have."""
    return _present(SHARED / "models")


def _present(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"the real {folder.name} of ../shared are not on this machine")
    return folder


@pytest.fixture
def playing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Playing]:
    """Starts a judge on this machine; it ends with the test."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running: list[Judge] = []

    def start(play: Judge.Play) -> Judge:
        server = Judge(play)
        running.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    yield start
    for server in running:
        server.over.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def parts_as_before() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    with forgotten_afterwards():
        yield


@pytest.fixture(scope="module")
def cpp() -> Iterator[Toolchain]:
    """What compiles and runs C++ here, apart from everything else."""
    yield from toolchains("cpp")


@pytest.fixture(scope="module")
def java() -> Iterator[Toolchain]:
    """The same of Java."""
    yield from toolchains("java")


@pytest.fixture(scope="module")
def go() -> Iterator[Toolchain]:
    """The same of Go."""
    yield from toolchains("go")
