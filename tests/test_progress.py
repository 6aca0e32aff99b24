"""What is shown of a client's steps: each one is told, the bar moves with it, a log has a line a minute."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

import fedtune
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.report import notebook
from fedtune.report.display import Display
from fedtune.transport import worker as workers
from fedtune.transport.acceptance import Acceptance
from fedtune.transport.messages import Message, of_part
from fedtune.transport.worker import JoinedRun, Worker

METHODS: dict[str, dict[str, Any]] = {
    "epochs": {"name": "fedavg", "lora": {"rank": 2}, "local_epochs": 2, "batch_size": 4},
    "fedkseed": {"name": "fedkseed", "local_steps": 3, "seeds": 8},
    "infinite-pool": {"name": "infinite-pool", "local_steps": 3},
    "fedcybgd": {"name": "fedcybgd", "local_steps": 3, "batch_size": 4},
}


class Steps(Silent):
    def __init__(self) -> None:
        self.told = list[tuple[int, int, int]]()

    def step(self, client: int, done: int, total: int) -> None:
        self.told.append((client, done, total))


@pytest.mark.parametrize("method", METHODS)
def test_each_step_of_each_client_is_told_before_it_is_taken(method: str, tmp_path: Path) -> None:
    config = fedtune.load(
        {
            "data": {"train": "bundled", "clients": 2, "max_examples": 12, "max_length": 64},
            "method": {"rounds": 1, **METHODS[method]},
            "evaluation": {"tasks": ["loss"], "max_examples": 4},
        }
    )
    steps = Steps()
    run(config, tmp_path / "run", steps)
    examples = [client["examples"] for client in fedtune.open(tmp_path / "run").clients]
    totals = [2 * -(-count // 4) if method == "epochs" else 3 for count in examples]
    assert steps.told == [(c, done, total) for c, total in enumerate(totals) for done in range(total)]


def shown(clock: list[float]) -> tuple[Display, io.StringIO]:
    """A display that is no terminal, by a clock of the test's."""
    display = Display(now=lambda: clock[0])
    written = io.StringIO()
    display.console = Console(file=written, width=200, force_terminal=False)
    return display, written


def test_without_a_terminal_there_is_a_line_a_minute_and_not_more() -> None:
    clock = [0.0]
    display, written = shown(clock)
    display.begin(3, "fedavg")
    display.round(2, 4)
    for second in range(0, 200, 10):
        clock[0] = float(second)
        display.step(7, second, 500)
    display.client(1)
    clock[0] = 230.0
    display.note("a note")
    clock[0] = 285.0
    display.stage("evaluating")
    clock[0] = 290.0
    display.stage("evaluating")
    assert written.getvalue().splitlines() == [
        "fedavg: round 2 of 3, 0 of 4 clients, client 7: step 60 of 500",
        "fedavg: round 2 of 3, 0 of 4 clients, client 7: step 120 of 500",
        "fedavg: round 2 of 3, 0 of 4 clients, client 7: step 180 of 500",
        "a note",
        "fedavg: evaluating",
    ]


def test_the_bar_moves_within_a_clients_work(monkeypatch: pytest.MonkeyPatch) -> None:
    display, _ = shown([0.0])
    moved = list[float]()
    monkeypatch.setattr(
        Progress, "update", lambda self, task, completed=None, **more: moved.append(completed)
    )
    display.begin(2, "x")
    display.round(2, 4)
    display.client(1)
    display.step(3, 5, 20)
    assert moved[-3:] == [4, 5, 5.25]
    display.step(3, 0, 0)  # a client without a step
    assert moved[-1] == 5


def test_a_notebook_names_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    display = notebook.NotebookDisplay()
    display.begin(2, "fedavg")
    display.round(1, 4)
    monkeypatch.setattr(notebook.time, "monotonic", lambda: 1e12)
    display.step(3, 5, 20)
    assert "round 1 of 2, client 3: step 5 of 20" in repr(display)


def test_a_clients_log_has_a_line_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, clock = list[str](), [1000.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: clock[0])

    class Runner:
        on_step: Any = None
        states: dict[int, Any] = {}  # noqa: RUF012

        def handle(self, client: int, frame: Any) -> bytes:
            for step in range(10):
                clock[0] += 25.0
                self.on_step(client, step, 10)
            return b"reply"

    joined = JoinedRun(Runner(), 4, "fedavg")  # type: ignore[arg-type]
    worker = Worker(lambda fields: joined, Acceptance(), tmp_path, said.append)
    worker.answer(Message({"do": "join", "run": "ab", "client": 0}))
    about = {"do": "order", "run": "ab", "round": 3, "bytes": 5, "at": 0, "state": 0}
    answer = worker.answer(Message({**about, **of_part(b"order")}, b"order"))
    assert bytes(answer.body) == b"reply"  # type: ignore[arg-type]
    assert said == [
        "joined run ab (fedavg) with 4 examples",
        "round 3: order of 5 bytes",
        *(f"step {step} of 10" for step in (2, 5, 8)),
        "round 3: reply of 5 bytes after 250.00 s",
    ]
