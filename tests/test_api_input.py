"""The front door in Python refuses what it cannot use, in words; nothing is written then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedtune

ROWS = [{"instruction": f"Add {a} and {b}.", "output": str(a + b)} for a in range(5) for b in range(5)]
CONFIG: dict[str, Any] = {
    "data": {"clients": 2},
    "method": {"name": "fedavg", "rounds": 2, "local_steps": 1, "lora": {"rank": 2}},
    "evaluation": {"bootstrap": 0},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> fedtune.Run:
    out = tmp_path_factory.mktemp("made") / "run"
    return fedtune.run(CONFIG, "method.rounds=1", out=out, data=ROWS, progress=False)


@pytest.mark.parametrize("wrong", [{"seed": 1}, None, 3])
def test_overrides_are_texts(wrong: Any) -> None:
    with pytest.raises(fedtune.InputError, match=r"overrides are texts, as in 'method.lr=1e-4'"):
        fedtune.load(CONFIG, "seed=1", wrong)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"callbacks": fedtune.Callback()}, r"callbacks is a list, as in \[<fedtune"),
        ({"callbacks": [fedtune.Callback]}, r"Callback is a class; a callback is an object: Callback\(\)"),
        ({"callbacks": [print]}, "is no callback: it has none of the methods"),
        ({"resume": True}, "resume=True needs the folder of the run that is to go on"),
    ],
)
def test_arguments_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fedtune.InputError, match=words):
        fedtune.run(CONFIG, data=ROWS, progress=False, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_is_left_alone(made: fedtune.Run) -> None:
    with pytest.raises(fedtune.InputError, match=r"exists already.*in Python with resume=True"):
        fedtune.run(CONFIG, "method.rounds=1", out=made.path, data=ROWS, progress=False)
    again = fedtune.run(CONFIG, "method.rounds=1", out=made.path, data=ROWS, resume=True, progress=False)
    assert again.rounds == made.rounds


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1 up, got 0"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number from 1 up, got '5'"),
        ({"temperature": -1}, "temperature must be a number from 0 up, got -1"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 up, got nan"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 2}, "top_p must be above 0 and at most 1, got 2"),
        ({"seed": -1}, "seed must be a whole number from 0 up, got -1"),
    ],
)
def test_arguments_of_generate(made: fedtune.Run, given: Any, words: str) -> None:
    with pytest.raises(fedtune.InputError, match=words):
        made.generate(["Add 1 and 2."], **given)


def test_prompts_that_cannot_be_answered(made: fedtune.Run) -> None:
    with pytest.raises(fedtune.InputError, match="prompt 1 must be a text"):
        made.generate(["Add 1 and 2.", "  "])
    with pytest.raises(fedtune.InputError, match=r"prompt 1 is too long: .* 4 tokens the model sees 252 of"):
        made.generate(["Add 1 and 2.", "a b c " * 200], max_new_tokens=4)
    with pytest.raises(fedtune.InputError, match="prompts is a list of texts"):
        made.generate(None)  # type: ignore[arg-type]
    assert made.generate([]) == []


@pytest.mark.parametrize("seeds", ["01", [0.5], 3, [0, 0], [-1]])
def test_seeds_of_a_comparison(seeds: Any) -> None:
    with pytest.raises(fedtune.InputError, match=r"seeds must be different whole numbers .*; got "):
        fedtune.compare({"a": CONFIG}, seeds=seeds, data=ROWS, progress=False)


@pytest.mark.parametrize("name", ["", " ", "..", "a/b", 1])
def test_names_of_a_comparison_are_those_of_folders(name: Any) -> None:
    with pytest.raises(fedtune.InputError, match="a configuration's name is a text without /"):
        fedtune.compare({name: CONFIG}, data=ROWS, progress=False)


def test_a_name_of_a_reference_row_is_taken(tmp_path: Path) -> None:
    with pytest.raises(fedtune.InputError, match="standalone is the name of a reference row too"):
        fedtune.compare({"standalone": CONFIG}, out=tmp_path / "c", data=ROWS, progress=False)
    assert not (tmp_path / "c").exists()


def test_data_that_can_be_read_once_go_to_every_configuration(tmp_path: Path) -> None:
    found = fedtune.compare(
        {"a": CONFIG, "b": CONFIG}, out=tmp_path / "c", data=iter(ROWS), references=False, progress=False
    )
    one, other = (row["evaluation"] for row in found.rows)
    assert one == other


@pytest.mark.parametrize("runs", ["runs/mine", Path("runs/mine"), []])
def test_a_report_is_of_a_list(tmp_path: Path, runs: Any) -> None:
    with pytest.raises(fedtune.InputError, match="runs is a list of at least one run or folder"):
        fedtune.report_page(runs, tmp_path / "page.html")


def test_a_bare_number_has_no_unit() -> None:
    with pytest.raises(fedtune.InputError, match="client_memory needs a unit"):
        fedtune.rank("bundled", client_memory=8, uplink="5Mbps", downlink="5Mbps")  # type: ignore[arg-type]


def test_a_run_is_read_from_another_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: fedtune.Run
) -> None:
    monkeypatch.chdir(made.path.parent)
    run = fedtune.open(made.path.name, data=ROWS)
    monkeypatch.chdir(tmp_path)
    assert run.path == Path(made.path.name) and run.status == "done"
    assert (run.rounds, run.clients, run.summary) == (made.rounds, made.clients, made.summary)
    assert run.generate(["Add 1 and 2."]) == made.generate(["Add 1 and 2."])


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("target", "given", "words"),
    [
        (3, {}, "evaluate takes a run or its folder, .*; got 3"),
        ("model", {}, "a model in memory needs its tokenizer"),
        ("model", {"tokenizer": "gpt2"}, "tokenizer must be one of transformers, .*; got 'gpt2'"),
    ],
)
def test_what_is_evaluated(made: fedtune.Run, target: Any, given: Any, words: str) -> None:
    with pytest.raises(fedtune.InputError, match=words):
        fedtune.evaluate(made.model() if target == "model" else target, ["loss"], **given)


def test_an_interrupted_run_says_how_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop:
        def on_round(self, round: int, scores: Any, state: Any) -> None:
            if round == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        fedtune.run(CONFIG, out=tmp_path / "run", data=ROWS, callbacks=[Stop()], progress=False)
    where = tmp_path / "run"
    assert stopped.value.__notes__ == [
        f'The run is kept: fedtune.open("{where}", data=...).resume() goes on.'
    ]
    with pytest.raises(KeyboardInterrupt) as compared:
        monkeypatch.setattr("fedtune.federation.run.to_payload", interrupt)  # at a checkpoint
        fedtune.compare({"a": CONFIG}, out=tmp_path / "c", data=ROWS, progress=False)
    monkeypatch.undo()
    assert compared.value.__notes__ == [
        f'What is done is kept: the same call with out="{tmp_path / "c"}" goes on.'
    ]
    again = fedtune.open(where, data=ROWS)
    assert again.status == "interrupted"
    assert again.resume(progress=False).status == "done"
    with pytest.raises(fedtune.InputError) as refused:  # there is nothing to go on with
        fedtune.run(CONFIG, out=tmp_path / "none", data=[], progress=False)
    assert not hasattr(refused.value, "__notes__")
