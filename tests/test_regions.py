"""`method.regions`: two levels by hand, flat FedAvg to the bit, bytes by level, whole runs, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fedtune
from model_families import save_folder
from pydantic import ValidationError
from toy import Bench, Toy, items

from fedtune.config.file import parse_config
from fedtune.errors import InputError
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.planning.plan import plan
from fedtune.report.tables import rounds_and_clients

DATA = {0: items(3), 1: items(5, 5), 2: items(9, 9, 9), 3: items(2)}


def federation(regions: dict[str, Any] | None, rounds: int = 4, **more: Any) -> Bench:
    """Clients of a model of one weight, which begins at 1; one SGD step, so that Δ = (y − w) / 2."""
    settings = {
        "rounds": rounds,
        "local_steps": 1,
        "local_epochs": None,
        "batch_size": 4,
        "optimizer": "sgd",
        "lr": 0.5,
        "lr_schedule": "constant",
        "trainable": "full",
        "regions": regions,
        **more,
    }
    return Bench(FedAvg(Config.model_validate(settings), 0), Toy(), DATA)


def test_two_rounds_of_a_region_by_hand() -> None:
    """Regions {0, 2} and {1, 3}. From w = 1 both go on for two rounds, then w is their mean by examples.

    Region 0: targets 3 and 9 at 1 : 3, mean 7.5; each round goes half of the way: 4.25, then 5.875.
    Region 1: targets 5 and 2 at 2 : 1, mean 4; 2.5, then 3.25.
    """
    f = federation({"of": [0, 1], "rounds": 2})
    f.round(1)
    assert float(f.state.weights["w"]) == 1.0  # the global model waits
    assert {name: float(w) for name, w in f.state.versions.items()} == {"0/w": 4.25, "1/w": 2.5}
    f.round(2)
    assert float(f.state.weights["w"]) == pytest.approx((4 * 5.875 + 3 * 3.25) / 7)
    assert f.state.versions == {} and f.state.taken == {} and f.state.steps == 2


def test_a_region_whose_clients_were_away_counts_for_what_it_took_in() -> None:
    f = federation({"of": [0, 1], "rounds": 2})
    f.round(1, per_round=(0, 2))  # region 0 alone: 4.25 with four examples
    f.round(2, per_round=(1,))  # region 1: from 1 to 3 with two
    assert float(f.state.weights["w"]) == pytest.approx(1 + (4 * 3.25 + 2 * 2) / 6)


@pytest.mark.parametrize("of", [[0, 1], [2, 0, 1], [0, 0, 1]])
def test_one_round_a_region_is_flat_fedavg_to_the_bit(of: list[int]) -> None:
    optimizer = {"server_optimizer": {"name": "adam", "lr": 0.1}}
    flat, deep = federation(None, **optimizer), federation({"of": of}, **optimizer)
    for round in range(1, 4):
        for f in (flat, deep):
            f.round(round)
        assert torch.equal(flat.state.weights["w"], deep.state.weights["w"])
        assert flat.state.moments.keys() == deep.state.moments.keys() != set()


def test_bytes_by_level_by_hand() -> None:
    """A weight of 4 bytes: down to two regions at rounds 1 and 3, up from them, with a count, at 2 and 4."""
    f = federation({"of": [0, 1], "rounds": 2})
    for round in range(1, 5):
        f.round(round)
    found = [
        (entry["round"], entry["region"], entry["direction"], entry["payload_bytes"])
        for entry in f.wire
        if "region" in entry
    ]
    assert found == [
        (round, region, way, size)
        for round, way, size in ((1, "down", 4), (2, "up", 8), (3, "down", 4), (4, "up", 8))
        for region in (0, 1)
    ]
    assert f.ledger.regions_bytes == {"down": 16, "up": 32}
    assert f.ledger.payload_bytes == {"down": 16 + 4 * 4 * 4, "up": 32 + 4 * 4 * 4}
    assert f.ledger.payload_bytes_per_client_round() == 8.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_folder(folder / "model")
    rows = [{"instruction": f"w{4 + i} w{5 + i}", "output": f"w{20 + i % 5} w30"} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(tiny: Path, **changes: Any) -> dict[str, Any]:
    method = {"name": "fedavg", "rounds": 4, "batch_size": 4, "lr": 1e-2, "lora": {"rank": 2}}
    return {
        "model": {"name": str(tiny / "model")},
        "data": {
            "train": str(tiny / "rows.jsonl"),
            "template": "plain",
            "max_length": 32,
            "clients": 5,
            "holdout": {"fraction": 0.2},
        },
        "method": {**method, "regions": {"of": [0, 0, 1], "rounds": 2}, **changes.pop("method", {})},
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "every": 0, "bootstrap": 0},
        **changes,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"regions": {"of": [0, 1]}}},
        {"method": {"lora": {"rank": 4, "client_ranks": [1, 4]}}},
        {"federation": {"clients_per_round": 3, "wire": {"dtype": "int8", "error_feedback": True}}},
        {
            "federation": {
                "clients_per_round": 2,
                "selection": {"name": "speed", "seconds": [1.0, 2.0], "tiers": 2},
            }
        },
        {"method": {"ditto": 0.1}},
        {"method": {"own": ["lora_B"]}},
        {"method": {"fine_tune": {"local_steps": 1}}},
        {"method": {"keep_optimizer": True, "server_optimizer": {"name": "nesterov"}}},
    ],
    ids=["two rounds", "one", "ranks", "int8", "by speed", "ditto", "own", "fine-tune", "diloco"],
)
def test_a_run_has_its_plans_bytes_and_memory(changes: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    config = parse_config(settings(tiny, **changes), "here")
    done, planned = run(config, tmp_path / "run", Silent()), plan(config).document
    assert {way: planned["payload_bytes"][way] for way in ("down", "up")} == done["payload_bytes"]
    assert planned["payload_bytes"]["regions"] == done["regions_payload_bytes"]
    if changes == {}:
        assert planned["server_peak_memory_bytes"]["total"] == pytest.approx(
            done["peak_memory_bytes"]["server"], rel=0.05
        )
        assert rounds_and_clients(done) == "4 x 5"


def test_which_regions_answer_may_depend_on_losses(tiny: Path, tmp_path: Path) -> None:
    """Then a plan does not say that its bytes are exact, but those of clients are."""
    by_loss = {"clients_per_round": 2, "selection": {"name": "loss"}}
    config = parse_config(settings(tiny, federation=by_loss), "here")
    done, planned = run(config, tmp_path / "run", Silent()), plan(config).document["payload_bytes"]
    assert not planned["exact"]
    for way in ("down", "up"):
        found = done["payload_bytes"][way] - done["regions_payload_bytes"][way]
        assert planned[way] - planned["regions"][way] == found


def test_workers_and_a_kill_between_two_means_give_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    config = settings(tiny)
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    run(parse_config(config, "here"), tmp_path / "whole", Silent())
    run(parse_config({**config, "transport": {"workers": 2}}, "here"), tmp_path / "two", Silent())
    fedtune("run", "c.yaml", "--out", "run", "--quiet", cwd=tmp_path, die_at=1, watched="round-0004")
    assert fedtune("run", "c.yaml", "--resume", "run", "--quiet", cwd=tmp_path).status == 0
    for name in ("wire.jsonl", "final/adapter_model.safetensors"):
        whole, two, killed = ((tmp_path / of / name).read_bytes() for of in ("whole", "two", "run"))
        assert whole == two == killed


def test_one_round_a_region_is_a_whole_run_without_regions(tiny: Path, tmp_path: Path) -> None:
    for name, regions in (("flat", None), ("deep", {"of": [0, 1, 1]})):
        config = settings(tiny, method={"rounds": 2, "regions": regions})
        run(parse_config(config, "here"), tmp_path / name, Silent())
    first, second = (
        (tmp_path / name / "final/adapter_model.safetensors").read_bytes() for name in ("flat", "deep")
    )
    assert first == second


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": 3}, "the last rounds of the regions would reach nobody"),
        ({"aggregation": "stack", "trainable": "lora"}, "aggregation: stack is none; take mean"),
        ({"buffer": {"size": 2}}, "which buffer does not"),
        ({"control_variates": True, "optimizer": "sgd", "trainable": "full"}, "which control_variates"),
        ({"arrival": "asynchronous", "rounds": 1, "regions": {"of": [0, 1]}}, "take arrival: synchronous"),
        ({"regions": {"of": [1, 1]}}, "puts all clients into one region"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config.model_validate({"rounds": 2, "regions": {"of": [0, 1], "rounds": 2}, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"federation": {"secure_aggregation": {}}}, "regions sum their own clients"),
        ({"federation": {"robust": {"mean": "median"}}}, "regions begin with unlike weights"),
        (
            {"federation": {"privacy": {"clip": 1.0, "noise_multiplier": 1.0}}},
            "masks and noise are of one sum of all",
        ),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(changes: dict[str, Any], said: str, tiny: Path) -> None:
    with pytest.raises(InputError, match=said):
        parse_config(settings(tiny, **changes), "here")
