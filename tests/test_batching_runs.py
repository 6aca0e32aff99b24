"""Runs whose batches are of like lengths or of packed rows: resumed to the bit, and counted as planned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from command import outcome

import fedtune
from fedtune.config.file import parse_config
from fedtune.errors import InputError
from fedtune.planning import workload

ALIGNED: dict[str, Any] = {"adapter_layers": 1, "alignment": {"steps_before": 1, "steps": 1, "batch_size": 2}}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "fedavg", "local_epochs": 2, "gradient_accumulation": 2, "lora": {"rank": 2}},
    "scaffold": {"name": "fedavg", "local_steps": 3, "optimizer": "sgd", "control_variates": True},
    "fedbiot": {"name": "fedbiot", "local_steps": 2, "lora": {"rank": 2}, **ALIGNED},
    "fedkseed": {"name": "fedkseed", "local_steps": 3, "seeds": 16, "lr": 1e-4},
    "fedcybgd": {"name": "fedcybgd", "local_steps": 2},
}
CASES = (
    ("scaffold", "length-grouped"),
    ("fedbiot", "length-grouped"),
    ("lora", "packed"),
    ("fedbiot", "packed"),
    ("fedkseed", "packed"),
    ("fedcybgd", "packed"),
)


def document(name: str, batching: str, **more: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"clients": 2, "max_examples": 24, "max_length": 64, "batching": batching}
    if name == "fedbiot":
        data["public"] = {"source": "bundled", "max_examples": 6}
    return {
        "data": data,
        "method": {**METHODS[name], "rounds": 2, "batch_size": 2, **more},
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "every": 0},
        "checkpoints": {"keep": None},
    }


def ended(run: Path) -> dict[str, Any]:
    """The outcome of a run, without what a rollback moved aside."""
    found = outcome(run)
    found["folder"] = [name for name in found["folder"] if not name.startswith(("rolled-back-", ".rollback"))]
    return found


@pytest.mark.parametrize(("name", "batching"), CASES)
def test_a_round_is_repeated_to_the_bit(name: str, batching: str, tmp_path: Path) -> None:
    run = fedtune.run(document(name, batching), out=tmp_path / "run", progress=False)
    first = ended(run.path)
    tokens = run.summary["tokens"]
    assert tokens == {
        key: sum(e["tokens"][key] for e in run.rounds if e["round"]) for key in ("computed", "padding")
    }
    assert 0 <= tokens["padding"] < tokens["computed"]
    run.rollback(1, progress=False)
    assert ended(run.path) == first


@pytest.mark.parametrize("batching", ["random", "length-grouped", "packed"])
def test_tokens_and_steps_are_those_of_the_plan(batching: str, tmp_path: Path) -> None:
    """A batch holds all that a client has, so that an epoch's tokens do not depend on the shuffle."""
    given = document("lora", batching, batch_size=64, local_epochs=1, gradient_accumulation=1)
    work = workload.read(parse_config(given, "here"), pooled=False, rows=64)
    run = fedtune.run(given, out=tmp_path / "run", progress=False)
    for entry in run.rounds[1:]:
        assert entry["tokens"] == dict(zip(("computed", "padding"), work.tokens, strict=True))
    planned = fedtune.plan(given, "method.batch_size=2")
    assert planned["batch"]["batching"] == batching
    if batching == "packed":
        assert work.packed is not None and work.clients is not None
        assert sum(work.packed.values()) < sum(work.clients.values())
        rows = work.packed.values()
    else:
        assert work.packed is None and work.clients is not None
        rows = work.clients.values()
    assert planned["local_steps"]["most"] == max(math.ceil(count / 2) for count in rows)
    assert planned["batch"]["longest"] == max(len(item.input_ids) for item in work.longest)
    assert planned["clients"] == 2 and sum(work.clients.values()) == 24


def test_padding_is_least_where_rows_are_packed() -> None:
    shares = {}
    for batching in ("random", "length-grouped", "packed"):
        given = document("lora", batching, batch_size=4)
        given["data"]["max_examples"] = 240
        work = workload.read(parse_config(given, "here"), pooled=False, rows=4)
        shares[batching] = work.tokens[1] / work.tokens[0]
    assert shares["packed"] < shares["random"] and shares["length-grouped"] < shares["random"]


def test_what_cannot_be_packed_is_refused_by_its_setting() -> None:
    classes = {"model": {"task": "classification"}, "data": {"batching": "packed"}}
    with pytest.raises(
        InputError, match=r"data\.batching: packed puts .* a classifier gives a row one class"
    ):
        parse_config(classes, "here")
    for form in ("prompt", "p-tuning"):
        prompt = {"data": {"batching": "packed"}, "method": {"name": "fedavg", "trainable": form}}
        with pytest.raises(InputError, match="behind the soft prompt; take length-grouped"):
            parse_config(prompt, "here")
    with pytest.raises(InputError, match=r"data\.batching"):
        parse_config({"data": {"batching": "sorted"}}, "here")
