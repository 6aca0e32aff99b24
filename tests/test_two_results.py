"""Two results of a method, or one a client: each is scored by itself, and no score takes another's place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command import lines
from torch import nn

from fedtune.config.file import parse_config
from fedtune.evaluation.types import Outcome, Scored
from fedtune.federation import run as runs
from fedtune.federation import scoring
from fedtune.federation.data import Split
from fedtune.federation.progress import Silent

DOCUMENT: dict[str, Any] = {
    "data": {"clients": 2, "max_examples": 8, "max_length": 48},
    "method": {"name": "fedavg"},
    "evaluation": {"tasks": ["loss"], "max_examples": 2, "bootstrap": 0},
}


def scored(monkeypatch: pytest.MonkeyPatch, values: Mapping[str, float]) -> scoring.Evaluated:
    """What `evaluate` makes of models whose losses are these."""
    models = {name: nn.Linear(1, 1).train() for name in values}
    by_model = {id(model): values[name] for name, model in models.items()}

    def score(model: nn.Module, *others: Any) -> dict[str, Outcome]:
        assert not model.training
        value = by_model[id(model)]
        note = ("said of all",) if value < 9 else ("said of all", "said of one")
        found = {"loss": Scored([value] * 2, lower_is_better=True)}
        outcome = Outcome(found, notes=note, details=[{"answer": value}])
        return {"loss": outcome, "quiet": Outcome({"loss": Scored([value], lower_is_better=True)})}

    monkeypatch.setattr(scoring, "score", score)
    split = Split({}, [], (), {}, "", owners=())
    return scoring.evaluate(models.items(), None, split, parse_config(DOCUMENT, "test"))  # type: ignore[arg-type]


def test_the_result_beside_the_first_keeps_its_score(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scored(monkeypatch, {"global": 1.0, "adapemu": 9.0})
    assert found.result["loss"]["loss"] == 1.0  # the global model's, not their mean
    assert {name: each["loss"]["loss"] for name, each in found.models.items()} == {
        "global": 1.0,
        "adapemu": 9.0,
    }
    assert found.per_client == {}
    assert found.notes == {"loss": ["said of all", "said of one"]}
    assert found.details == [
        {"result": "global", "task": "loss", "answer": 1.0},
        {"result": "adapemu", "task": "loss", "answer": 9.0},
    ]


def test_one_model_a_client_is_scored_as_their_mean_and_one_model_alone_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = scored(monkeypatch, {"client-0000": 1.0, "client-0003": 4.0})
    assert found.result["loss"]["loss"] == 2.5
    assert {name: each["loss"]["loss"] for name, each in found.models.items()} == {
        "client-0000": 1.0,
        "client-0003": 4.0,
    }
    assert found.per_client["loss"]["loss"]["worst_client"] == 3
    alone = scored(monkeypatch, {"global": 3.0})
    assert alone.result["loss"]["loss"] == 3.0 and alone.models == {} and alone.per_client == {}


def test_a_run_of_fedbiot_writes_down_both(tmp_path: Path) -> None:
    method = {
        "name": "fedbiot",
        "rounds": 2,
        "local_steps": 1,
        "batch_size": 2,
        "lr": 0.01,
        "emulator": "channel-pruning",
        "layer_dropout": 0.5,
    }
    data = {**DOCUMENT["data"], "public": {"source": "bundled", "max_examples": 4}}
    config = parse_config(
        {**DOCUMENT, "data": data, "method": {**method, "alignment": {"steps": 1, "steps_before": 1}}}, "t"
    )
    summary = runs.run(config, tmp_path / "run", Silent())
    for entry in lines(tmp_path / "run" / "rounds.jsonl")[1:]:
        both = entry["eval_clients"]
        assert set(both) == {"global", "adapemu"} and both["global"] == entry["eval"] != both["adapemu"]
        assert set(both["adapemu"]["loss"]) == set(both["global"]["loss"])
    assert summary["evaluation"] == entry["eval"]
