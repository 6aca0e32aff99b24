"""The front door in Python: what `import fedtune` gives, as a notebook or a program would use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import command
import datasets
import model_families
import numpy
import pytest
import torch
import transformers

import fedtune
from fedtune.evaluation.metrics import exact_match
from fedtune.federation.data import prepare_data

ROWS = [{"question": f"Add {a} and {b}.", "answer": str(a + b)} for a in range(8) for b in range(8)]
FIELDS = {"instruction": "question", "output": "answer"}
CONFIG: dict[str, Any] = {
    "data": {"fields": FIELDS, "clients": 3, "holdout": {"fraction": 0.25}, "max_length": 64},
    "method": {
        "name": "fedavg",
        "rounds": 2,
        "local_steps": 2,
        "lr": 1e-2,
        "trainable": "lora",
        "lora": {"rank": 2},
    },
    "evaluation": {"bootstrap": 0},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> fedtune.Run:
    """A finished run on rows, for tests that only read it."""
    out = tmp_path_factory.mktemp("made") / "run"
    return fedtune.run(CONFIG, out=out, data=ROWS, progress=False)


class Recorder:
    """A callback that keeps what it was told."""

    def __init__(self) -> None:
        self.clients: list[tuple[int, int, str]] = []
        self.rounds: list[tuple[int, dict[str, Any], fedtune.RoundState]] = []
        self.ends: list[str] = []

    def on_client(self, round: int, client: int, report: fedtune.ClientReport) -> None:
        self.clients.append((round, client, report.fault))

    def on_round(self, round: int, scores: Any, state: fedtune.RoundState) -> None:
        self.rounds.append((round, scores, state))

    def on_end(self, summary: Any) -> None:
        self.ends.append(summary["status"])


# --- the module ---


def test_importing_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import fedtune; took = time.perf_counter() - began; "
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'pydantic', 'yaml', 'rich'}; "
        "print(sorted(heavy & set(sys.modules)), took)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found, _, took = out.rpartition(" ")
    assert found == "[]"
    assert float(took) < 3  # a hang, not a speed: it takes 0.05 s


def test_every_public_name_is_there_and_has_a_text() -> None:
    for name in fedtune.__all__:
        thing = getattr(fedtune, name)
        if name != "__version__":
            assert thing.__doc__ and len(thing.__doc__) > 20, name
    assert set(dir(fedtune)) == set(fedtune.__all__)
    assert not hasattr(fedtune, "nothing")


def test_the_package_says_that_it_has_types() -> None:
    assert (Path(fedtune.__file__).parent / "py.typed").is_file()


# --- load ---


def test_load_takes_a_file_a_dictionary_and_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("method: {name: fedavg, lr: 1e-3}\n", encoding="utf-8")
    of_file = fedtune.load(path, "seed=3")
    of_text = fedtune.load(str(path), "seed=3")
    of_dict = fedtune.load({"method": {"name": "fedavg", "lr": 1e-3}}, "seed=3")
    assert of_file == of_text == of_dict == fedtune.load(fedtune.load(path), "seed=3")
    assert (of_file.seed, of_file.method.lr) == (3, 1e-3)  # type: ignore[attr-defined]


def test_load_leaves_the_dictionary_alone() -> None:
    mine = {"method": {"name": "fedavg"}}
    fedtune.load(mine, "method.lr=1e-3")
    assert mine == {"method": {"name": "fedavg"}}


def test_load_takes_values_as_a_program_has_them() -> None:
    rows = Path("some") / "rows.jsonl"
    mine = {
        "seed": numpy.int64(3),
        "data": {"train": rows, "labels": ("no", "yes")},
        "model": {"task": "classification"},
        "method": {"name": "fedavg", "lr": numpy.float32(0.5)},
    }
    config = fedtune.load(mine)
    assert (config.seed, config.data.train, config.data.labels) == (3, str(rows), ["no", "yes"])
    assert config.method.lr == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"method": {"name": "fedavg", "lrr": 1}}, 'method.lrr is not a known setting.*Did you mean "lr"'),
        ("nowhere.yaml", "nowhere.yaml: no such configuration file"),
        (3, "a configuration is a YAML file's path, a dictionary or what fedtune.load gave; got int"),
    ],
)
def test_load_refuses(source: Any, words: str) -> None:
    with pytest.raises(fedtune.InputError, match=words):
        fedtune.load(source)


# --- run, and data as objects ---


def test_the_result_of_rows_is_that_of_the_same_file(tmp_path: Path, made: fedtune.Run) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    of_file = fedtune.run(CONFIG, f"data.train={file}", out=tmp_path / "run", progress=False)
    assert weights(of_file) == weights(made)
    assert of_file.scores == made.scores
    of_set = fedtune.run(CONFIG, out=tmp_path / "set", data=datasets.Dataset.from_list(ROWS), progress=False)
    assert weights(of_set) == weights(made)


def test_rows_client_by_client_are_the_split(tmp_path: Path) -> None:
    data = {"north": ROWS[:20], "south": datasets.Dataset.from_list(ROWS[20:50]), "west": ROWS[50:]}
    run = fedtune.run(CONFIG, "data.clients=9", out=tmp_path / "run", data=data, progress=False)
    partition = json.loads((run.path / "partition.json").read_text(encoding="utf-8"))
    clients = partition["clients"]
    assert [client["name"] for client in clients] == ["north", "south", "west"]
    assert sum(client["examples"] for client in clients) == partition_size(64, 0.25)
    # which rows a client has: positions among the training examples, which keep their order
    places = [client["indices"] for client in clients]
    assert sorted(index for part in places for index in part) == list(range(partition_size(64, 0.25)))
    assert places[0] == sorted(places[0]) and max(places[0]) < min(places[1]) < min(places[2])
    assert [row["name"] for row in run.clients] == ["north", "south", "west"]
    assert run.config.data.clients == 3


def partition_size(rows: int, fraction: float) -> int:
    return rows - round(rows * fraction)


def test_data_have_their_own_hold_out_and_not_the_bundled_one(tmp_path: Path) -> None:
    config = {**CONFIG, "data": {"fields": FIELDS}}
    run = fedtune.run(fedtune.load(config), out=tmp_path / "run", data=ROWS, progress=False)
    assert run.config.data.holdout.fraction == 0.1
    wanted = {**CONFIG, "data": {"fields": FIELDS, "holdout": {"source": "bundled"}}}
    settings, _ = with_rows(wanted)
    assert settings.data.holdout.source == "bundled"  # asked for, so kept


def with_rows(config: dict[str, Any]) -> Any:
    from fedtune.api.federate import with_objects

    return with_objects(fedtune.load(config), ROWS)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("rows.jsonl", "data must be a list of rows .* got str. A file goes into data.train"),
        (7, "data must be a list of rows .* got int"),
        ([], "data: holds no examples"),
        ([3], r"data\[0\]: a record must be"),
        ([{"question": "a"}], r'data\[0\]: no key "answer" for output; the keys here are: "question"'),
        ([ROWS[0], {"question": "a", "answer": [1]}], r'data\[1\]: "answer" for output must be text'),
        ({}, "data has no clients"),
        ({"north": ROWS, "south": []}, r'data\["south"\]: holds no examples'),
        ({3: ROWS}, "data must map clients' names to rows; 3 is not a name"),
        ({"north": ROWS[0]}, r'data\["north"\] must be a list of rows or a data set, got a mapping'),
        ({"north": [ROWS[0]], "south": ROWS[1:3]}, "no example of client 'north' is left to train on"),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
            'DatasetDict with the splits train; give one of them, as in data."train".',
        ),
        (
            datasets.Dataset.from_list(ROWS).to_pandas(),
            r"data is a pandas table; give its rows: data.to_dict",
        ),
    ],
)
def test_data_that_cannot_be_used_are_refused_and_nothing_is_written(
    tmp_path: Path, data: Any, words: str
) -> None:
    config = {**CONFIG, "data": {**CONFIG["data"], "holdout": {"fraction": 0.7}}}
    with pytest.raises(fedtune.InputError, match=words):
        fedtune.run(config, out=tmp_path / "run", data=data, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_split_of_its_own_does_not_go_with_another_partition(tmp_path: Path) -> None:
    with pytest.raises(fedtune.InputError, match=r"client by client, and data\.partition is dirichlet"):
        fedtune.run(CONFIG, "data.partition.name=dirichlet", out=tmp_path / "run", data={"a": ROWS})


def test_without_the_objects_their_run_cannot_go_on_and_says_so(made: fedtune.Run, tmp_path: Path) -> None:
    with pytest.raises(fedtune.InputError, match=r"data\.train is objects: the examples come from Python"):
        fedtune.evaluate(fedtune.open(made.path), ["loss"])
    with pytest.raises(fedtune.InputError, match="began with another data"):
        fedtune.evaluate(fedtune.open(made.path, data=ROWS[:40]), ["loss"])
    with pytest.raises(fedtune.InputError, match="a run has its own data; open it with them"):
        fedtune.evaluate(made, ["loss"], data=ROWS)
    ended = command.fedtune("eval", made.path, "--tasks", "loss", cwd=tmp_path)
    assert ended.status == 2 and "data.train is objects" in ended.err


def test_data_for_a_run_that_has_files_are_refused(tmp_path: Path) -> None:
    run = fedtune.run(CONFIG, "data.fields={}", "method.rounds=1", out=tmp_path / "run", progress=False)
    with pytest.raises(fedtune.InputError, match=r"was made with data\.train: bundled; it takes no data"):
        fedtune.open(run.path, data=ROWS)


# --- what a run holds ---


def test_a_run_shows_its_folder_as_plain_values(made: fedtune.Run) -> None:
    assert made.status == "done" and made.summary["status"] == "done"
    assert made.scores == made.summary["evaluation"]
    assert [entry["round"] for entry in made.rounds] == [0, 1, 2]
    assert type(made.rounds[0]) is dict and made.rounds[2]["eval"] == made.scores
    assert len(made.messages) == 2 * 3 * 2  # rounds, clients, directions
    again = fedtune.open(made.path)
    assert again.rounds == made.rounds and again.summary == made.summary
    assert repr(made) == f"Run({str(made.path)!r}, fedavg, done)"


def test_tables_are_flat(made: fedtune.Run) -> None:
    rounds = made.rounds.to_pandas()
    assert list(rounds["round"]) == [0, 1, 2]
    assert list(rounds["clients"]) == [0, 3, 3] and rounds["left_out"].iloc[2] == 0
    assert rounds["loss.loss"].iloc[2] == made.scores["loss"]["loss"]
    messages = made.to_pandas("messages")
    assert messages["payload_bytes"].sum() == sum(made.summary["payload_bytes"].values())
    clients = made.to_pandas("clients")
    assert list(clients["rounds"]) == [2, 2, 2] and clients["examples"].sum() == partition_size(64, 0.25)
    assert clients["payload_bytes.up"].sum() == made.summary["payload_bytes"]["up"]
    assert clients["peak_memory_bytes"].max() == made.summary["peak_memory_bytes"]["client"]
    for table in (rounds, messages, clients):
        assert not any(isinstance(cell, dict | list) for row in table.values for cell in row)
    with pytest.raises(fedtune.InputError, match="to_pandas gives rounds, messages or clients; got 'bytes'"):
        made.to_pandas("bytes")


def test_the_model_is_the_one_that_was_scored(made: fedtune.Run) -> None:
    scores = fedtune.evaluate(made, ["loss"])["scores"]["global"]
    assert scores["loss"]["loss"] == made.scores["loss"]["loss"]
    split = prepare_data(made.config, pooled=False, objects=made.objects)
    held_out = [{"question": e.instruction, "answer": e.output} for e in split.evaluation]
    in_memory = fedtune.evaluate(
        made.model(),
        ["loss"],
        "data.template=plain",
        "data.max_length=64",
        "data.fields={instruction: question, output: answer}",
        "evaluation.bootstrap=0",
        tokenizer=made.tokenizer(),
        data=held_out,
    )
    assert in_memory["examples"] == len(held_out) == 16
    assert in_memory["scores"]["model"]["loss"]["loss"] == made.scores["loss"]["loss"]
    with pytest.raises(fedtune.InputError, match="a model in memory needs its tokenizer"):
        fedtune.evaluate(made.model(), ["loss"])
    with pytest.raises(fedtune.InputError, match="tasks is a list of names"):
        fedtune.evaluate(made, "loss")  # type: ignore[arg-type]


def test_generated_answers_are_those_that_accuracy_counts(made: fedtune.Run) -> None:
    answers = made.generate([row["question"] for row in ROWS])
    assert len(answers) == len(ROWS) and all(answer == answer.strip() for answer in answers)
    one = {"instruction": ROWS[3]["question"], "input": ""}
    assert made.generate([one, ROWS[4]["question"]]) == answers[3:5]
    split = prepare_data(made.config, pooled=False, objects=made.objects)
    held_out = [example.output for example in split.evaluation]
    asked = [example.instruction for example in split.evaluation]
    right = [exact_match(a, b) for a, b in zip(made.generate(asked), held_out, strict=True)]
    scored = fedtune.evaluate(made, ["accuracy"])["scores"]["global"]["accuracy"]
    assert (scored["accuracy"], scored["examples"]) == (sum(right) / len(right), len(held_out))
    drawn = made.generate([ROWS[0]["question"]] * 2, temperature=1.0, seed=4, max_new_tokens=3)
    assert drawn == made.generate([ROWS[0]["question"]] * 2, temperature=1.0, seed=4, max_new_tokens=3)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("Add 1 and 2.", "prompts is a list of texts"),
        ([""], "prompt 0 must be a text"),
        (["a", {"question": "b"}], "prompt 1 must be a text, or a dictionary with"),
        ([{"instruction": 3}], "prompt 0 must be a text"),
    ],
)
def test_prompts_that_are_none_are_refused(made: fedtune.Run, prompts: Any, words: str) -> None:
    with pytest.raises(fedtune.InputError, match=words):
        made.generate(prompts)


def test_a_classifier_answers_with_classes(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    model_families.save_folder(folder, "bert")
    rows = [{"instruction": f"text {i}", "output": "even" if i % 2 == 0 else "odd"} for i in range(24)]
    config = {
        "model": {"name": str(folder), "task": "classification"},
        "data": {"clients": 2, "holdout": {"fraction": 0.25}, "max_length": 16},
        "method": {"name": "fedavg", "rounds": 1, "local_steps": 2, "trainable": "full"},
        "evaluation": {"tasks": ["accuracy"], "bootstrap": 0},
    }
    run = fedtune.run(config, out=tmp_path / "run", data=rows, progress=False)
    answers = run.generate([row["instruction"] for row in rows])
    assert set(answers) <= {"even", "odd"} and len(answers) == 24


def test_there_is_no_model_of_that_name(made: fedtune.Run) -> None:
    with pytest.raises(fedtune.InputError, match="has no result named 'client-0000'; it has global"):
        made.model("client-0000")


def test_a_run_is_exported_and_reported(made: fedtune.Run, tmp_path: Path) -> None:
    (written,) = made.export(tmp_path / "model", merge=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(written)
    ids = made.tokenizer()("Add 1 and 2.", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, made.model()(ids).logits, rtol=1e-4, atol=1e-4)
    assert made.report(tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(fedtune.InputError, match="exists already"):
        fedtune.report_page([made, made.path], tmp_path / "page.html")


# --- resume, roll back ---


def test_a_run_that_a_callback_broke_goes_on_to_the_same_bits(tmp_path: Path, made: fedtune.Run) -> None:
    class Breaks:
        def on_round(self, round: int, scores: Any, state: Any) -> None:
            if round == 1:
                raise ZeroDivisionError("mine")

    with pytest.raises(fedtune.FederationError, match="callback Breaks failed in on_round: Zero"):
        fedtune.run(CONFIG, out=tmp_path / "run", data=ROWS, callbacks=[Breaks()], progress=False)
    stopped = fedtune.open(tmp_path / "run", data=ROWS)
    assert stopped.status == "stopped" and len(stopped.rounds) == 2
    recorder = Recorder()
    run = stopped.resume(callbacks=[recorder], progress=False)
    assert weights(run) == weights(made) and run.status == "done"
    assert [round for round, _, _ in recorder.rounds] == [2]
    assert run.resume(progress=False).status == "done"  # nothing left to do


def test_rolling_back_trains_anew_to_the_same_bits(tmp_path: Path, made: fedtune.Run) -> None:
    run = fedtune.run(CONFIG, out=tmp_path / "run", data=ROWS, progress=False)
    again = run.rollback(1, progress=False)
    assert weights(again) == weights(made)
    assert (run.path / "rolled-back-1" / "final").is_dir()
    with pytest.raises(fedtune.InputError, match="has checkpoints of rounds 1, 2, not of 7"):
        again.rollback(7)


def test_opening_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fedtune.InputError, match="not a run folder"):
        fedtune.open(tmp_path)


def weights(run: fedtune.Run) -> bytes:
    return (run.path / "final" / "adapter_model.safetensors").read_bytes()


# --- callbacks ---


def test_callbacks_are_told_of_clients_rounds_and_the_end(tmp_path: Path) -> None:
    recorder = Recorder()
    config = fedtune.load(CONFIG, "federation.simulate.dropout=0.4", "federation.quorum=1", "seed=3")
    run = fedtune.run(config, out=tmp_path / "run", data=ROWS, callbacks=[recorder], progress=False)
    expected = [
        (entry["round"], client, "it dropped out" if str(client) in entry["left_out"] else "")
        for entry in run.rounds[1:]
        for client in range(3)
    ]
    assert sorted(recorder.clients) == expected
    assert any(fault for _, _, fault in expected), "a test of drop-outs needs one"
    assert [round for round, _, _ in recorder.rounds] == [0, 1, 2]
    assert [scores for _, scores, _ in recorder.rounds] == [entry["eval"] for entry in run.rounds]
    last = recorder.rounds[-1][2]
    assert last.entry == run.rounds[-1] and last.payload_bytes == run.summary["payload_bytes"]
    assert recorder.rounds[0][2].server is None and last.server is not None
    assert recorder.ends == ["done"]


def test_a_callback_needs_one_of_the_three_methods(tmp_path: Path) -> None:
    with pytest.raises(fedtune.InputError, match="it has none of the methods on_client, on_round, on_end"):
        fedtune.run(CONFIG, out=tmp_path / "run", data=ROWS, callbacks=[object()], progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_base_class_does_nothing(tmp_path: Path, made: fedtune.Run) -> None:
    run = fedtune.run(CONFIG, out=tmp_path / "run", data=ROWS, callbacks=[fedtune.Callback()], progress=False)
    assert weights(run) == weights(made)


# --- compare, plan ---


def test_compare_gives_the_table(tmp_path: Path) -> None:
    one = {**CONFIG, "method": {**CONFIG["method"], "rounds": 1}}
    found = fedtune.compare(
        {"two": CONFIG, "one": one}, seeds=[0, 1], out=tmp_path / "c", data=ROWS, progress=False
    )
    unnamed = [fedtune.load(CONFIG), fedtune.load(one)]
    same = fedtune.compare(
        unnamed, out=tmp_path / "d", data=ROWS, references=False, progress=False, seeds=[0]
    )
    assert [row["config"] for row in same.table] == ["fedavg", "fedavg-2"]
    assert same.rows[0]["evaluation"] == found.rows[0]["evaluation"]
    assert [row["config"] for row in found.table] == ["two", "one", "standalone", "centralized", "zero-shot"]
    assert len(found.rows) == 10 and found.metrics == ["loss.loss"]
    assert "| two |" in str(found)
    mean = found.to_pandas().set_index("config")["metrics.loss.loss.mean"]
    losses = [row["evaluation"]["loss"]["loss"] for row in found.rows if row["config"] == "two"]
    assert mean["two"] == pytest.approx(sum(losses) / 2)
    assert json.loads((found.path / "compare.json").read_text(encoding="utf-8")) == found.document


@pytest.mark.parametrize(
    ("configs", "seeds", "words"),
    [
        ([], None, "compare needs at least one configuration"),
        (["a.yaml", "b/a.yaml"], None, "need different names, got a, a; rename one of the files"),
        (["demo", "data.clients=2", "data.seed=1"], None, "data.clients=2 is a setting, .* --set data.cli"),
        ("a.yaml", None, r"compare takes a list of configurations, as in \['a.yaml'\]"),
        (CONFIG, None, "compare takes several configurations"),
        ([CONFIG], [], "seeds must be different whole numbers"),
        ([CONFIG], [1, 1], "seeds must be different whole numbers"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused(configs: Any, seeds: Any, words: str) -> None:
    with pytest.raises(fedtune.InputError, match=words):
        fedtune.compare(configs, seeds=seeds, data=ROWS, progress=False)


def test_the_plan_of_rows_is_what_the_run_sends(made: fedtune.Run) -> None:
    planned = fedtune.plan(CONFIG, data=ROWS)
    assert planned["payload_bytes"]["down"] == made.summary["payload_bytes"]["down"]
    assert planned["payload_bytes"]["up"] == made.summary["payload_bytes"]["up"]
    assert planned["clients"] == 3
