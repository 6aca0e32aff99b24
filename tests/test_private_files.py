"""Who may read what a federation writes: the user alone, whatever the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import write_config

import fedtune
from fedtune.core.permissions import make_private
from fedtune.core.types import Arrival
from fedtune.deploy import client as deployed_client
from fedtune.errors import InputError
from fedtune.federation.journal import Journal


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def open_to_others(folder: Path) -> list[str]:
    return [str(path) for path in (folder, *folder.rglob("*")) if mode(path) & 0o077]


@pytest.fixture(autouse=True)
def wide_open() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


class Replies:
    """One client's reply a round."""

    def exchange(self, round: int, frames: Any, *, in_plan_order: bool) -> Iterator[Arrival]:
        yield from (Arrival(client, b"its weights") for client, _ in frames)


def test_a_journal_is_its_users_also_one_that_was_begun_before(tmp_path: Path) -> None:
    journal, path = Journal(Replies(), tmp_path, {}), tmp_path / "round-0003.replies"
    list(journal.exchange(3, [(0, b"order")], in_plan_order=True))
    assert mode(path) == 0o600
    path.chmod(0o644)  # an earlier version's
    list(journal.exchange(3, [(1, b"order")], in_plan_order=True))
    assert mode(path) == 0o600
    (tmp_path / "other").touch()
    assert mode(tmp_path / "other") == 0o666  # nothing else of a run on one machine


def test_a_folder_is_taken_from_all_others_and_links_are_not_followed(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "checkpoints/round-0001").mkdir(parents=True)
    (run / "checkpoints/round-0001/state.json").touch()
    (run / "tool").touch(0o755)
    elsewhere.touch()
    (run / "link").symlink_to(elsewhere)
    (run / "nowhere").symlink_to(tmp_path / "nothing")
    make_private(run)
    assert mode(run) == mode(run / "checkpoints/round-0001") == mode(run / "tool") == 0o700
    assert mode(run / "checkpoints/round-0001/state.json") == 0o600 and mode(elsewhere) == 0o666
    make_private(tmp_path / "nothing")


def test_a_file_of_another_user_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rounds.jsonl").touch()

    def refused(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "chmod", refused)
    with pytest.raises(InputError, match=r"cannot be closed to them: Operation not permitted: .*Give this"):
        make_private(tmp_path)


def test_a_server_keeps_its_run_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    from fedtune.api import network
    from fedtune.deploy.keys import make_keys

    make_keys(tmp_path / "fed", ["localhost"], ["north"], days=2)
    document = {"data": {"train": "clients", "clients": 1, "holdout": {"source": "bundled"}}}
    config = write_config(tmp_path / "c.yaml", document)
    seen: list[list[str]] = []

    def federate(config: Any, path: Path, *others: Any, **more: Any) -> None:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        (path / "rounds.jsonl").write_text("{}\n")
        seen.append(open_to_others(path))

    monkeypatch.setattr(network, "federate", federate)
    old = tmp_path / "old"
    (old / "checkpoints").mkdir(parents=True)
    (old / "checkpoints/round-0001.replies").touch()
    for run, resume in ((tmp_path / "new", False), (old, True)):
        fedtune.serve(config, keys=tmp_path / "fed/server", out=run, resume=resume, progress=False)
        assert open_to_others(run) == []
    assert seen == [[], []]
    (tmp_path / "after").touch()
    assert mode(tmp_path / "after") == 0o666  # the process's own umask is back


def test_a_client_keeps_its_folder_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    from fedtune.deploy.keys import make_keys

    make_keys(tmp_path / "fed", ["localhost"], ["north"], days=2)
    keys, state = tmp_path / "fed/clients/north", tmp_path / "fed/clients/north/state"
    (state / "ab12").mkdir(parents=True)
    (state / "ab12/round-000001").touch()  # an earlier version's
    (tmp_path / "d.jsonl").write_text('{"instruction": "a", "output": "b"}\n')

    class Node:
        """Flower's node, which fails at once."""

        def __init__(self, setup: Any, *address: Any) -> None:
            (setup.state / "supernode.log").touch()
            raise InputError("no network here")

    monkeypatch.setattr(deployed_client, "Node", Node)
    with pytest.raises(InputError, match="no network here"):
        fedtune.take_part("localhost:1", keys=keys, data=tmp_path / "d.jsonl", device="cpu")
    assert open_to_others(state) == [] and (state / "supernode.log").exists()
