"""Every kind of file, folder and layout that examples are read from, with the line that is said of it.

The files are made in a temporary folder, each with two or three rows, and read with the settings that stand
beside them.

Table:   formats, kinds of files, settings and what is said; docs/data.md, block formats
Command: python reproduce/data_formats.py formats
Time:    seconds
Needs:   nothing
Result:  3 rows are read of each, with at most two settings
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from common import Entry, main, table
from pyarrow import feather, parquet

import fedtune

ROWS = [{"instruction": f"Add {n} and 1.", "output": f"{n + 1}"} for n in range(3)]
FOREIGN = [{"question": row["instruction"], "answer": {"text": [row["output"]]}} for row in ROWS]
CHOICES = [{"question": "Which is red?", "choices": ["grass", "blood"], "answer": n} for n in (1, 1, 1)]
PARTS = [{"meta": {"site.id": "north"}, "q": "Add.", "c": row["instruction"], "a": True} for row in ROWS]
TURNS = [
    {"messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": "Yes."}]}
    for row in ROWS
]
SHARES = [
    {"conversations": [{"from": "human", "value": row["instruction"]}, {"from": "gpt", "value": "Yes."}]}
    for row in ROWS
]
PAIRS = [{"prompt": row["instruction"], "completion": row["output"]} for row in ROWS]
PREFERRED = [{"prompt": row["instruction"], "chosen": "Yes.", "rejected": "No."} for row in ROWS]
TEXT = b"One paragraph.\n\nAnother,\nof two lines.\n\nA third.\n"
TABLE = pa.Table.from_pylist(ROWS)


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _plain(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _zstd(path: Path) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(_lines(ROWS))


def _separated(separator: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=separator)
            writer.writeheader()
            writer.writerows(ROWS)

    return write


def _folder(files: dict[str, Callable[[Path], object]]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        for name, make in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            make(path / name)

    return write


def _arrow(path: Path) -> None:
    with pa.ipc.new_stream(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE)


def _saved(path: Path) -> None:
    datasets.disable_progress_bars()
    datasets.DatasetDict(train=datasets.Dataset(TABLE)).save_to_disk(str(path))


SITES = {"north.jsonl": _plain(_lines(ROWS)), "south.csv": _separated(";")}
HELD = {"north.jsonl": _plain(_lines(ROWS[:1])), "south.jsonl": _plain(_lines(ROWS[1:]))}
# what it is, what is made, the settings beside `data.train`
MADE: list[tuple[str, str, Callable[[Path], object], tuple[str, ...]]] = [
    ("JSON Lines", "a.jsonl", _plain(_lines(ROWS)), ()),
    ("the same, with its other suffix", "a.NDJSON", _plain(_lines(ROWS)), ()),
    ("the same, packed by gzip", "a.jsonl.gz", _plain(gzip.compress(_lines(ROWS))), ()),
    ("the same, packed by zstd", "a.jsonl.zst", _zstd, ()),
    ("JSON, an array", "a.json", _plain(json.dumps(ROWS, indent=1).encode()), ()),
    ('JSON, `{"data": [...]}`', "b.json", _plain(json.dumps({"version": 1, "data": ROWS}).encode()), ()),
    ("CSV, any separator", "a.csv", _separated(";"), ()),
    ("TSV", "a.tsv", _separated("\t"), ()),
    ("Parquet", "a.parquet", lambda path: parquet.write_table(TABLE, path), ()),
    ("Arrow", "a.arrow", _arrow, ()),
    ("Feather", "a.feather", lambda path: feather.write_feather(TABLE, str(path)), ()),
    ("what `save_to_disk` wrote", "saved", _saved, ()),
    (
        "a folder",
        "parts",
        _folder(
            {"train-0.jsonl": SITES["north.jsonl"], "train-1.csv": SITES["south.csv"], "test.csv": _arrow}
        ),
        (),
    ),
    ("a pattern", "parts/train-*", lambda path: None, ()),
    (
        "a file a client, and a held-out file each",
        "sites",
        lambda path: (_folder(SITES)(path), _folder(HELD)(path.with_name("held"))),
        ("data.clients=files", "data.holdout.source=held"),
    ),
    (
        "other keys, a path into a list",
        "keys.jsonl",
        _plain(_lines(FOREIGN)),
        ("data.fields={instruction: question, output: answer.text.0}",),
    ),
    (
        "several columns, a key with a dot, a truth as label",
        "columns.jsonl",
        _plain(_lines(PARTS)),
        ("""data.fields={instruction: "{q} {c}", output: a, category: 'meta."site.id"'}""",),
    ),
    (
        "multiple choice",
        "choices.jsonl",
        _plain(_lines(CHOICES)),
        ("data.fields={instruction: question, output: answer}",),
    ),
    ("conversations", "messages.jsonl", _plain(_lines(TURNS)), ()),
    ("conversations as ShareGPT has them", "shared.json", _plain(json.dumps(SHARES).encode()), ()),
    ("prompt and completion", "pairs.jsonl", _plain(_lines(PAIRS)), ()),
    (
        "one answer preferred to another",
        "preferred.jsonl",
        _plain(_lines(PREFERRED)),
        ("data.format=preference",),
    ),
    ("plain text, a document a paragraph", "a.txt", _plain(TEXT), ("evaluation.tasks=[loss]",)),
    (
        "plain text, a document a row",
        "texts.jsonl",
        _plain(_lines([{"text": "One."}, {"text": "Two."}])),
        ("evaluation.tasks=[loss]",),
    ),
    ("bad rows among good ones", "bad.jsonl", _plain(_lines(ROWS) + b"{\n"), ("data.bad_rows=skip",)),
]


def formats() -> str:
    """A row a kind of source."""
    rows, before = [], Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for what, name, write, settings in MADE:
                write(Path(name))
                rows.append([what, f"`{name}`", _shown(settings), _said(name, settings)])
        finally:
            os.chdir(before)
    return table(["what", "`data.train`", "other settings", "what is said"], rows, numbers=False)


def _shown(settings: tuple[str, ...]) -> str:
    return "<br>".join(f"`{setting}`" for setting in settings)


def _said(name: str, settings: tuple[str, ...]) -> str:
    config: dict[str, Any] = {
        "data": {"train": name, "clients": 1, "holdout": {"fraction": 0.3}},
        "method": {"name": "fedavg"},
    }
    if any(setting.startswith("data.holdout") for setting in settings):
        del config["data"]["holdout"]
    document = fedtune.data_report(config, *settings)
    skipped = [f"{check['text']}" for check in document["checks"] if "do not fit" in check["text"]]
    return "<br>".join(f"`{line}`" for line in [*document["sources"], *skipped])


ENTRIES = {"formats": Entry(formats)}


if __name__ == "__main__":
    main(__doc__, ENTRIES)
