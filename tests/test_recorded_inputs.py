"""What a run read is known by digests: what took its place is refused, and what was moved is found again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_families import edit_json, save_folder

import fedtune
from fedtune.config.file import load_config
from fedtune.config.places import located
from fedtune.errors import InputError
from fedtune.federation.recorded import changed_inputs

CLASSES = ("zeta", "beta", "alpha", "delta")
TASKS = ["loss", "accuracy"]
CONFIG: dict[str, Any] = {
    "model": {"name": "models/bert", "task": "classification"},
    "data": {
        "train": "d.jsonl",
        "clients": 2,
        "max_length": 16,
        "template": "plain",
        "holdout": {"fraction": 0.25},
    },
    "method": {
        "name": "fedavg",
        "rounds": 1,
        "local_steps": 2,
        "local_epochs": None,
        "batch_size": 4,
        "lr": 0.01,
        "trainable": "lora",
        "lora": {"rank": 2},
    },
    "evaluation": {"tasks": TASKS, "bootstrap": 0},
}


def rows(renamed: str = "zeta") -> list[dict[str, str]]:
    names = (renamed, *CLASSES[1:])
    return [
        {"instruction": f"w{4 + i} w{10 + (i * 7) % 50}", "output": names[(i * i + i // 5) % 4]}
        for i in range(40)
    ]


def write(path: Path, examples: list[dict[str, str]]) -> None:
    path.write_text("\n".join(map(json.dumps, examples)) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data and the run that was made of them, by relative names."""
    home = tmp_path_factory.mktemp("home")
    save_folder(home / "models" / "bert", "bert")
    write(home / "d.jsonl", rows())
    before = Path.cwd()
    os.chdir(home)
    try:
        fedtune.run(CONFIG, out="run", progress=False)
    finally:
        os.chdir(before)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Iterator[Path]:
    """The same, to be spoilt; it is as before for the next test."""
    shutil.copytree(made, tmp_path / "kept", symlinks=True)
    yield made
    shutil.rmtree(made)
    shutil.copytree(tmp_path / "kept", made, symlinks=True)


def scores(home: Path, *overrides: str) -> dict[str, Any]:
    return fedtune.evaluate(home / "run", TASKS, *overrides)["scores"]["global"]


def recorded(home: Path) -> dict[str, Any]:
    return fedtune.open(home / "run").summary["evaluation"]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_names_are_recorded_as_absolute_paths_and_mean_the_same_from_elsewhere(made: Path) -> None:
    config = load_config(made / "run" / "config.yaml")
    assert config.model.name == str(made / "models" / "bert")
    assert config.data.train == str(made / "d.jsonl")
    about = json.loads((made / "run" / "environment.json").read_text())["model"]
    weights = (made / "models" / "bert" / "model.safetensors").read_bytes()
    assert about["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert about["settings_sha256"] == {
        name: hashlib.sha256((made / "models" / "bert" / name).read_bytes()).hexdigest()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    }
    assert scores(made) == recorded(made)  # the tests run elsewhere


def test_what_means_no_path_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bundled", "train", "test", "owner"):
        (tmp_path / name).mkdir()
    config = fedtune.load({"method": {"name": "fedavg"}})
    assert located(config) is config
    named = fedtune.load({"method": {"name": "fedavg"}, "model": {"name": "owner/model"}})
    assert located(named).model.name == "owner/model"


FILES = ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]


@pytest.mark.parametrize("file", FILES)
def test_a_base_that_was_replaced_is_refused_by_all_that_read_it(home: Path, file: str) -> None:
    base = home / "models" / "bert"
    if file == "model.safetensors":
        flip(base / file)
    elif file == "generation_config.json":
        (base / file).write_text("{}")
    else:
        (base / file).write_text((base / file).read_text() + " ")
    was = "weights_sha256 was" if file == "model.safetensors" else f"sha256 of {file} was"
    message = f"began with another model: {was} .*now has [0-9a-f]{{12}}"
    run = fedtune.open(home / "run")
    for read in (
        lambda: fedtune.evaluate(run, TASKS),
        lambda: run.export(home / "out"),
        lambda: run.model(),
        lambda: run.generate(["w5"]),
        lambda: run.replay(1, home / "out"),
        lambda: run.resume(progress=False),
        lambda: compared(home),
    ):
        with pytest.raises(InputError, match=message):
            read()
    assert not (home / "out").exists()
    (said,) = changed_inputs(home / "run", run.config)
    assert "began with another model" in said


def compared(home: Path) -> None:
    """A comparison takes over runs that are done."""
    shutil.copytree(home / "run", home / "c" / "run-seed0")
    config = load_config(home / "run" / "config.yaml")
    fedtune.compare({"run": config}, out=home / "c", references=False, progress=False)


def test_a_base_and_data_that_were_moved_are_named_anew(home: Path) -> None:
    (home / "models" / "bert").rename(home / "elsewhere")
    (home / "d.jsonl").rename(home / "moved.jsonl")
    with pytest.raises(InputError, match=r"no .*models/bert.*say where it is now: model.name=PLACE"):
        fedtune.open(home / "run").model()
    places = (f"model.name={home / 'elsewhere'}", f"data.train={home / 'moved.jsonl'}")
    assert scores(home, *places) == recorded(home)
    run = fedtune.open(home / "run", *places)
    assert fedtune.evaluate(run, TASKS)["scores"]["global"] == recorded(home)
    assert run.export(home / "out") == [home / "out"]
    about = json.loads((home / "out" / "adapter_config.json").read_text())
    assert about["auto_mapping"]["base_model"] == str(home / "elsewhere")
    assert run.resume(progress=False).status == "done"
    with pytest.raises(InputError, match=r"method.lr=1: a run has its settings; only where its inputs are"):
        fedtune.open(home / "run", "method.lr=1")


