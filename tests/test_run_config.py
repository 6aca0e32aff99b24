"""Configurations: what a run saves of its own, and that every field changes something."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from command import lines
from model_families import save_folder
from pydantic import BaseModel

from fedtune.config.computing import Computing
from fedtune.config.data import Public
from fedtune.config.file import load_config, parse_config, settings_blocks
from fedtune.config.partitions import PARTITIONS
from fedtune.config.pictures import Diffusion, Drawn, DrawnPrompt, Pictures, Prior
from fedtune.config.schema import RunConfig, Transport
from fedtune.errors import FedtuneError
from fedtune.evaluation import likelihoods
from fedtune.evaluation import types as evaluation
from fedtune.evaluation.sandbox import CodeSettings
from fedtune.federation import run as federation
from fedtune.federation.progress import Silent
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.objective import Objective
from fedtune.protection.robust import Robust
from fedtune.protection.settings import Privacy, SecureAggregation


def test_the_saved_configuration_repeats_the_run(tiny: Path) -> None:
    first = observe(tiny, {"method.rounds": 2})
    again = federation.run(load_config(first.path / "config.yaml"), tiny / "again", Silent())
    assert again["status"] == "done"
    assert Observed(tiny / "again", first.evaluated).content() == first.content()
    assert (tiny / "again/config.yaml").read_text() == (first.path / "config.yaml").read_text()


# Every field changes something. A field stands here with the value it is changed to, and with the settings
# that both runs share where it has an effect in their company only. A field of a block chosen by name has the
# name in front. Settings that have to change with a field stand in ALONG.
Table = dict[str, tuple[Any, dict[str, Any]]]

SGD = {"method.optimizer": "sgd", "method.lr": 0.5}

PRUNES: dict[str, Any] = {"method.aggregation": "sparsity", "method.rounds": 3, "method.lora.rank": 4}
ADAM = {"method.server_optimizer.name": "adam"}

SLOW = {"federation.simulate.delay_s": 5.0, "federation.quorum": 1}

HUB = {"data.train": "owner/set", "data.holdout": {"source": "owner/set"}}

WORDS = {"evaluation.tasks": ["accuracy"], "evaluation.max_examples": 4}

FILE = {
    "evaluation.tasks": ["gsm8k-0shot"],
    "evaluation.files": {"gsm8k": "sums-a.jsonl"},
    "evaluation.max_new_tokens": 2,
}

HARNESS = {
    "evaluation.tasks": ["choose"],
    "evaluation.task_folder": "tasks-a",
    "evaluation.data_folder": "choices-a",
}

TWO = {"method.rounds": 2}

ABSENT = object()

FIELDS: Table = {
    "seed": (1, {}),
    "model.name": ("other", {}),
    "model.dtype": ("bfloat16", {}),
    "model.initial": ("scratch", {}),
    "model.task": ("classification", {}),
    "model.device": ("cuda", {}),
    "data.train": ("other.jsonl", {}),
    "data.split": ("test", HUB),
    "data.fields": ({"output": "input"}, {}),
    "data.template": ("alpaca", {}),
    "data.loss_on": ("all", {}),
    "data.max_length": (8, {}),
    "data.batching": ("length-grouped", {}),
    "data.max_examples": (10, {}),
    "data.clients": (3, {}),
    "data.partition.name": ("by-field", {}),
    "dirichlet:data.partition.alpha": (50.0, {"data.partition": {"name": "dirichlet", "minimum": 1}}),
    "dirichlet:data.partition.minimum": (
        5,
        {"data.partition": {"name": "dirichlet", "alpha": 0.1, "minimum": 1}},
    ),
    "dirichlet:data.partition.by": ("output", {"data.partition": {"name": "dirichlet", "minimum": 1}}),
    "by-field:data.partition.by": ("output", {"data.partition": {"name": "by-field"}}),
    "shards:data.partition.shards_per_client": (3, {"data.partition": {"name": "shards"}}),
    "shards:data.partition.by": ("output", {"data.partition": {"name": "shards"}}),
    "file:data.partition.path": (
        "split-b.json",
        {"data.partition": {"name": "file", "path": "split-a.json"}},
    ),
    "file:data.partition.rest": (
        "refuse",
        {"data.partition": {"name": "file", "path": "split-some.json", "rest": "leave-out"}},
    ),
    "quantity:data.partition.alpha": (0.3, {"data.partition": {"name": "quantity"}}),
    "quantity:data.partition.fractions": ([0.25, 0.75], {"data.partition": {"name": "quantity"}}),
    "data.holdout.fraction": (0.5, {"data.holdout": {"fraction": 0.2}}),
    "data.holdout.client_fraction": (0.25, {}),
    "data.holdout.category": ("last", {}),
    "data.holdout.source": ("other.jsonl", {}),
    "data.holdout.split": ("train", HUB),
    "data.holdout.validation": (0.25, {}),
    "method.name": ("centralized", {}),
    "method.rounds": (2, {}),
    "method.arrival": ("asynchronous", SLOW | {"evaluation.max_examples": 2}),
    "method.aggregation": ("freeze-a", {}),
    "method.ridge": (1.0, {"method.aggregation": "refine"}),
    "method.prune.decay": (0.1, PRUNES | {"method.prune": {"decay": 0.9, "penalty": 100.0}}),
    "method.prune.penalty": (100.0, PRUNES | {"method.prune": {"penalty": 0.01}}),
    "method.buffer.size": (2, {"method.buffer": {"size": 1}, **TWO}),
    "method.buffer.staleness": (2.0, {"method.buffer": {"size": 1, "seconds": [1.0, 1.5]}, **TWO}),
    "method.buffer.seconds": ([2.0, 1.0], {"method.buffer": {"size": 1, "seconds": [1.0, 1.5]}, **TWO}),
    "method.proximal": (5.0, {}),
    "method.control_variates": (True, SGD),
    "method.keep_optimizer": (True, TWO),
    "method.own": (["lora_A"], {}),
    "method.ditto": (0.5, {"method.ditto": 0.0}),
    "method.fine_tune.local_epochs": (2, {"method.fine_tune": {"local_epochs": 1}}),
    "method.fine_tune.local_steps": (2, {"method.fine_tune": {"local_steps": 1}}),
    "method.fine_tune.lr": (0.5, {"method.fine_tune": {"local_steps": 1}}),
    "method.local_epochs": (2, {}),
    "method.local_steps": (1, {}),
    "method.batch_size": (2, {}),
    "method.gradient_accumulation": (2, {}),
    "method.optimizer": ("sgd", {}),
    "method.lr": (0.02, {}),
    "method.lr_schedule": ("constant", {}),
    "method.lr_warmup": (0.5, {}),
    "method.lr_over": ("run", TWO),
    "method.weight_decay": (0.5, {}),
    "method.momentum": (0.9, SGD),
    "method.betas": ([0.5, 0.6], {}),
    "method.max_grad_norm": (1e-3, SGD),
    "method.masters": ("kahan", {"method.trainable": "full", "model.dtype": "bfloat16"}),
    "method.trainable": ("full", {}),
    "method.lora.rank": (3, {}),
    "method.lora.alpha": (2.0, {}),
    "method.lora.dropout": (0.5, {}),
    "method.lora.targets": (["k_proj"], {}),
    "method.lora.client_ranks": ([1, 2], {}),
    "method.lora.use_dora": (True, {}),
    "method.lora.use_rslora": (True, {}),
    "method.lora.init": ("pissa", {}),
    "method.lora.bias": ("all", {"model.name": "other"}),
    "method.lora.modules_to_save": (["norm"], {}),
    "method.adapter.size": (5, {"method.trainable": "adapter"}),
    "method.prompt.tokens": (3, {"method.trainable": "prompt"}),
    "method.p_tuning.tokens": (
        3,
        {"method.trainable": "p-tuning", "method.p_tuning": {"tokens": 2, "hidden": 4}},
    ),
    "method.p_tuning.hidden": (
        6,
        {"method.trainable": "p-tuning", "method.p_tuning": {"tokens": 2, "hidden": 4}},
    ),
    "method.ia3.targets": (["k_proj"], {"method.trainable": "ia3"}),
    "method.prefix.tokens": (3, {"method.trainable": "prefix"}),
    "method.server_optimizer.name": ("momentum", TWO),
    "method.server_optimizer.lr": (0.5, {}),
    "method.server_optimizer.momentum": (0.2, ADAM),
    "method.server_optimizer.beta2": (0.5, ADAM),
    "method.server_optimizer.tau": (0.1, ADAM),
    "federation.clients_per_round": (1, {}),
    "federation.quorum": (2, {"federation.simulate.dropout": 0.5, "federation.quorum": 1, "seed": 0}),
    "federation.deadline_s": (6.0, SLOW | {"seed": 1}),
    "federation.simulate.dropout": (0.5, {"federation.quorum": 1, "seed": 0}),
    "federation.simulate.delay_s": (
        5.0,
        SLOW | {"federation.deadline_s": 6.0, "seed": 1} | {"federation.simulate.delay_s": 0.0},
    ),
    "federation.wire.dtype": ("int8", {}),
    "federation.wire.top_k": (0.5, {}),
    "federation.wire.error_feedback": (True, {"federation.wire.dtype": "int4", **TWO}),
    "federation.weights": ("equal", {}),
    "federation.max_examples": (3, {}),
    "evaluation.tasks": (["accuracy"], {"evaluation.max_new_tokens": 2}),
    "evaluation.every": (2, {"method.rounds": 2}),
    "evaluation.arrivals": (True, {"method.arrival": "asynchronous"}),
    "evaluation.max_examples": (3, {}),
    "evaluation.max_new_tokens": (2, WORDS),
    "evaluation.batch_size": (2, {}),
    "evaluation.memory": ("50kB", {}),
    "evaluation.bootstrap": (0, {}),
    "evaluation.limit": (1, FILE),
    "evaluation.files": ({"gsm8k": "sums-b.jsonl"}, FILE),
    "evaluation.task_folder": ("tasks-b", HARNESS),
    "evaluation.data_folder": ("choices-b", HARNESS),
    "evaluation.few_shot": (2, HARNESS),
    "checkpoints.keep": (1, TWO),
    "checkpoints.best": ("loss.loss", {}),
}

ALONG: dict[str, dict[str, Any]] = {
    "data.holdout.client_fraction": {"data.holdout.fraction": None},
    "data.holdout.category": {"data.holdout.fraction": None},
    "data.holdout.source": {"data.holdout.fraction": None},
    "method.local_steps": {"method.local_epochs": None},
    "method.name": {"method.rounds": ABSENT},
    "method.trainable": {"method.lora": ABSENT},
}

# where the change may be that the run does not go through
MAY_STOP = {"model.device", "federation.quorum", "data.partition.rest"}

ELSEWHERE = {  # these need compilers, a server or a method with data of its own, which their own tests have
    "model.quantization",  # test_quantized_runs.py
    *("model.attention", "model.revision"),  # test_models_load.py
    "model.adapter",  # test_continuing.py
    "tracking",  # test_tracking.py: the same run, told to others
    "checkpoints.journal",  # test_journal.py
    "checkpoints.rollback",  # test_rollback.py
    *("evaluation.stop.metric", "evaluation.stop.patience"),  # test_best_round.py
    "evaluation.where",  # test_federated_evaluation.py
    "data.cache",  # test_encoding_cache.py
    *(f"run.{name}" for name in Computing.model_fields),  # test_determinism.py: of a GPU
    "data.bad_rows",  # test_client_files.py
    "data.streaming",  # test_client_files.py
    "method.gradient_checkpointing",  # test_memory_efficient.py
    "method.offload_params",  # test_offload.py
    *(f"method.objective.{name}" for name in Objective.model_fields),  # test_preference.py
    "method.compile",  # test_compiled.py
    "method.optimizer_in_backward",  # test_stepping.py: the same bits in less memory
    "data.too_long",  # test_run_lengths.py
    *("data.format", "data.trees"),  # test_conversations.py
    "evaluation.harness_template",  # test_harness.py
    "data.labels",  # test_deployment_settings.py, as are those of transport
    *(f"transport.{name}" for name in Transport.model_fields),
    *(f"data.public.{name}" for name in Public.model_fields),  # test_public_data.py
    *(f"federation.secure_aggregation.{name}" for name in SecureAggregation.model_fields),
    *("federation.max_loss_jump", "federation.max_norm_ratio"),  # test_guard.py
    *(f"federation.robust.{name}" for name in Robust.model_fields),  # test_robust.py, test_robust_runs.py
    *(f"federation.privacy.{name}" for name in Privacy.model_fields),  # test_privacy.py
    *(f"evaluation.{name}" for name in ("samples", "temperature", "top_p")),  # test_code_evaluation.py
    *(f"evaluation.code.{name}" for name in CodeSettings.model_fields),  # test_code_evaluation.py
    *(f"evaluation.judge.{name}" for name in evaluation.JudgeSettings.model_fields),  # test_judge.py
    # test_text_to_image.py, test_pictures.py
    *(f"model.diffusion.{name}" for name in Diffusion.model_fields if name != "prior"),
    *(f"model.diffusion.prior.{name}" for name in Prior.model_fields),
    *(f"data.pictures.{name}" for name in Pictures.model_fields),
    *(f"evaluation.pictures.{name}" for name in Drawn.model_fields if name != "prompts"),
    *(f"evaluation.pictures.prompts.{name}" for name in DrawnPrompt.model_fields),
}


def fields_of(block: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every field by dotted name; those of blocks chosen by name with that name in front."""
    for name, info in block.model_fields.items():
        dotted = f"{prefix}{name}"
        if dotted == "method":
            yield from fields_of(Config, "method.")
            continue
        inner = list(PARTITIONS) if dotted == "data.partition" else settings_blocks(info.annotation)
        if not inner:
            yield dotted
        elif len(inner) == 1:
            yield from fields_of(inner[0], f"{dotted}.")
        else:
            yield f"{dotted}.name"
            for chosen in inner:
                tag = chosen.model_fields["name"].default
                yield from (
                    f"{tag}:{field}"
                    for field in fields_of(chosen, f"{dotted}.")
                    if not field.endswith(".name")
                )


