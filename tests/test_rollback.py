"""A run set back to an earlier round: it goes on as if it had never gone further, and nothing is lost."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import Result, fedtune, lines, outcome, write_config

SEEDS = {"local_steps": 3, "seeds": 16, "lr": 1e-4}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "fedavg", "local_steps": 1, "lora": {"rank": 2}},
    "scaffold": {"name": "fedavg", "local_steps": 1, "optimizer": "sgd", "control_variates": True},
    "fedbiot": {"name": "fedbiot", "local_steps": 1, "layer_dropout": 0.0},
    "fedkseed": {"name": "fedkseed", **SEEDS},
    "fedkseed-pro": {"name": "fedkseed-pro", **SEEDS},
}
LOGS = ("rounds.jsonl", "wire.jsonl", "memory.jsonl")


def config(name: str, keep: int | None = None) -> dict[str, Any]:
    return {
        "data": {"clients": 4, "max_examples": 16, "max_length": 64},
        "method": {**METHODS[name], "rounds": 3, "batch_size": 2},
        "federation": {"clients_per_round": 0.75},  # so that some hold an older round's content
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "every": 0},
        "checkpoints": {"keep": keep, "journal": "always"},
    }


def start(folder: Path, *more: str, **limits: Any) -> Result:
    return fedtune("run", "c.yaml", "--quiet", *more, cwd=folder, **limits)


def result(run: Path) -> dict[str, Any]:
    """The outcome of a run, without what a rollback moved aside."""
    found = outcome(run)
    found["folder"] = [name for name in found["folder"] if not name.startswith(("rolled-back-", ".rollback"))]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a run of three rounds, all of whose checkpoints were kept; to be copied."""
    known: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in known:
            folder = known[name] = tmp_path_factory.mktemp(name)
            write_config(folder / "c.yaml", config(name))
            done = start(folder, "--out", "run")
            assert done.status == 0, done.err
        return known[name]

    return of


@pytest.mark.parametrize(("name", "back_to"), [(name, 1 + i % 2) for i, name in enumerate(METHODS)])
def test_it_goes_on_as_if_it_had_never_gone_further(
    name: str, back_to: int, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    original, run = finished(name) / "run", tmp_path / "run"
    shutil.copytree(original, run)
    write_config(tmp_path / "c.yaml", config(name))
    done = start(tmp_path, "--resume", "run", f"checkpoints.rollback={back_to}")
    assert done.status == 0, done.err
    assert result(run) == outcome(original)
    kept = run / "rolled-back-1"
    for log in LOGS:  # what was there is there, in two parts
        later = (kept / log).read_bytes()
        assert later and (original / log).read_bytes().endswith(later)
        assert all(entry["round"] > back_to for entry in lines(kept / log))
    moved = [original / f"checkpoints/round-{r:04d}" for r in range(back_to + 1, 4)] + [original / "final"]
    files = [file for folder in moved for file in folder.rglob("*") if file.is_file()]
    for file in [original / "summary.json", *files]:
        assert (kept / file.relative_to(original)).read_bytes() == file.read_bytes()
    assert {f for f in kept.rglob("*") if f.is_file()} == {
        kept / file.relative_to(original) for file in [*files, original / "summary.json"]
    } | {kept / log for log in LOGS}
    again = start(tmp_path, "--resume", "run")  # the setting was for once
    assert again.status == 0 and not (run / "rolled-back-2").exists()


def test_twice_and_from_the_middle_of_a_round(finished: Callable[[str], Path], tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", config("fedkseed", keep=2))
    run = tmp_path / "run"
    died = start(tmp_path, "--out", "run", die_at=2, watched="round-0003.replies")
    assert died.status == -signal.SIGKILL
    replies = (run / "checkpoints/round-0003.replies").read_bytes()
    for number in (1, 2):
        done = start(tmp_path, "--resume", "run", "checkpoints.rollback=2")
        assert done.status == 0, done.err
        assert (run / f"rolled-back-{number}").is_dir()
        found, wanted = result(run), outcome(finished("fedkseed") / "run")
        del found["folder"], wanted["folder"]  # of three checkpoints two were kept
        assert found == wanted
    assert replies and (run / "rolled-back-1/checkpoints/round-0003.replies").read_bytes() == replies
    assert not (run / "rolled-back-1/final").exists() and (run / "rolled-back-2/final").is_dir()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["round-0002", "round-0003"]


AGAIN = ("checkpoints.rollback=1",)


@pytest.mark.parametrize(
    ("watched", "operation", "finish"),  # before the n-th operation on which file; what is said the next time
    [
        ("run/.rollback.json.tmp", 2, ()),
        ("run/.rollback.json.tmp", 2, AGAIN),
        ("rolled-back-1", 2, AGAIN),
        ("rolled-back-1", 6, ()),
        ("run/checkpoints/round-0003", 1, ()),
        ("run/final", 1, AGAIN),
        ("run/rollback.json", 2, ()),
    ],
)
def test_killed_in_between_it_can_be_finished(
    watched: str, operation: int, finish: tuple[str, ...], finished: Callable[[str], Path], tmp_path: Path
) -> None:
    original, run = finished("fedkseed") / "run", tmp_path / "run"
    shutil.copytree(original, run)
    write_config(tmp_path / "c.yaml", config("fedkseed"))
    died = start(tmp_path, "--resume", "run", "checkpoints.rollback=1", die_at=operation, watched=watched)
    assert died.status == -signal.SIGKILL, died.err
    done = start(tmp_path, "--resume", "run", *finish)
    assert done.status == 0, done.err
    assert result(run) == outcome(original)
    kept = run / "rolled-back-1"
    if "tmp" in watched and not finish:  # killed before anything was decided
        assert not kept.exists()
        return
    for log in LOGS:
        assert (original / log).read_bytes().endswith((kept / log).read_bytes())
        assert {entry["round"] for entry in lines(kept / log)} == {2, 3}
    assert sorted(p.name for p in kept.iterdir()) == sorted([*LOGS, "checkpoints", "final", "summary.json"])
    assert sorted(p.name for p in (kept / "checkpoints").iterdir()) == ["round-0002", "round-0003"]
    assert not (run / "rollback.json").exists() and not (run / "rolled-back-2").exists()


def test_what_cannot_be_rolled_back(finished: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished("fedkseed") / "run", run)
    shutil.rmtree(run / "checkpoints/round-0002")
    write_config(tmp_path / "c.yaml", config("fedkseed"))
    (run / "checkpoints/round-0003/state.json").write_text("{}")

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    before = files()
    for more, message in (
        (
            ("--resume", "run", "checkpoints.rollback=2"),
            "run has checkpoints of rounds 1, 3, not of 2; choose",
        ),
        (
            ("--resume", "run", "checkpoints.rollback=4"),
            "run has checkpoints of rounds 1, 3, not of 4; choose",
        ),
        (("--resume", "run", "checkpoints.rollback=3"), "checkpoint run/checkpoints/round-0003 is damaged"),
        (("--resume", "run", "checkpoints.rollback=0"), "checkpoints.rollback: input should be greater than"),
        (
            ("--out", "new", "checkpoints.rollback=1"),
            "checkpoints.rollback=1 needs a run to go back in; name",
        ),
        (("--resume", "gone", "checkpoints.rollback=1"), "needs a run to go back in; name its folder with"),
    ):
        refused = start(tmp_path, *more)
        assert refused.status == 2 and message in refused.err and "Traceback" not in refused.err
    assert files() == before
    assert not (tmp_path / "new").exists() and not (tmp_path / "gone").exists()