def test_another_base_at_the_place_that_is_named_is_refused(home: Path) -> None:
    shutil.copytree(home / "models" / "bert", home / "other")
    flip(home / "other" / "model.safetensors")
    with pytest.raises(InputError, match="began with another model"):
        scores(home, f"model.name={home / 'other'}")


def test_rows_put_before_the_data_do_not_move_the_hold_out(home: Path) -> None:
    more = [{"instruction": f"w{60 + i}", "output": "beta"} for i in range(3)]
    write(home / "d.jsonl", more + rows())
    assert scores(home) == recorded(home)  # found again by what they say
    with pytest.raises(InputError, match=r"data: .*\(\d of its 10 held-out examples would be trained on"):
        fedtune.open(home / "run").resume(progress=False)


def test_the_hold_out_is_the_runs_whatever_seed_is_asked_for(home: Path) -> None:
    assert scores(home, "seed=5")["loss"] == recorded(home)["loss"]
    first = scores(home, "evaluation.max_examples=3")
    assert first["loss"]["examples"] == 3
    for other in ("data.holdout.fraction=0.5", "data.max_examples=20", "data.clients=3"):
        with pytest.raises(InputError, match=r"data\.\w+ is not the run's"):
            scores(home, other)


def test_renamed_classes_are_an_error_and_not_an_accuracy(home: Path) -> None:
    write(home / "d.jsonl", rows(renamed="a-new-name"))
    with pytest.raises(InputError, match=r"another data.*of its 10 held-out examples are not there"):
        scores(home)


def test_the_order_of_classes_is_the_runs(home: Path) -> None:
    """Where the data are not at hand: of the run, not of a file."""
    (home / "d.jsonl").unlink()
    run = fedtune.open(home / "run")
    assert run.model().config.id2label == dict(enumerate(sorted(CLASSES)))
    assert set(run.generate(["w5 w6", "w9"])) <= set(CLASSES)
    assert fedtune.open(home / "run").export(home / "out") == [home / "out"]


def test_data_asked_for_in_place_of_the_runs_say_how_many_were_trained_on(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(home / "all.jsonl", rows())
    scores(home, f"data.holdout={{source: {home / 'all.jsonl'}}}")
    assert caplog.text == ""  # all that were held out are among them: only they are scored
    write(home / "some.jsonl", [*rows()[:12], {"instruction": "w60 w61 w62", "output": "beta"}])
    scores(home, f"data.holdout={{source: {home / 'some.jsonl'}}}")
    assert "trained on" in caplog.text and "of the 13 examples scored" in caplog.text


def test_an_older_run_is_checked_as_a_whole(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    (home / "run" / "examples.json").unlink()
    environment = json.loads((home / "run" / "environment.json").read_text())
    del environment["model"]["settings_sha256"]
    (home / "run" / "environment.json").write_text(json.dumps(environment))
    assert scores(home) == recorded(home)
    assert "recorded no held-out examples" in caplog.text
    write(home / "d.jsonl", rows()[1:])
    with pytest.raises(InputError, match="began with another data"):
        scores(home)
    with pytest.raises(InputError, match="began with another data"):
        fedtune.open(home / "run").generate(["w5"])


def test_damaged_records_are_refused(home: Path) -> None:
    (home / "run" / "examples.json").write_text('{"labels": []}')
    with pytest.raises(InputError, match=r"examples.json is damaged"):
        scores(home)


def test_what_a_run_writes_is_read_by_whom_the_umask_says(home: Path) -> None:
    before = os.umask(0o027)
    try:
        config = fedtune.load(load_config(home / "run" / "config.yaml"))
        run = fedtune.run(config, out=home / "again", progress=False)
        run.export(home / "out")
    finally:
        os.umask(before)
    for root in ("again", "out"):
        files = [f for f in (home / root).rglob("*") if f.is_file() and not f.is_symlink()]
        assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o640}
        assert any(f.suffix == ".safetensors" for f in files)


def test_edit_of_the_recorded_digest_is_seen(home: Path) -> None:
    about = json.loads((home / "run" / "environment.json").read_text())
    edit_json(home / "run" / "environment.json", data={**about["data"], "sha256": "0" * 64})
    with pytest.raises(InputError, match="began with another data: sha256 was 000000000000"):
        fedtune.open(home / "run").resume(progress=False)


def test_a_base_with_a_head_for_these_classes_keeps_their_order(home: Path) -> None:
    """Sorted, its outputs would stand for other classes than those that it was trained for."""
    order = ("zeta", "alpha", "delta", "beta")
    edit_json(home / "models" / "bert" / "config.json", id2label=dict(enumerate(order)), label2id=None)
    config = load_config(home / "run" / "config.yaml")
    run = fedtune.run(config, out=home / "again", progress=False)
    assert tuple(json.loads((home / "again" / "examples.json").read_text())["labels"]) == order
    assert run.model().config.id2label == dict(enumerate(order))
    with pytest.raises(InputError, match=r"began with another model: sha256 of config\.json"):
        fedtune.open(home / "run").resume(progress=False)