def test_every_field_is_in_the_table() -> None:
    fields = set(fields_of(RunConfig))
    assert "dirichlet:data.partition.alpha" in fields
    assert "method.lora.rank" in fields
    assert fields - FIELDS.keys() - ELSEWHERE == set()
    assert (FIELDS.keys() | ELSEWHERE) - fields == set()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models and data."""
    folder = tmp_path_factory.mktemp("tiny")
    save_folder(folder / "tiny")
    save_folder(folder / "other", "qwen2")
    save_folder(folder / "classifier", "roberta")
    for name, shift in (("data", 0), ("other", 1)):
        rows = [
            {
                "instruction": f"w{4 + i} w{5 + i + shift} w{6 + i} w9 w10 w11",
                "input": f"w{7 + i}",
                "output": f"w{20 + i % 3} w30",
                "category": "abcd"[i % 4],
            }
            for i in range(16)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, first in (("a", range(6)), ("b", range(0, 12, 2)), ("some", range(4))):
        parts = [list(first), [i for i in range(10 if name == "some" else 12) if i not in first]]
        (folder / f"split-{name}.json").write_text(json.dumps(parts))
    for name, shift in (("a", 0), ("b", 7)):
        sums = [{"question": f"w{4 + i + shift}", "answer": f"w5 #### {i}"} for i in range(3)]
        (folder / f"sums-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
        choices = [
            {
                "text": f"w{4 + i + shift} w{50 - i}",
                "options": [f"w{10 + i}", f"w{30 + i} w9"],
                "right": i % 2,
            }
            for i in range(40)
        ]
        (folder / f"choices-{name}").mkdir()
        (folder / f"choices-{name}/c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
        (folder / f"tasks-{name}").mkdir()
        (folder / f"tasks-{name}/t.yaml").write_text(CHOOSE.replace("SHOWN", f"{{{{text}}}} w{20 + shift}"))
    return folder


CHOOSE = """
task: choose
custom_dataset: !function fedtune.evaluation.harness_data.load
dataset_kwargs:
  files: {test: c.jsonl, train: c.jsonl}
  fields: [text, options, right]
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "SHOWN"
doc_to_target: right
doc_to_choice: "{{options}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture(autouse=True)
def _in_tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "tiny" not in request.fixturenames:
        return
    tiny = request.getfixturevalue("tiny")
    monkeypatch.chdir(tiny)
    parts = {"train": tiny / "data.jsonl", "test": tiny / "other.jsonl"}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, configuration, split: lines(parts[split]))


