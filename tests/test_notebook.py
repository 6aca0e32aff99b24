"""The notebook of the first hour, executed as a person would; and how a run shows itself in one."""

from __future__ import annotations

import asyncio
import html
import json
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.formatters import HTMLFormatter
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from fedtune.report import notebook
from fedtune.report.notebook import NotebookDisplay

FILE = Path(__file__).resolve().parents[1] / "docs" / "notebooks" / "first_steps.ipynb"
HANG_S = 120


def execute(book: Any, folder: Path) -> Any:
    """Executes a notebook in a folder, in this interpreter whatever kernels are installed."""
    kernel = AsyncKernelManager()
    kernel.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    client = NotebookClient(book, km=kernel, resources={"metadata": {"path": str(folder)}})

    async def to_the_end() -> None:
        async with asyncio.timeout(HANG_S):
            await client.async_execute()

    asyncio.run(to_the_end())
    return book


def code_cells(book: Any) -> dict[str, Any]:
    return {cell["id"]: cell for cell in book.cells if cell.cell_type == "code"}


def texts(cell: Any) -> str:
    """Everything that a cell shows as text."""
    shown = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs]
    return "\n".join(shown)


def bars(cell: Any) -> list[str]:
    found = [out.get("data", {}).get("text/html", "") for out in cell.outputs]
    return [text for text in found if "<progress" in text]


def test_it_is_a_valid_notebook_without_outputs() -> None:
    book = nbformat.read(FILE, as_version=4)
    nbformat.validate(book)
    cells = code_cells(book)
    assert list(cells) == [
        *("configure", "plan", "run", "rounds", "clients"),
        *("plot", "generate", "method", "compare", "export"),
    ]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells.values())
    assert len({cell["id"] for cell in book.cells}) == len(book.cells)
    pages = re.findall(r"\]\((?!http)([^)]+)\)", FILE.read_text(encoding="utf-8"))
    assert pages and [page for page in pages if not (FILE.parent / page).is_file()] == []


