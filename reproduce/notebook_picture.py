"""A run as a notebook shows it: its bar and lines, its rounds as a table, its report beside it.

Table:   the cells of docs/notebook.png and what they print; docs/watching.md, block notebook
Command: python reproduce/notebook_picture.py notebook
Time:    half a minute of a core
Needs:   nbconvert, pandas, matplotlib and chromium
Result:  held-out loss 1.729327 before, 1.081641 after three rounds, as the picture has it too
"""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from common import Entry, main

WIDTH, HEIGHT = 900, 1180  # of the window, in pixels
COLOURS = 64  # of the picture's palette: text and a curve need no more
CELLS = (
    """import fedtune

few = ("data.clients=4", "data.max_examples=100", "evaluation.max_examples=40")
run = fedtune.run("demo", *few, out="mine")""",
    """run.rounds.to_pandas()[["round", "train_loss", "loss.loss", "accuracy.accuracy"]]""",
    """from IPython.display import IFrame

run.report("mine.html")
IFrame("mine.html", 820, 560)""",
)


@cache
def executed() -> tuple[Any, str]:
    """The notebook with its outputs, and the report that it made."""
    import nbformat
    from nbclient import NotebookClient

    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    book = nbformat.v4.new_notebook(cells=cells)
    with tempfile.TemporaryDirectory() as folder:
        kernel: Any = import_module("jupyter_client").AsyncKernelManager()
        kernel.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        client = NotebookClient(book, km=kernel, resources={"metadata": {"path": folder}})
        asyncio.run(client.async_execute())
        return book, (Path(folder) / "mine.html").read_text(encoding="utf-8")


def cells() -> str:
    """The cells, and what they print as text."""
    parts = []
    for cell in executed()[0].cells:
        parts.append(f"```python\n{cell.source}\n```")
        shown = [out["data"]["text/plain"] for out in cell.outputs if "data" in out]
        table = next((text for text in shown if "train_loss" in text), "")
        parts += [f"```text\n{table}\n```"] if table else []
    return "\n\n".join(parts)


def picture() -> bytes:
    """The notebook in a browser, PNG."""
    from PIL import Image

    book, report = executed()
    page, _ = import_module("nbconvert").HTMLExporter().from_notebook_node(book)
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    inside = base64.b64encode(report.encode()).decode()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "book.html").write_text(
            page.replace('src="mine.html"', f'src="data:text/html;base64,{inside}"'), encoding="utf-8"
        )
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
        subprocess.run(
            [
                *(browser, *options, f"--user-data-dir={folder / 'browser'}"),
                *(f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={folder / 'shot.png'}"),
                *("--virtual-time-budget=10000", (folder / "book.html").as_uri()),
            ],
            check=True,
            capture_output=True,
            timeout=180,
        )
        shot, out = Image.open(folder / "shot.png").convert("RGB"), io.BytesIO()
        shot.quantize(COLOURS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
        return out.getvalue()


ENTRIES = {
    "notebook": Entry(
        cells,
        needs=("nbconvert", "pandas", "matplotlib", "PIL"),
        plots={"notebook.png": picture},
    )
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