class Observed:
    """What a run left behind, and what went on in its evaluation: sizes of batches, and answers."""

    def __init__(self, path: Path, evaluated: list[Any], problem: str = "") -> None:
        self.path, self.evaluated, self.problem = path, evaluated, problem

    def content(self) -> dict[str, Any]:
        found: dict[str, Any] = {"evaluated": self.evaluated, "problem": self.problem}
        for path in sorted(self.path.rglob("*")):
            name = str(path.relative_to(self.path))
            if path.name in ("rounds.jsonl", "wire.jsonl", "memory.jsonl"):
                entries = lines(path)
                found[name] = [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]
            elif path.suffix == ".safetensors" or path.name == "partition.json":
                found[name] = path.read_bytes()
            elif path.is_dir() and path.parent.name == "checkpoints":
                found[name] = "a checkpoint"
        return found


_numbers = itertools.count()


def observe(tiny: Path, changes: dict[str, Any]) -> Observed:
    """A tiny run with settings changed. If it ends in an error, that is what there is to see."""
    document: dict[str, Any] = {
        "model": {"name": "tiny"},
        "data": {"train": "data.jsonl", "template": "plain", "clients": 2, "max_length": 32},
        "method": {"name": "fedavg", "rounds": 1, "batch_size": 4, "lr": 0.05},
        "evaluation": {"max_new_tokens": 4},
    }
    document["data"]["holdout"] = {"fraction": 0.25}
    if changes.get("method.trainable", "lora") == "lora":
        document["method"]["lora"] = {"rank": 2}
    for key, value in changes.items():
        block = document
        *parents, last = key.split(".")
        for part in parents:
            block = block.setdefault(part, {})
        if value is ABSENT:
            block.pop(last, None)
        else:
            block[last] = value
    evaluated: list[Any] = []
    collate, generate = likelihoods.collate, evaluation.generate

    def watched_collate(items: Any, pad: int) -> Any:
        evaluated.append(len(items))
        return collate(items, pad)

    def watched_generate(*args: Any, **settings: Any) -> list[str]:
        answers = generate(*args, **settings)
        evaluated.extend(answers)
        return answers

    path = tiny / f"run-{next(_numbers)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihoods, "collate", watched_collate)
        patch.setattr(evaluation, "generate", watched_generate)
        try:
            federation.run(parse_config(document, "test"), path, Silent())
        except FedtuneError as problem:
            return Observed(path, evaluated, str(problem))
    return Observed(path, evaluated)


_seen: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_something(field: str, tiny: Path) -> None:
    value, company = FIELDS[field]
    name = field.partition(":")[2] or field
    key = json.dumps(company, sort_keys=True)
    if key not in _seen:
        _seen[key] = observe(tiny, company).content()
    assert _seen[key]["problem"] == ""
    changed = observe(tiny, {**company, **ALONG.get(name, {}), name: value}).content()
    if name not in MAY_STOP:
        assert changed["problem"] == ""
    different = {part for part in changed | _seen[key] if changed.get(part) != _seen[key].get(part)}
    assert different


def test_no_loss_is_infinite_in_these_runs(tiny: Path) -> None:
    """A run that breaks down would differ from any other for the wrong reason."""
    rounds = observe(tiny, {}).content()["rounds.jsonl"]
    assert all(math.isfinite(entry["eval"]["loss"]["loss"]) for entry in rounds)


def test_the_saved_file_is_plain_yaml(tiny: Path) -> None:
    path = observe(tiny, {}).path / "config.yaml"
    document = yaml.safe_load(path.read_text())
    assert document["method"]["lr"] == 0.05
    assert parse_config(document, "test") == load_config(path)
