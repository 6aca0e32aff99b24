"""A file a client, held-out files by the same names, bad rows that are skipped: from settings to summary."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pytest

import fedtune
from fedtune.config.file import parse_config
from fedtune.config.places import located
from fedtune.config.schema import RunConfig
from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.federation.client import local_examples, local_records
from fedtune.federation.data import prepare_data
from fedtune.federation.recorded import refuse_replaced

NAMES = ("east", "north", "south")


def example(text: str) -> Example:
    return Example(f"Say {text}.", "", text, "")


def write(path: Path, examples: list[Example], *more: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*(json.dumps(asdict(e)) for e in examples), *more]) + "\n")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three sites with 4, 5 and 6 examples, and with one, two and three held-out ones."""
    for number, name in enumerate(NAMES):
        write(tmp_path / "sites" / f"{name}.jsonl", [example(f"{name} {i}") for i in range(4 + number)])
        write(tmp_path / "held" / f"{name}.jsonl", [example(f"{name} held {i}") for i in range(1 + number)])
    (tmp_path / "sites" / "README.md").write_text("about")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(method: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    given = {"train": "sites", "clients": "files", "holdout": {"source": "held"}, **data}
    return parse_config({"data": given, "method": method or {"name": "fedavg"}}, "test")


def test_each_file_is_a_client_of_its_name(home: Path) -> None:
    split = prepare_data(config(), pooled=False)
    assert [entry["name"] for entry in split.partition["clients"]] == list(NAMES)
    for number, name in enumerate(NAMES):
        assert split.clients[number] == [example(f"{name} {i}") for i in range(4 + number)]
    assert split.partition["name"] == "files" and split.owner(2) == "client 2 (south)"
    owned = dict(zip((e.output for e in split.evaluation), split.owners, strict=True))
    wanted = {f"{name} held {i}": n for n, name in enumerate(NAMES) for i in range(1 + n)}
    assert owned == wanted
    assert split.reading.lines == [
        "data.train: 15 rows of JSON Lines from sites, of 3 clients: east, north, south; not read, of no "
        "known format: README.md",
        "data.holdout.source: 6 rows of JSON Lines from held, of 3 clients: east, north, south",
    ]


@pytest.mark.parametrize(
    ("data", "owners"),
    [
        ({"train": "sites/*.jsonl", "holdout": {"source": "held/*.jsonl"}}, [0, 1, 1, 2, 2, 2]),
        ({"holdout": {"client_fraction": 0.25}}, [0, 1, 2, 2]),  # of 4, 5 and 6
        ({"holdout": {"source": "held/south.jsonl"}}, []),
        ({"holdout": {"fraction": 0.2}}, []),
    ],
)
def test_what_may_be_held_out(home: Path, data: dict[str, Any], owners: list[int]) -> None:
    split = prepare_data(config(**data), pooled=False)
    assert sorted(split.owners) == owners
    assert [entry["name"] for entry in split.partition["clients"]] == list(NAMES)


def test_a_folder_a_client_with_parts(home: Path) -> None:
    for name in NAMES:
        for part in ("train", "test"):
            write(home / "both" / name / f"{part}.jsonl", [example(f"{name} {part}")])
    split = prepare_data(config(train="both", holdout={"source": "both"}), pooled=False)
    assert [part[0].output for part in split.clients.values()] == [f"{name} train" for name in NAMES]
    held = sorted(zip(split.owners, (e.output for e in split.evaluation), strict=True))
    assert held == [(n, f"{name} test") for n, name in enumerate(NAMES)]
    pattern = config(train="both/*/train.jsonl", holdout={"source": "both/*/test.jsonl"})
    assert prepare_data(pattern, pooled=False).sha256 == split.sha256


def test_names_are_held_together(home: Path) -> None:
    (home / "held" / "east.jsonl").unlink()
    said = prepare_data(config(), pooled=False).reading.said
    assert said == ["data.holdout.source: held has no file of east: nothing of theirs is scored"]
    (home / "held" / "north.jsonl").rename(home / "held" / "norht.jsonl")
    with pytest.raises(InputError, match=r'held has a file of "norht", and no client.*Did you mean "north"'):
        prepare_data(config(), pooled=False)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"partition": {"name": "iid"}}, "clients: files is a split itself"),
        ({"clients": 3, "partition": {"name": "files"}}, "clients: files is a split itself"),
        ({"train": "bundled"}, "clients: files needs a folder or a pattern of files as train, got bundled"),
        ({"train": "sites/north.jsonl"}, "data.train: sites/north.jsonl is a file; with data.clients: files"),
        ({"split": "test"}, 'east.jsonl: a file has no split "test"'),
        ({"train": "saved"}, "data.train: saved is one data set as it was saved"),
        ({"train": "site"}, "data.train: site is not there"),
        ({"train": "gone/*"}, "data.train: nothing fits gone/"),
        ({"max_examples": 1}, "no example of client 'east' is left to train on|of client 'north'"),
        ({"streaming": True}, "streaming needs max_examples"),
        ({"streaming": True, "max_examples": 3}, "streaming is for data sets of the hub"),
    ],
)
def test_settings_that_do_not_go_together(home: Path, data: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        prepare_data(config(**data), pooled=False)


def test_patterns_keep_their_place(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = home / "a[1]"
    (home / "sites").rename(odd)
    monkeypatch.chdir(odd)
    there = located(config(train="*.jsonl", holdout={"fraction": 0.2}))
    monkeypatch.chdir("/")
    assert there.data.train == f"{home}/a[[]1]/*.jsonl"
    assert len(prepare_data(there, pooled=False).clients) == 3


def test_a_run_of_files_says_names_and_lists_what_it_skipped(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(home / "sites" / "north.jsonl", [example(f"n {i}") for i in range(5)], "{", '{"instruction": 1}')
    document = {
        "data": {"train": "sites", "clients": "files", "holdout": {"source": "held"}, "bad_rows": "skip"},
        "method": {"name": "fedavg", "rounds": 1, "local_steps": 1, "trainable": "lora"},
        "evaluation": {"tasks": ["loss"], "bootstrap": 0},
    }
    run = fedtune.run(document, out="run", progress=False)
    said = capsys.readouterr().err
    assert "2 bad rows are skipped (data.bad_rows): " in said and "north.jsonl:6: not valid JSON" in said
    listed = [json.loads(line) for line in (home / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [row["place"] for row in listed] == [f"{home}/sites/north.jsonl:{line}" for line in (6, 7)]
    summary = run.summary
    assert summary["skipped"]["rows"] == 2 and summary["skipped"]["first"] == listed
    assert json.loads((home / "run" / "partition.json").read_text())["skipped"] == summary["skipped"]
    assert summary["client_names"] == {"0": "east", "1": "north", "2": "south"}
    assert summary["per_client"]["loss"]["loss"]["clients"].keys() == {"0", "1", "2"}
    assert [row["name"] for row in run.clients] == list(NAMES)
    settings = run.config
    refuse_replaced(home / "run", settings)
    write(home / "sites" / "north.jsonl", [example("another")])
    with pytest.raises(InputError, match="began with another data"):
        refuse_replaced(home / "run", settings)


def test_rows_given_from_python_are_skipped_too() -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c"}]
    document = {"data": {"bad_rows": "skip", "clients": 1, "holdout": {"source": "bundled"}}}
    report = fedtune.data_report({**document, "method": {"name": "fedavg"}}, data=rows)
    assert report["skipped"]["rows"] == 1 and report["examples"]["train"] == 1
    assert report["skipped"]["first"][0]["place"] == "data[1]"


def test_a_client_of_a_network_has_any_kind_of_file(home: Path) -> None:
    for place in ("sites/north.jsonl", "sites"):
        assert local_records(home / place) == len(local_examples(home / place, {}))
    for place, words in (
        ("gone.csv", "there is no such file"),
        ("sites/README.md", "this kind of file is not"),
    ):
        with pytest.raises(InputError, match=words):
            local_records(home / place)


def test_revision_and_streaming_of_a_hub_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, **how: Any) -> Any:
        asked.append((path, name, how))
        rows = [{"instruction": f"q{n}", "output": "a"} for n in range(100)]
        return datasets.IterableDataset.from_generator(lambda: iter(rows)) if how.get("streaming") else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = {"train": "owner/set:main@refs/convert/parquet", "clients": 2, "holdout": {"fraction": 0.1}}
    prepare_data(config(**data), pooled=False)
    split = prepare_data(config(**data, streaming=True, max_examples=10), pooled=False)
    assert sorted(e.instruction for e in [*split.trained, *split.held_out]) == [f"q{n}" for n in range(10)]
    how = {"split": "train", "revision": "refs/convert/parquet"}
    assert asked == [("owner/set", "main", how), ("owner/set", "main", {**how, "streaming": True})]
    assert split.reading.lines[0].startswith("data.train: 10 rows of the hub from data set")
    here = config(train="bundled", clients=2, max_examples=5)
    with pytest.raises(InputError, match="streaming is for data sets of the hub, got train: bundled"):
        parse_config(
            {"data": {**here.data.model_dump(), "streaming": True}, "method": {"name": "fedavg"}}, "test"
        )
