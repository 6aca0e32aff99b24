"""A report and the documentation's start in a real browser: light and dark, narrow and wide."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from run_folder import made

from fedtune.report.folders import read_runs
from fedtune.report.page import report

pytest.importorskip("matplotlib")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")
SEEN = """<script>addEventListener("load", () => {
  const style = getComputedStyle(document.body), root = document.documentElement;
  document.body.append(Object.assign(document.createElement("pre"), {id: "seen", textContent: JSON.stringify({
    wide: root.scrollWidth, window: root.clientWidth, text: style.color,
    images: [...document.images].map(image => image.naturalWidth),
    boxes: [...document.querySelectorAll("h1, h2, table, img")].map(part => {
      const box = part.getBoundingClientRect();
      return [part.tagName, box.left, box.right, box.top, box.bottom];
    }),
    dark: matchMedia("(prefers-color-scheme: dark)").matches})}));
});</script>"""


def seen(page: Path, width: int, *, dark: bool) -> Any:
    """What a browser says of a page that is so wide, in pixels."""
    shown = page.with_suffix(".seen.html")
    shown.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{SEEN}</body>"), encoding="utf-8")
    assert BROWSER is not None
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            *(f"--user-data-dir={page.parent / 'browser'}", f"--window-size={width},900", "--dump-dom"),
            shown.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)
    assert found is not None, done.stderr
    return json.loads(unescape(found.group(1)))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [500, 1300])
def test_a_report_fits_its_window_and_its_colours(tmp_path: Path, width: int, dark: bool) -> None:
    runs = [made(tmp_path / name, [4.25, 3.0, 2.5]) for name in ("one", "a-name-that-is-rather-long", "c")]
    page = tmp_path / "report.html"
    page.write_text(report(read_runs(runs)), encoding="utf-8")
    found = seen(page, width, dark=dark)
    assert found["dark"] is dark
    assert found["wide"] <= found["window"]  # tables and figures scroll or shrink; the page does not
    assert len(found["images"]) == 3 and all(found["images"])
    light = sum(map(int, re.findall(r"\d+", found["text"])[:3])) > 3 * 128
    assert light is dark  # the text against its ground


# Which parts there are, in order, where each begins, and of figures their shape (width by height).
# Heights of text are those of a machine's fonts; a figure's letters are outlines, the same everywhere.
LEFT, RIGHT = "left", "beside the one before"
PARTS = [
    *(("H1", LEFT, 0), ("TABLE", LEFT, 0), ("TABLE", LEFT, 0), ("H2", LEFT, 0)),
    *(("IMG", LEFT, 3.88), ("IMG", LEFT, 1.62), ("IMG", RIGHT, 2.04)),
    *(("H2", LEFT, 0), ("TABLE", LEFT, 0), ("H2", LEFT, 0)),
]


@pytest.mark.parametrize(("width", "edge", "beside"), [(500, 16.0, False), (1300, 82.5, True)])
def test_the_parts_of_a_report_lie_where_they_lay(
    tmp_path: Path, width: int, edge: float, beside: bool
) -> None:
    runs = [made(tmp_path / name, [4.25, 3.0, 2.5]) for name in ("one", "a-name-that-is-rather-long", "c")]
    page = tmp_path / "report.html"
    page.write_text(report(read_runs(runs)), encoding="utf-8")
    found = seen(page, width, dark=False)
    assert [box[0] for box in found["boxes"]] == [tag for tag, _, _ in PARTS]
    before = (0.0, 0.0, 0.0, 0.0)
    for (tag, left, right, top, bottom), (_, where, shape) in zip(found["boxes"], PARTS, strict=True):
        assert right > left and bottom > top
        if where == RIGHT and beside:
            assert left > before[1] and top < before[3]  # in one row, and not over each other
        else:
            assert left == pytest.approx(edge, abs=2) and top >= before[3]
        if tag != "TABLE":  # a table that is wider scrolls in its own frame
            assert right <= found["window"]
        if shape:
            assert (right - left) / (bottom - top) == pytest.approx(shape, rel=0.02)
        before = (left, right, top, bottom)
