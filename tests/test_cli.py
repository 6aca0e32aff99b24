"""The commands as a person or a script meets them: what is printed where, what is written, how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer
from command import Result, fedtune, write_config
from model_families import save_folder
from safetensors.torch import load_file

from fedtune import load
from fedtune.bench import BENCHES
from fedtune.cli.main import app
from fedtune.config.schema import Federation
from fedtune.config.wire import Wire
from fedtune.data.partition import PARTITIONERS
from fedtune.data.templates import TEMPLATES
from fedtune.evaluation.registry import TASKS
from fedtune.methods.registry import METHODS
from fedtune.models.load import Loaded, load_model
from fedtune.models.save import load_result

COMMANDS = (
    *(
        "run",
        "compare",
        "status",
        "sweep",
        "validate",
        "data",
        "plan",
        "diagnose",
        "eval",
        "report",
        "generate",
        "chat",
        "serve",
        "export",
        "push",
        "replay",
        "ls",
        "bench",
    ),
    *("init", "cp", "keys", "server", "client"),
)


def base(**method: Any) -> dict[str, Any]:
    return {
        "data": {"clients": 2, "max_examples": 8, "max_length": 64},
        "method": {"name": "fedavg", "rounds": 1, "batch_size": 4, "lr": 0.05, **method},
        "evaluation": {"tasks": ["loss"], "max_examples": 8},
    }


def usage_error(result: Result, *parts: str) -> None:
    assert result.status == 2, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished runs: lora, full from scratch, stand-alone, and a classifier's."""
    folder = tmp_path_factory.mktemp("runs")
    lora = {"lora": {"rank": 2}}
    write_config(folder / "lora.yaml", base(**lora))
    write_config(folder / "standalone.yaml", {**base(), "method": {"name": "standalone", **lora}})
    write_config(
        folder / "scratch.yaml", {**base(trainable="full"), "model": {"name": "tiny", "initial": "scratch"}}
    )
    save_folder(folder / "tiny")
    save_folder(folder / "classifier", "roberta")
    rows = [{"instruction": f"w{4 + i}", "output": "abcd"[i % 4]} for i in range(20)]
    (folder / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = base(**lora)
    document["model"] = {"name": "classifier", "task": "classification"}
    document["data"] = {"train": "classes.jsonl", "clients": 2, "holdout": {"fraction": 0.3}}
    document["evaluation"]["tasks"] = ["loss", "accuracy"]
    write_config(folder / "classes.yaml", document)
    for name in ("lora", "standalone", "scratch", "classes"):
        done = fedtune("run", f"{name}.yaml", "--out", name, "--quiet", cwd=folder)
        assert done.status == 0, done.err
    return folder


def summary(run: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return document


def test_help_of_every_command_needs_no_torch() -> None:
    program = """
import sys
from fedtune.cli.main import main
for command in [[], *([name] for name in sys.argv[1:])]:
    sys.argv = ["fedtune", *command, "--help"]
    try:
        main()
    except SystemExit as done:
        assert not done.code
heavy = {"torch", "transformers", "peft", "numpy", "datasets", "numba", "yaml"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *COMMANDS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(f"Example: fedtune {name}" in done.stdout for name in COMMANDS)
    listed = done.stdout.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.splitlines()[1 : len(COMMANDS) + 1]] == list(COMMANDS)


def test_settings_are_checked_and_parts_listed_without_torch() -> None:
    """Every shipped configuration on the bundled model, without privacy and the like."""
    program = """
import sys
from fedtune.cli.main import Listing, app
for what in Listing:
    app(args=["ls", what], standalone_mode=False)
app(args=["bench"], standalone_mode=False)
app(args=["validate", *sys.argv[1:]], standalone_mode=False)
heavy = {"torch", "transformers", "peft", "datasets", "numba"} & sys.modules.keys()
assert not heavy, heavy
"""
    plain = []
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")):
        config = load(path)
        asked = config.federation
        more = asked.privacy or asked.secure_aggregation or asked.robust or asked.wire != Wire()
        more = more or asked.selection != Federation().selection
        if config.model.name == "bundled" and not more:
            plain.append(str(path))
    assert len(plain) > 20
    done = subprocess.run(
        [sys.executable, "-c", program, *plain], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_validate_takes_overrides_as_run_does(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_config(tmp_path / f"{name}.yaml", base())
    assert fedtune("validate", "a.yaml", "b.yaml", "method.lr=0.5", cwd=tmp_path).out.count("fedavg") == 2
    usage_error(
        fedtune("validate", "a.yaml", "method.lr=0", cwd=tmp_path), "a.yaml: method.lr", "greater than 0"
    )
    usage_error(fedtune("validate", "method.lr=0", cwd=tmp_path), "a configuration's file", "method.lr=0")
    (tmp_path / "c=1.yaml").write_text((tmp_path / "a.yaml").read_text())
    assert fedtune("validate", "c=1.yaml", cwd=tmp_path).out.startswith("c=1.yaml: fedavg")


def test_bench_without_a_name_lists_what_there_is(tmp_path: Path) -> None:
    entries = fedtune("bench", "--json", cwd=tmp_path).json()
    assert [entry["name"] for entry in entries] == list(BENCHES)
    shown = fedtune("bench", cwd=tmp_path).out.splitlines()
    assert [line.split()[0] for line in shown] == [*BENCHES, "all"]
    assert all(line.endswith(entry["summary"]) for line, entry in zip(shown, entries, strict=False))


def test_every_argument_says_what_it_is_for_and_nothing_is_escaped() -> None:
    group: Any = typer.main.get_command(app)
    assert set(COMMANDS) <= set(group.commands)
    for name, command in group.commands.items():
        context = click.Context(command, info_name=name)
        shown = command.get_help(context)
        assert "\\[" not in shown, name
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                _, text = parameter.get_help_record(context)
                assert text.replace("\\[required]", "").strip(), f"{name}: {parameter.name}"


@pytest.mark.parametrize(
    "arguments",
    [(), *((name,) for name in COMMANDS if name != "bench")],
    ids=lambda arguments: " ".join(arguments) or "fedtune",
)
def test_without_arguments_a_command_shows_its_help(arguments: tuple[str, ...], tmp_path: Path) -> None:
    usage_error(fedtune(*arguments, cwd=tmp_path), f"Usage: fedtune {' '.join(arguments)}".rstrip())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nonsense"], "nonsense"),
        (["run", "c.yaml", "--nonsense"], "--nonsense"),
        (["run", "c.yaml"], "c.yaml: no such configuration file"),
        (["ls", "nonsense"], "'methods', 'partitioners', 'tasks', 'templates', 'models'"),
        (["eval", "bundled"], "--tasks"),
        (["export", "run"], "--out"),
        (["bench", "nonsense"], "nonsense"),
        (["bench", "zo-step", "--dtype", "float64"], "bfloat16"),
        (["bench", "aggregation", "--dtype", "float32"], "zo-step"),
        (["compare", "c.yaml", "--seeds", "1,x"], "--seeds must be different whole numbers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(arguments: list[str], part: str, tmp_path: Path) -> None:
    usage_error(fedtune(*arguments, cwd=tmp_path), part)
    assert [p for p in tmp_path.iterdir() if p.name not in (".out", ".err")] == []


def test_version(tmp_path: Path) -> None:
    from fedtune.version import __version__

    assert fedtune("--version", cwd=tmp_path) == Result(0, f"fedtune {__version__}\n", "")


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("methods", list(METHODS)),
        ("partitioners", list(PARTITIONERS)),
        ("tasks", list(TASKS)),
        ("templates", ["auto", "chat", *TEMPLATES]),
    ],
)
def test_ls(what: str, names: list[str], tmp_path: Path) -> None:
    entries = fedtune("ls", what, "--json", cwd=tmp_path).json()
    assert [entry["name"] for entry in entries] == names
    assert all(set(entry) == {"name", "summary", "origin"} and entry["summary"] for entry in entries)
    assert {entry["origin"] for entry in entries} == {"fedtune"}
    shown = fedtune("ls", what, cwd=tmp_path).out.splitlines()
    assert [line.split()[0] for line in shown] == names
    assert all(line.endswith(entry["summary"]) for line, entry in zip(shown, entries, strict=True))


def test_ls_models(tmp_path: Path) -> None:
    names = [entry["name"] for entry in fedtune("ls", "models", "--json", cwd=tmp_path).json()]
    assert names[0] == "bundled"
    assert len(fedtune("ls", "models", cwd=tmp_path).out.splitlines()) == len(names)


def test_validate(runs: Path) -> None:
    good = fedtune("validate", "lora.yaml", "classes.yaml", "--json", cwd=runs)
    assert good.json() == [
        {"config": "lora.yaml", "method": "fedavg", "model": "bundled"},
        {"config": "classes.yaml", "method": "fedavg", "model": "classifier"},
    ]
    assert fedtune("validate", "lora.yaml", cwd=runs).out == "lora.yaml: fedavg on bundled\n"


def test_validate_names_every_bad_file(runs: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "a.yaml", {**base(), "sed": 1})
    write_config(tmp_path / "b.yaml", base(rnd=1))
    result = fedtune("validate", "a.yaml", runs / "lora.yaml", "b.yaml", "--json", cwd=tmp_path)
    usage_error(result, "a.yaml: sed is not a known setting", "b.yaml: method.rnd is not")


def test_validate_needs_neither_weights_nor_data(tmp_path: Path) -> None:
    write_config(
        tmp_path / "a.yaml",
        {**base(), "model": {"name": "owner/model"}, "data": {"train": "none.jsonl", "clients": 2}},
    )
    assert fedtune("validate", "a.yaml", cwd=tmp_path).status == 0


def test_run_prints_one_document(runs: Path) -> None:
    result = fedtune("run", "lora.yaml", "--out", "json", "--json", cwd=runs)
    assert result.status == 0
    assert result.json() == summary(runs / "json")
    fields = (
        "method model seed rounds clients trainable_parameters total_parameters payload_bytes framed_bytes "
        "payload_bytes_per_client_round peak_memory_bytes seconds evaluation zero_shot status"
    )
    assert set(result.json()) >= set(fields.split())
    assert set(result.json()["seconds"]) >= {"total", "training", "aggregation", "evaluation", "rebuild"}
    assert "zero-shot" in result.err  # what a person reads goes to stderr
    quiet = fedtune("run", "lora.yaml", "--out", "quiet", "--json", "--quiet", cwd=runs)
    assert quiet.err == ""


def test_run_makes_every_file_of_a_run(runs: Path) -> None:
    names = {path.name for path in (runs / "lora").iterdir()}
    assert names >= {
        "config.yaml",
        "environment.json",
        "partition.json",
        "rounds.jsonl",
        "wire.jsonl",
        "memory.jsonl",
        "rounds.csv",
        "checkpoints",
        "final",
        "summary.json",
    }


def test_run_names_its_folder_after_the_configuration(tmp_path: Path) -> None:
    write_config(tmp_path / "mine.yaml", base(lora={"rank": 2}))
    for name in ("runs/mine", "runs/mine-2"):
        result = fedtune("run", "mine.yaml", "--quiet", cwd=tmp_path)
        assert f"Run folder: {name}" in result.out
        assert summary(tmp_path / name)["status"] == "done"
    assert not (tmp_path / "runs/mine-3").exists()


@pytest.mark.parametrize("name", ["lora", "scratch", "classes"])
def test_eval_of_a_run_gives_the_scores_of_its_summary(name: str, runs: Path) -> None:
    tasks = "loss,accuracy" if name == "classes" else "loss"
    result = fedtune("eval", name, "--tasks", tasks, "--json", cwd=runs)
    assert result.status == 0, result.err
    document = result.json()
    assert set(document) == {"target", "examples", "tasks", "scores", "details"}
    assert document["examples"] == (6 if name == "classes" else 8)
    expected = summary(runs / name)["evaluation"]
    assert set(document["scores"]) == {"global"}
    for task, metrics in expected.items():
        assert document["scores"]["global"][task] == pytest.approx(metrics, rel=1e-5)
    assert summary(runs / name)["evaluation"] != summary(runs / name)["zero_shot"]


def test_eval_of_several_models(runs: Path) -> None:
    result = fedtune("eval", "standalone", "--tasks", "loss", "--json", cwd=runs)
    scores = result.json()["scores"]
    assert list(scores) == ["client-0000", "client-0001"]
    mean = (scores["client-0000"]["loss"]["loss"] + scores["client-0001"]["loss"]["loss"]) / 2
    assert mean == pytest.approx(summary(runs / "standalone")["evaluation"]["loss"]["loss"], rel=1e-6)
    plain = fedtune("eval", "standalone", "--tasks", "loss", cwd=runs).out.splitlines()
    assert plain[0].split()[:3] == ["client-0000", "loss", "loss"]
    assert len(plain) == 6


def test_eval_of_a_model(runs: Path) -> None:
    result = fedtune("eval", "bundled", "--tasks", "loss", "data.max_length=64", "evaluation.max_examples=8",
                     "--json", cwd=runs)  # fmt: skip
    assert result.json()["scores"]["model"]["loss"] == summary(runs / "lora")["zero_shot"]["loss"]
    folder = fedtune(
        "eval", "tiny", "--tasks", "loss", "evaluation.max_examples=3", "--json", cwd=runs
    ).json()
    assert (folder["target"], folder["examples"]) == ("tiny", 3)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["lora", "--tasks", "los"], 'mean "loss"'),
        (["lora", "--tasks", ""], "task"),
        (["./nowhere", "--tasks", "loss"], "nowhere"),
        (["lora", "--tasks", "loss", "evaluation.max=3"], "evaluation.max is not"),
    ],
)
def test_eval_of_what_is_not_there(arguments: list[str], part: str, runs: Path) -> None:
    usage_error(fedtune("eval", *arguments, "--json", cwd=runs), part)


def logits(loaded: Loaded) -> torch.Tensor:
    ids = torch.tensor([[1, 9, 33, 50, 17, 20, 40]])
    with torch.no_grad():
        return loaded.model.eval()(input_ids=ids).logits


def bundled(name: str) -> Loaded:
    return load_model(name, dtype="float32", initial="pretrained", seed=0, base=Path("."))


def test_export_of_an_adapter_and_merged(runs: Path, tmp_path: Path) -> None:
    assert (
        fedtune("export", "lora", "--out", tmp_path / "adapter", cwd=runs).out == f"{tmp_path / 'adapter'}\n"
    )
    merged = fedtune("export", "lora", "--out", tmp_path / "merged", "--merge", cwd=runs)
    assert merged.status == 0, merged.err
    adapter, final = (
        tmp_path / "adapter/adapter_model.safetensors",
        runs / "lora/final/adapter_model.safetensors",
    )
    saved, exported = load_file(final), load_file(adapter)
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], exported[name]) for name in saved)
    with_adapter = logits(load_result(tmp_path / "adapter", bundled))
    whole = logits(bundled(str(tmp_path / "merged")))
    torch.testing.assert_close(whole, with_adapter, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, logits(bundled("bundled")), rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "merged/adapter_config.json").exists()


def test_export_of_whole_models_and_of_each_clients(runs: Path, tmp_path: Path) -> None:
    assert fedtune("export", "scratch", "--out", tmp_path / "full", cwd=runs).status == 0
    saved, exported = (
        load_file(folder / "model.safetensors") for folder in (runs / "scratch/final", tmp_path / "full")
    )
    assert all(torch.equal(saved[name], exported[name]) for name in saved)
    printed = fedtune("export", "standalone", "--out", tmp_path / "each", cwd=runs).out.split()
    assert printed == [str(tmp_path / "each" / name) for name in ("client-0000", "client-0001")]
    assert all((Path(folder) / "adapter_model.safetensors").is_file() for folder in printed)
    assert fedtune("export", "classes", "--out", tmp_path / "classes", "--merge", cwd=runs).status == 0


def test_a_whole_model_has_nothing_left_to_merge(runs: Path, tmp_path: Path) -> None:
    for folder, *merge in (("plain",), ("merged", "--merge")):
        assert fedtune("export", "scratch", "--out", tmp_path / folder, *merge, cwd=runs).status == 0
    plain, merged = (tmp_path / folder / "model.safetensors" for folder in ("plain", "merged"))
    assert plain.read_bytes() == merged.read_bytes()


def test_export_refuses(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("mine")
    usage_error(fedtune("export", "lora", "--out", tmp_path / "taken", cwd=runs), "exists already")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]
    usage_error(fedtune("export", "tiny", "--out", tmp_path / "x", cwd=runs), "not a run folder")
    usage_error(fedtune("export", "none", "--out", tmp_path / "x", cwd=runs), "no such folder")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/config.yaml").write_text((runs / "lora/config.yaml").read_text())
    usage_error(
        fedtune("export", tmp_path / "unfinished", "--out", tmp_path / "x", cwd=runs), "has no result yet"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "unfinished"]


def test_an_exported_model_can_be_fine_tuned_again(runs: Path, tmp_path: Path) -> None:
    assert fedtune("export", "lora", "--out", tmp_path / "merged", "--merge", cwd=runs).status == 0
    write_config(tmp_path / "c.yaml", {**base(lora={"rank": 2}), "model": {"name": "merged"}})
    again = fedtune(
        "run", "c.yaml", "data.template=plain", "--out", "run", "--quiet", "--json", cwd=tmp_path
    ).json()
    before = summary(runs / "lora")["evaluation"]["loss"]["loss"]
    assert again["zero_shot"]["loss"]["loss"] == pytest.approx(before, rel=1e-5)


def test_a_command_that_is_nearly_one_is_asked_for_once(tmp_path: Path) -> None:
    found = fedtune("rnu", "demo", cwd=tmp_path)
    assert found.status == 2 and found.err.count("Did you mean 'run'?") == 1
    assert found.err == "fedtune: No such command 'rnu'. Did you mean 'run'? Try fedtune --help.\n"
