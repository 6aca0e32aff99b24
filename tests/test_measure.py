"""The clock's arithmetic, on a clock that the test turns by hand, and what a run says of its environment."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from fedtune.measure import clock
from fedtune.measure.environment import environment, git_state


class Hand:
    """A clock's hand that only the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr(time, "perf_counter", hand)
    return hand


def test_parts_add_up_and_time_between_them_is_in_the_total_alone(hand: Hand) -> None:
    watch = clock.Clock()
    for seconds in (2.0, 3.0):
        with watch.part("training"):
            hand.now += seconds
        hand.now += 10.0
    with watch.part("evaluation"):
        hand.now += 1.0
    assert watch.seconds == {"training": 5.0, "evaluation": 1.0}
    assert watch.total == 26.0


def test_an_inner_part_stops_the_outer_one(hand: Hand) -> None:
    watch = clock.Clock()
    with watch.part("aggregation"):
        hand.now += 1.0
        with watch.part("training"):
            hand.now += 20.0
            with watch.part("aggregation"):
                hand.now += 2.0
            hand.now += 30.0
        hand.now += 4.0
    assert watch.seconds == {"aggregation": 7.0, "training": 50.0}
    assert watch.total == 57.0


def test_a_part_that_raises_is_counted_and_closed(hand: Hand) -> None:
    watch = clock.Clock()
    with pytest.raises(KeyError), watch.part("training"):
        hand.now += 3.0
        raise KeyError
    hand.now += 5.0
    with watch.part("evaluation"):
        hand.now += 1.0
    assert watch.seconds == {"training": 3.0, "evaluation": 1.0}


def test_environment_names_versions_and_device() -> None:
    found = environment()
    packages = found["packages"]
    assert isinstance(packages, dict)
    assert packages["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # cpu or cu132 of one
    assert found["threads"] == torch.get_num_threads()
    assert set(found) == {"packages", "python", "platform", "device", "threads", "git"}
    assert json.loads(json.dumps(found)) == found


def test_environment_tells_nothing_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDTUNE_TEST_SECRET", "hunter2-in-a-variable")
    monkeypatch.chdir(tmp_path)
    text = json.dumps(environment())
    for private in (
        "hunter2-in-a-variable",
        str(tmp_path),
        str(Path.home()),
        os.uname().nodename,
        os.getcwd(),
    ):
        assert f'"{private}' not in text


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *command], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    try:
        git(tmp_path, "init", "--quiet")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    return tmp_path


def test_git_revision_and_dirty_flag(checkout: Path) -> None:
    nothing = {"revision": None, "dirty": None}
    assert git_state(checkout) == nothing  # no commit yet
    (checkout / "a.txt").write_text("1")
    git(checkout, "add", "a.txt")
    git(checkout, "commit", "--quiet", "-m", "first")
    revision = git(checkout, "rev-parse", "HEAD")
    assert git_state(checkout) == {"revision": revision, "dirty": False}
    (checkout / "a.txt").write_text("2")
    assert git_state(checkout) == {"revision": revision, "dirty": True}
    # a package installed below another project's repository is not that project
    (checkout / "site-packages").mkdir()
    assert git_state(checkout / "site-packages") == nothing


def test_without_git_there_is_no_revision_and_no_error(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
    assert git_state(checkout) == {"revision": None, "dirty": None}


def test_a_git_that_hangs_is_given_up(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: object, timeout: float, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("git", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert git_state(checkout) == {"revision": None, "dirty": None}
