"""Every kind of file, folder and pattern that examples are read from, and what is said of others."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import feather, ipc, parquet

from fedtune.data import opening
from fedtune.data.examples import Example
from fedtune.data.files import clients_in, stem_of
from fedtune.data.reading import Reading, skipped_notes
from fedtune.data.sources import count_records, held_out_split, load_examples
from fedtune.errors import InputError

ROWS = [
    {"instruction": 'Grüße; "quoted", and\na break', "output": "1,5 €"},
    {"instruction": "二", "output": ""},
    {"instruction": "three", "output": "tab\there"},
]
WANTED = [Example(row["instruction"], "", row["output"]) for row in ROWS]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


def table(separator: str, mark: str = "", end: str = "\n") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(ROWS[0]), delimiter=separator, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return (mark + out.getvalue()).encode()


def zstd(content: bytes, path: Path) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(content)


def stream_of(rows: pa.Table, path: Path) -> None:
    with ipc.new_stream(str(path), rows.schema) as writer:
        writer.write_table(rows)


def plain(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


ARROW = pa.Table.from_pylist(ROWS)
KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a.jsonl": (plain(LINES), "JSON Lines"),
    "a.NDJSON": (plain(LINES), "JSON Lines"),
    "a.JSONL.GZ": (lambda path: path.write_bytes(gzip.compress(LINES)), "JSON Lines"),
    "a.jsonl.zst": (lambda path: zstd(LINES, path), "JSON Lines"),
    "a.json": (plain(json.dumps(ROWS, indent=1).encode()), "JSON"),
    "one-line.json": (plain(json.dumps(ROWS).encode()), "JSON"),
    "lines.json": (plain(b"\xef\xbb\xbf\n" + LINES), "JSON"),
    "wrapped.json": (plain(json.dumps({"version": 1, "data": ROWS}, indent=1).encode()), "JSON"),
    "wrapped-line.json": (plain(json.dumps({"rows": ROWS}).encode()), "JSON"),
    "a.json.gz": (lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())), "JSON"),
    "a.csv": (plain(table(",")), "CSV"),
    "excel.CSV": (plain(table(";", "\ufeff", "\r\n")), "CSV"),
    "told.csv": (plain(b"sep=|\r\n" + table("|")), "CSV"),
    "a.csv.gz": (lambda path: path.write_bytes(gzip.compress(table(","))), "CSV"),
    "a.tsv": (plain(table("\t")), "TSV"),
    "a.parquet": (lambda path: parquet.write_table(ARROW, path), "Parquet"),
    "a.arrow": (lambda path: stream_of(ARROW, path), "Arrow"),
    "a.feather": (lambda path: feather.write_feather(ARROW, str(path)), "Arrow"),
    "saved": (lambda path: datasets.Dataset(ARROW).save_to_disk(str(path)), "a saved data set"),
    "saved_splits": (
        lambda path: datasets.DatasetDict(train=datasets.Dataset(ARROW)).save_to_disk(str(path)),
        "a saved data set",
    ),
}


def refused(source: str, base: Path, fields: dict[str, str | None] | None = None, **how: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_examples(source, fields=fields or {}, base=base, **how)
    return str(caught.value)


@pytest.mark.parametrize("name", KINDS)
def test_every_format_gives_the_same_examples_and_says_what_it_is(name: str, tmp_path: Path) -> None:
    write, kind = KINDS[name]
    write(tmp_path / name)
    reading = Reading()
    assert load_examples(name, fields={}, base=tmp_path, reading=reading) == WANTED
    assert reading.lines == [f"3 rows of {kind} from {tmp_path / name}"]
    assert count_records(tmp_path / name) == 3


def test_a_text_is_a_document_a_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\n \nthree")
    fields = {"instruction": "text", "output": "text"}
    found = load_examples("a.txt", fields=fields, base=tmp_path)
    assert [example.output for example in found] == ["one\ntwo", "three"]


def test_values_of_a_table_become_text(tmp_path: Path) -> None:
    rows = pa.table(
        {
            "when": [datetime(2020, 1, 2, 3, 4, 5), None],
            "day": [date(2021, 5, 6), None],
            "price": [Decimal("1.50"), Decimal("20")],
            "right": [True, False],
            "list": [["a", "b"], ["c", "d"]],
            "inner": [{"x": {"y": 1.5}}, {"x": None}],
            "raw": [b"ab", b"c"],
        }
    )
    parquet.write_table(rows, tmp_path / "a.parquet")
    fields: dict[str, str | None] = {"instruction": "{price} {list.1} {when} {day}", "output": "right"}
    found = load_examples("a.parquet", fields=fields, base=tmp_path)
    assert [(e.instruction, e.output) for e in found] == [
        ("1.50 b 2020-01-02T03:04:05 2021-05-06", "true"),
        ("20.00 d  ", "false"),
    ]
    message = refused("a.parquet", tmp_path, {"instruction": "list", "output": "raw"})
    assert 'a.parquet: row 0: "list" for instruction must be text or a number, got a list' in message
    message = refused("a.parquet", tmp_path, {"instruction": "price", "output": "raw"})
    assert 'row 0: "raw" for output must be text or a number, got bytes' in message
    message = refused("a.parquet", tmp_path, {"instruction": "price", "output": "inner.x.y"})
    assert 'row 1: no key "inner.x.y" for output; the keys here are: "when", "day"' in message


def test_splits_of_objects_folders_and_saved_sets(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}))
    (tmp_path / "f" / "test").mkdir(parents=True)
    (tmp_path / "f" / "train-00000.jsonl").write_bytes(LINES)
    (tmp_path / "f" / "test" / "a.csv").write_bytes(table(","))
    (tmp_path / "f" / "README.md").write_text("about")
    saved = datasets.Dataset(ARROW)
    datasets.DatasetDict(train=saved, test=saved.select([1])).save_to_disk(str(tmp_path / "s"))
    for source, wanted in (("a.json", WANTED[:1]), ("f", WANTED), ("s", WANTED[1:2])):
        assert load_examples(source, fields={}, split="test", base=tmp_path) == wanted
    reading = Reading()
    load_examples("f", fields={}, base=tmp_path, reading=reading)
    assert reading.lines == [
        f"3 rows of JSON Lines from {tmp_path / 'f'} (1 file); not read, of other splits: test/a.csv; "
        "not read, of no known format: README.md"
    ]
    assert "holds rows under train, test" in refused("a.json", tmp_path, split="dev")
    assert 'no file in this folder is named for the split "dev"' in refused("f", tmp_path, split="dev")
    assert 'no split "dev"; it has train, test' in refused("s", tmp_path, split="dev")
    wanted = {"f": "test", "s": "test", "a.json": "train", "owner/name": "test", "*.json": "train"}
    assert {source: held_out_split(source, tmp_path) for source in wanted} == wanted


def test_folders_and_patterns_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, text in (("b/x.jsonl", "2"), ("a.csv", "1"), (".hidden.jsonl", "0"), ("b/_SUCCESS", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        line = f"instruction,output\n{text},y\n" if name.endswith("csv") else ""
        (tmp_path / name).write_text(line or json.dumps({"instruction": text, "output": "y"}))

    def asked(source: str) -> list[str]:
        return [e.instruction for e in load_examples(source, fields={}, base=tmp_path)]

    assert asked(".") == ["1", "2"]
    assert asked("*.csv") == ["1"] and asked("*/*.jsonl") == ["2"] and asked("**/*.jsonl") == ["2"]
    assert "nothing fits this pattern" in refused("*.parquet", tmp_path)
    assert "it fits the folder" in refused("*", tmp_path)
    (tmp_path / "a[1].jsonl").write_bytes(LINES)  # a name that is there is no pattern
    assert load_examples("a[1].jsonl", fields={}, base=tmp_path) == WANTED


# --- files that cannot be read: one error that names file and reason ----------------------------------------


def test_other_encodings_are_named(tmp_path: Path) -> None:
    for suffix, content in ((".jsonl", LINES), (".csv", table(",")), (".json", LINES), (".txt", LINES)):
        for encoding, words in (("utf-16", "UTF-16LE"), ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32LE")):
            (tmp_path / f"a{suffix}").write_bytes(content.decode().encode(encoding))
            message = refused(f"a{suffix}", tmp_path)
            assert (
                f"in {words[:6]} ({words}), and UTF-8 is read" in message and f"iconv -f {words}" in message
            )
    text = "instruction,output\nx,y\ncafé,1\n"
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    assert 'a.csv:3: not UTF-8 text: byte 0xe9, which is "é" in Latin-1' in refused("a.csv", tmp_path)
    (tmp_path / "a.csv").write_bytes(text.replace("é", "\u201c").encode("cp1252"))
    assert 'a.csv:3: not UTF-8 text: byte 0x93, which is "\u201c" in Windows-1252' in refused(
        "a.csv", tmp_path
    )
    (tmp_path / "a.txt").write_bytes(text.replace("é", "日本語").encode("shift-jis"))
    assert "a.txt:3: not UTF-8 text: byte 0x93; save the file as UTF-8" in refused("a.txt", tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("instruction,output\na\n", "a.csv:2: this row has 1 cells, and the header 2 (separated by commas)"),
        ("instruction;output\na;b;c\n", "a.csv:2: this row has 3 cells, and the header 2 (separated by semi"),
        ("instruction,output\na,b\n'c',\"d\n\n", "a.csv:3: a quote opens here and is not closed"),
        ('instruction,output\n"a"b,c\n', "a.csv:2: ',' expected after '\"'"),
        ("instruction,output,output\na,b,c\n", 'a.csv:1: the header has the column "output" twice'),
        (
            "instruction,answer\na,b\n",
            'a.csv:2: no key "output" for output; the keys here are: "instruction"',
        ),
        ("instruction,output\n\n,\n", "a.csv: holds no examples"),
        ("", "a.csv: holds no examples"),
    ],
)
def test_bad_tables(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert words in refused("a.csv", tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    packed = gzip.compress(LINES)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-9])
    (tmp_path / "no.jsonl.gz").write_bytes(LINES)
    zstd(LINES, tmp_path / "cut.jsonl.zst")
    (tmp_path / "cut.jsonl.zst").write_bytes((tmp_path / "cut.jsonl.zst").read_bytes()[:-6])
    for name in ("cut.jsonl.gz", "no.jsonl.gz", "cut.jsonl.zst"):
        assert f"{name}: the packed file is damaged or not whole" in refused(name, tmp_path)
    parquet.write_table(ARROW, tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    datasets.Dataset(ARROW).save_to_disk(str(tmp_path / "saved"))
    (part,) = (tmp_path / "saved").glob("*.arrow")
    part.write_bytes(part.read_bytes()[:-300])
    for name, content in (
        ("a.parquet", whole[:-20]),
        ("a.arrow", whole),
        ("b.parquet", b""),
        ("b.feather", b""),
    ):
        (tmp_path / name).write_bytes(content)
        assert f"{name}: damaged, or not what its name says: " in refused(name, tmp_path)
    (tmp_path / "old.feather").write_bytes(b"FEA1" + bytes(20))
    assert "old.feather: this is Feather in its first version" in refused("old.feather", tmp_path)
    assert "saved: damaged, or not what its name says: " in refused("saved", tmp_path)
    parquet.write_table(pa.Table.from_arrays([[1], [2]], names=["a", "a"]), tmp_path / "twice.parquet")
    assert 'twice.parquet: it has the column "a" twice' in refused("twice.parquet", tmp_path)
    (tmp_path / "a.parquet.gz").write_bytes(packed)
    assert "Parquet files are packed inside" in refused("a.parquet.gz", tmp_path)


def test_small_files_that_unpack_to_huge_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "LINE", 2**16)
    monkeypatch.setattr("fedtune.data.json_rows.LINE", 2**16)
    monkeypatch.setattr(opening, "WHOLE", 2**17)
    monkeypatch.setattr("fedtune.data.tables.LINE", 2**16)
    for name, content, words in (
        ("a.jsonl.gz", bytes(2**18), "not a text: it holds bytes of value 0"),
        ("b.jsonl.gz", b"x" * 2**18, "1: this line has more than 0 MiB"),
        ("a.json.gz", b"[" + b" " * 2**18, "has to be read as one"),
        ("a.csv.gz", b'instruction,output\n"' + b"x\n" * 2**17, "a cell has more than 0 MiB"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content))
        assert words in refused(name, tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "x" * 2**18, "output": "y"}]))
    assert (
        len(load_examples("a.json", fields={}, base=tmp_path)[0].instruction) == 2**18
    )  # no bomb: it is there
    assert csv.field_size_limit() == 131072  # the process's own


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "a.json")
    os.symlink("gone.jsonl", tmp_path / "link.jsonl")
    os.symlink("round.jsonl", tmp_path / "round.jsonl")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "a.jsonl").write_bytes(LINES)
    os.symlink("..", tmp_path / "loop" / "up")
    for source, words in (
        ("pipe.jsonl", "pipe.jsonl: is not a file (a pipe, a socket or a device)"),
        ("pipes", "a.json: is not a file (a pipe, a socket or a device)"),
        ("/dev/zero", "is not a file (a pipe, a socket or a device)"),
        ("link.jsonl", "there is no such file. It is a link to something that is not there"),
        ("round.jsonl", "Too many levels of symbolic links"),
        ("loop", "this link leads back to"),
    ):
        assert words in refused(source, tmp_path)
    assert len(load_examples("loop/**/*.jsonl", fields={}, base=tmp_path)) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl").chmod(0)
    assert "a.jsonl: cannot be read: Permission denied" in refused("a.jsonl", tmp_path)


# --- rows that do not fit, skipped --------------------------------------------------------------------------


def test_bad_rows_are_skipped_and_listed(tmp_path: Path) -> None:
    bad = [
        b'{"instruction": 1',
        b"[2]",
        b'{"instruction": "x"}',
        b'{"instruction": "caf\xe9", "output": "y"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*bad, LINES]))
    assert "a.jsonl:1: not valid JSON" in refused("a.jsonl", tmp_path)
    reading = Reading(skip=True)
    assert load_examples("a.jsonl", fields={}, base=tmp_path, reading=reading) == WANTED
    assert [place.rpartition(":")[2] for place, _ in reading.skipped] == ["1", "2", "3", "4"]
    whys = ["not valid JSON: Exp", "a record must be a ", 'no key "output" for', "not UTF-8 text: byt"]
    assert [why[:19] for _, why in reading.skipped] == whys
    assert reading.lines == [f"7 rows of JSON Lines from {tmp_path / 'a.jsonl'}"]
    assert reading.document()["rows"] == 4 and len(reading.document()["first"]) == 3
    (note,) = skipped_notes(reading.skipped)
    assert note.startswith("4 bad rows are skipped (data.bad_rows): ") and note.endswith("; and 1 more")


@pytest.mark.parametrize("name", ["all.jsonl", "all.csv", "all.json"])
def test_a_file_with_none_but_bad_rows_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_bytes(LINES)
    content = {"all.csv": "instruction,output\na\nb\n", "all.json": "[1, 2]"}.get(name, "{}\n{}\n")
    (tmp_path / name).write_text(content)
    assert f"{name}: each of its 2 rows is bad" in refused(".", tmp_path, reading=Reading(skip=True))


def test_damage_is_no_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES)[:-9])
    assert "damaged or not whole" in refused("a.jsonl.gz", tmp_path, reading=Reading(skip=True))


# --- a file a client ----------------------------------------------------------------------------------------


def test_clients_are_called_by_their_files(tmp_path: Path) -> None:
    for name in ("south.csv", "north.v2.jsonl.gz", "east/a.jsonl", ".x.jsonl", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = clients_in(".", tmp_path, "data.train")
    assert list(found) == ["east", "north.v2", "south"]
    assert list(clients_in("*.csv", tmp_path, "data.train")) == ["south"]
    (tmp_path / "west").mkdir()
    (tmp_path / "west" / "a.jsonl").touch()
    assert list(clients_in("*/a.jsonl", tmp_path, "data.train")) == ["east", "west"]
    (tmp_path / "south.jsonl").touch()
    with pytest.raises(
        InputError, match=r'data.train: two clients would be called "south": .*csv and .*jsonl'
    ):
        clients_in(".", tmp_path, "data.train")
    with pytest.raises(InputError, match=r"south.csv is a file; with data.clients: files it is a folder"):
        clients_in("south.csv", tmp_path, "data.train")
    with pytest.raises(InputError, match=r"data.train: nothing fits"):
        clients_in("gone/*.csv", tmp_path, "data.train")
    assert [stem_of(name) for name in ("a.b.jsonl.gz", "a.TSV", "a.b", "a")] == ["a.b", "a", "a.b", "a"]
