"""`fedtune report`: one page that holds what the run folders hold, and nothing from elsewhere."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command import fedtune
from rich.table import Table
from run_folder import made

from fedtune.errors import InputError
from fedtune.federation.folder import RunFolder
from fedtune.report.display import Display
from fedtune.report.folders import read_runs
from fedtune.report.page import report
from fedtune.report.tables import print_whole, rounds_and_clients

pytest.importorskip("matplotlib")


class Cells(HTMLParser):
    """The text of each table row, and every address the page points to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_numbers_of_two_runs(tmp_path: Path) -> None:
    one = made(tmp_path / "one", [4.25, 3.0, 2.5], status="done", payload_bytes_per_client_round=1500)
    two = made(tmp_path / "two", [4.25, None, 3.5])
    runs = read_runs([one, two])
    assert runs[0].sent() == {0: 0, 1: 1500, 2: 3000} and runs[1].curve("loss", "loss") == {0: 4.25, 2: 3.5}
    page = report(runs)
    cells = Cells(page)
    assert [
        "one",
        "fedavg",
        "2",
        "done",
        "2.00 kB",
        "1.00 kB",
        "1.50 kB",
        "20 B",
        "4.5",
    ] in cells.rows
    assert [
        "two",
        "fedavg",
        "2",
        "not finished",
        "2.00 kB",
        "1.00 kB",
        "",
        "20 B",
        "4.5",
    ] in cells.rows
    assert ["one", "loss", "4.2500", "2.5000 [1.5000, 3.5000]", "2"] in cells.rows
    assert ["two", "loss", "4.2500", "3.5000 [2.5000, 4.5000]", "2"] in cells.rows
    assert ["one", "1", "7", "<late>"] in cells.rows and "<late>" not in page
    # the curves against rounds, bytes and seconds, the training loss, memory; all in the page itself
    assert len(cells.addresses) == 3
    assert all(address.startswith("data:image/svg+xml;base64,") for address in cells.addresses)
    assert all(b"</svg>" in base64.b64decode(address.partition(",")[2]) for address in cells.addresses)
    assert not re.search(r"<script|https?://", page)
    assert report(runs) == page


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in "ab":
        (tmp_path / parent).mkdir()
        made(tmp_path / parent / "run", [1.0])
    assert [run.name for run in read_runs([tmp_path / "a/run", tmp_path / "b/run"])] == ["a/run", "b/run"]


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    run = made(tmp_path / "run", [1.0])
    with pytest.raises(InputError, match="named twice"):
        read_runs([run, tmp_path / "." / "run"])
    with pytest.raises(InputError, match="no such folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="has no round yet"):
        read_runs([made(tmp_path / "new", [])])


def test_the_command_writes_once(tmp_path: Path) -> None:
    made(tmp_path / "run", [2.0, 1.0])
    done = fedtune("report", "run", "--out", "page.html", cwd=tmp_path)
    assert (done.status, done.out) == (0, "page.html\n"), done.err
    before = (tmp_path / "page.html").read_bytes()
    again = fedtune("report", "run", "--out", "page.html", cwd=tmp_path)
    assert again.status == 2 and "exists already" in again.err
    assert (tmp_path / "page.html").read_bytes() == before
    nowhere = fedtune("report", "run", "--out", "a/page.html", cwd=tmp_path)
    assert nowhere.status == 2 and "no folder a" in nowhere.err


def test_names_are_no_mathematics_and_no_markup(tmp_path: Path) -> None:
    """matplotlib reads $...$ as mathematics and leaves _names out of its legends."""
    named = ["x$\\bad{$", "a$b$c", "_hidden", "x["]
    runs = [made(tmp_path / name, [2.0, 1.0, 0.5]) for name in named]
    page = report(read_runs(runs))
    pictures = [base64.b64decode(text).decode() for text in re.findall(r"base64,([^\"]*)", page)]
    assert len(pictures) == 3
    for picture in pictures:
        for name in named:  # drawn as it is: a comment stands before the outlines of each text
            assert f"<!-- {' ' * name.startswith('_')}{name} -->" in picture
    for task in ("$a{$", "_$"):
        (tmp_path / "own").mkdir(exist_ok=True)
        run = made(tmp_path / "own" / task, [])
        folder = RunFolder.open(run)
        for round in range(2):
            scores = {task: {"$\\frac{": 1.0}}
            folder.append("rounds.jsonl", {"round": round, "clients": [], "train_loss": None, "eval": scores})
        lines = (run / "rounds.jsonl").read_text().replace('"eval"', '"seconds": 0.0, "eval"')
        (run / "rounds.jsonl").write_text(lines)
        assert "data:image/svg+xml" in report(read_runs([run]))


def test_names_in_a_terminal_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="[/title]")
    for name in ("x[/red]", "[bold]"):
        table.add_column(name)
    table.add_row("[/red]", "[link=a]")
    print_whole([table])
    with Display("[/label]: ") as display:
        display.begin(2, "[/red]")
        display.scores(1, {"[/task]": {"[red]": 1.0}})
    shown = capsys.readouterr()
    for name in ("[/title]", "x[/red]", "[bold]", "[/red]", "[link=a]"):
        assert name in shown.out
    assert shown.err == "[/red]: round 1: [red] 1.0000\n"