@pytest.mark.slow
def test_the_first_hour(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    began = time.perf_counter()
    book = execute(nbformat.read(FILE, as_version=4), tmp_path)
    took = round(time.perf_counter() - began, 1)
    record_property("seconds", took)
    print(f"first_steps.ipynb: {took} s")
    cells = code_cells(book)
    for name, cell in cells.items():
        kinds = [out.output_type for out in cell.outputs]
        assert "error" not in kinds
        assert not [out for out in cell.outputs if out.get("name") == "stderr"], name
    # one output a run, redrawn in place until its end
    for name, steps in (("run", 16), ("method", 16), ("compare", 1)):
        (bar,) = bars(cells[name])
        assert bar.startswith(f'<progress value="{steps}" max="{steps}"></progress> done<div>')
    assert "<div>fedavg: round 4: loss" in bars(cells["run"])[0]
    assert "<div>one-shot, seed 1: round 1: loss" in bars(cells["compare"])[0]
    # what stands on disk is what is shown
    summary = json.loads((tmp_path / "runs/fedavg/summary.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "runs/fedavg/rounds.jsonl").read_text(encoding="utf-8").splitlines()
    table = html.unescape(cells["rounds"].outputs[0].data["text/html"])
    for line in map(json.loads, lines):
        assert f"<td>{line['eval']['loss']['loss']:.6f}</td>" in table
    assert re.findall(r"<th>(\d)</th>", table) == ["0", "1", "2", "3", "4"]
    assert "all rounds and clients send 1.05 MB" in texts(cells["plan"])
    assert sum(summary["payload_bytes"].values()) == 1_048_576
    assert "Run('runs/fedavg', fedavg, done)" in texts(cells["run"])
    assert cells["clients"].outputs[0].data["text/html"].count("<td>131072</td>") == 4 * 2
    assert len(cells["plot"].outputs) == 1 and "image/png" in cells["plot"].outputs[0].data
    assert texts(cells["generate"]) == "['saw', 'birch']"
    assert (tmp_path / "runs/topk/final/adapter_model.safetensors").is_file()
    assert cells["compare"].outputs[-1].data["text/markdown"].count("\n| ") == 2 + 5
    rows = json.loads((tmp_path / "runs/compare/compare.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["config"], row["seed"]) for row in rows[:4]] == [
        ("4 rounds", 0),
        ("4 rounds", 1),
        ("one-shot", 0),
        ("one-shot", 1),
    ]
    assert texts(cells["export"]).endswith("Run('runs/fedavg', fedavg, done) True\n")
    assert (tmp_path / "runs/fedavg-adapter/adapter_model.safetensors").is_file()


SETTINGS = """
import fedtune
ROWS = [{"instruction": f"Add {a} and {b}.", "output": str(a + b)} for a in range(5) for b in range(5)]
CONFIG = fedtune.load({
    "data": {"clients": 2},
    "method": {"name": "fedavg", "rounds": 3, "local_steps": 1, "lora": {"rank": 2}},
    "evaluation": {"bootstrap": 0},
})
"""
METHOD = """
from typing import Literal
from fedtune.methods.fedavg.method import Config, FedAvg, State

class MineConfig(Config):
    name: Literal["mine"] = "mine"

@fedtune.register_method("mine", config=MineConfig, state=State)
class Mine(FedAvg):
    "Mine."

made = fedtune.run(CONFIG, "method.name=mine", "method.rounds=1", data=ROWS, progress=False)
print(made)
"""
STOPPED = """
class Stop:
    def on_round(self, round, scores, state):
        if round == 2:
            raise KeyboardInterrupt

fedtune.run(CONFIG, data=ROWS, callbacks=[Stop()])
"""
GO_ON = """
resumed = fedtune.open("runs/fedavg", data=ROWS).resume()
print(resumed, len(resumed.rounds))
resumed.resume()
"""


def book_of(*sources: str, failing: int = -1) -> Any:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    if failing >= 0:
        cells[failing].metadata["tags"] = ["raises-exception"]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.slow
def test_cells_run_again_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    book = execute(book_of(SETTINGS, METHOD, METHOD, STOPPED, GO_ON, failing=3), tmp_path)
    _, first, again, stopped, on = book.cells
    assert "Run('runs/mine', mine, done)" in texts(first)
    assert "Run('runs/mine-2', mine, done)" in texts(again)
    assert stopped.outputs[-1].ename == "KeyboardInterrupt"
    (bar,) = bars(stopped)
    assert 'value="4" max="6"></progress> fedavg: ended by KeyboardInterrupt<div>' in bar
    assert 'kept: fedtune.open("runs/fedavg", data=...).resume() goes on.</div>' in html.unescape(bar)
    assert "Run('runs/fedavg', fedavg, done) 4" in texts(on)
    assert bars(on)[-1] == '<progress value="1" max="1"></progress> done'  # nothing was left to do


shown = HTMLFormatter()  # as a notebook asks an object for HTML


def test_a_bar_that_counted_nothing_stands_still_at_the_end() -> None:
    display = NotebookDisplay()
    display.stage("loading <data>")
    assert shown(display) == '<progress max="1"></progress> loading &lt;data&gt;'  # it moves
    display.__exit__(None, None, None)
    assert shown(display) == '<progress value="1" max="1"></progress> done'
    display = NotebookDisplay()
    display.__exit__(ValueError, ValueError(), None)
    assert shown(display) == '<progress value="0" max="1"></progress> ended by ValueError'


def test_tqdm_is_imported_without_its_warning_in_a_notebook_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def importing(name: str) -> None:
        taken.append(name)
        warnings.warn("IProgress not found", stacklevel=1)

    monkeypatch.setattr(notebook.importlib, "import_module", importing)
    monkeypatch.delitem(sys.modules, "tqdm.auto", raising=False)
    before = list(warnings.filters)
    notebook.import_bars_quietly()
    assert taken == []
    monkeypatch.setattr(notebook, "in_notebook", lambda: True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        notebook.import_bars_quietly()
    assert (taken, seen, list(warnings.filters)) == (["tqdm.auto"], [], before)


def test_an_error_of_a_cell_is_one_of_the_notebook(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(book_of("1 / 0"), tmp_path)