def test_lengths_of_updates_are_shown_where_they_were_recorded(tmp_path: Path) -> None:
    old = made(tmp_path / "old", [2.0, 1.0])
    new = made(tmp_path / "new", [2.0, 1.0])
    entries = [json.loads(line) for line in (new / "rounds.jsonl").read_text().splitlines()]
    entries[1]["updates"] = {"0": {"norm": 0.5, "cosine": 0.25}, "1": {"norm": 2.0}, "2": {"norm": 40.0}}
    entries[1]["stands_out"] = {"2": "the norm of its update, 40, is <32> times the median"}
    (new / "rounds.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    rows = Cells(report(read_runs([old, new]))).rows
    lengths = rows[rows.index(["run", "median norm", "longest", "of client", "in round"]) + 1]
    assert (lengths[0], float(lengths[1]), float(lengths[2]), lengths[3:]) == ("new", 2.0, 40.0, ["2", "1"])
    assert ["new", "1", "2", "the norm of its update, 40, is <32> times the median"] in rows
    assert "Clients' updates" not in report(read_runs([old]))


def test_the_cost_says_how_many_clients_a_round_asked() -> None:
    sent = {"down": 6_000, "up": 2_000}  # 8,000 bytes

    def said(rounds: int, clients: int, each: float) -> str:
        return rounds_and_clients(
            {
                "rounds": rounds,
                "clients": clients,
                "payload_bytes": sent,
                "payload_bytes_per_client_round": each,
            }
        )

    assert said(2, 20, 1_000.0) == "2 x 4 of 20"  # 8 client-rounds
    assert said(4, 2, 1_000.0) == "4 x 2"
    assert said(3, 20, 8_000 / 5) == "3 x 1.67 of 20"  # five answered
    assert said(2, 1_200, 8_000 / 2_400) == "2 x 1200"
    assert said(0, 7, 0.0) == "0 x 7" and said(1, 7, 0.0) == "1 x 7"


def test_grids_of_pictures_stand_beside_each_other(tmp_path: Path) -> None:
    """Rows are prompts: before any training, and what each run came to; the rounds between are below."""
    for name, rounds in {"one": 2, "many": 3}.items():
        run = made(tmp_path / name, [2.0] * rounds)
        (run / "pictures").mkdir()
        for round in range(rounds):
            (run / "pictures" / f"round-{round:04d}.png").write_bytes(f"{name} {round}".encode())
    page = report(read_runs([tmp_path / "one", tmp_path / "many"]))
    beside, below = re.findall(r'<div class="beside">(.*?)</div>', page)
    captions = [re.findall("<figcaption>(.*?)</figcaption>", some) for some in (beside, below)]
    assert captions[0] == ["one: round 0000", "one: round 0001", "many: round 0002"]
    assert captions[1] == ["many: round 0000", "many: round 0001"]
    assert [base64.b64decode(text) for text in re.findall('base64,([^"]*)', beside)] == [
        b"one 0",
        b"one 1",
        b"many 2",
    ]
