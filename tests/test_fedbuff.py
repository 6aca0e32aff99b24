"""`method.buffer`: who comes when, steps by hand, a synchronous run where nobody is stale, plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from toy import Toy, items

from fedtune.config.file import parse_config
from fedtune.core.asking import asked
from fedtune.core.client import ClientRunner
from fedtune.core.cohort import sample_cohort
from fedtune.core.ledger import Ledger
from fedtune.core.loop import RoundLoop
from fedtune.errors import InputError
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.measure.clock import Clock
from fedtune.methods.fedavg.fedbuff import arrivals
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.planning.plan import plan
from fedtune.transport.in_process import InProcess, Simulation

CPU = torch.device("cpu")


def test_who_fills_the_buffer_by_hand() -> None:
    """Clients of 1, 2 and 5 s, two updates a step: 0 and 1 at 2, at 4, 0 and 2 at 5 (0 began at 4), ..."""
    found = [arrivals([0, 1, 2], [1.0, 2.0, 5.0], 2, round) for round in range(1, 6)]
    assert found == [((0, 1), 2.0), ((0, 1), 4.0), ((0, 2), 5.0), ((0, 1), 6.0), ((0, 1), 8.0)]
    assert arrivals([0, 1, 2], [3.0], 9, 2) == ((0, 1, 2), 6.0)
    assert arrivals([0, 1, 2, 3], [1.0, 4.0], 2, 1) == ((0, 2), 1.0)  # seconds in turn over clients


class Federation:
    """Clients of unlike speed on a model of one weight; SGD of one step on w − y, so that Δ = −lr (w − y)."""

    def __init__(self, buffer: dict[str, Any] | None, rounds: int = 5, **more: Any) -> None:
        config = Config.model_validate(
            {
                "rounds": rounds,
                "local_epochs": None,
                "local_steps": 1,
                "batch_size": 1,
                "optimizer": "sgd",
                "lr": 0.5,
                "lr_schedule": "constant",
                "trainable": "full",
                "buffer": buffer,
                **more,
            }
        )
        self.method = FedAvg(config, 0)
        self.data = {0: items(3), 1: items(5), 2: items(9)}
        self.model = Toy()
        clock = Clock()
        self.runner = ClientRunner(self.method, self.model, self.data, pad_id=0, seed=0, device=CPU)
        transport = InProcess(self.runner, simulation=Simulation(), deadline_s=None, seed=0, clock=clock)
        nothing = Ledger(lambda entry: None, lambda entry: None)
        self.loop = RoundLoop(self.method, transport, nothing, clock, CPU)
        self.state = self.method.init(self.model)

    def round(self, round: int) -> tuple[int, ...]:
        sizes = {client: len(each) for client, each in self.data.items()}
        cohort = sample_cohort(sizes, asked(self.method, round, sizes, None), seed=0, round=round)
        self.state, outcome = self.loop.run(
            self.state, cohort, round, quorum=1, on_arrival=lambda state, outcome: None
        )
        return tuple(sorted(outcome.clients))


def test_steps_and_staleness_by_hand() -> None:
    b = Federation({"size": 2, "staleness": 1.0, "seconds": [1.0, 2.0, 5.0]})
    targets, versions, begun = {0: 3.0, 1: 5.0, 2: 9.0}, [1.0], dict.fromkeys(range(3), 0)
    for round, who in enumerate([(0, 1), (0, 1), (0, 2), (0, 1), (0, 1)], 1):
        assert b.round(round) == who
        moved = [
            0.5 * (targets[c] - versions[begun[c]]) / (1 + round - 1 - begun[c]) for c in who
        ]  # client 2 of step 3 began with version 0
        versions.append(versions[-1] + sum(moved) / 2)
        begun |= dict.fromkeys(who, round)
        assert float(b.state.weights["w"]) == pytest.approx(versions[-1], rel=1e-6)
        held = {int(name.partition("/")[0]) for name in b.state.versions}
        assert held == set(begun.values()) - {round}
    assert b.state.begun == {"0": 5, "1": 5, "2": 3} and b.state.steps == 5


def test_a_buffer_of_all_is_the_synchronous_run_to_the_bit() -> None:
    buffered, plain = Federation({"size": 3, "seconds": [1.0, 7.0]}), Federation(None)
    for round in range(1, 4):
        assert buffered.round(round) == plain.round(round) == (0, 1, 2)
        assert torch.equal(buffered.state.weights["w"], plain.state.weights["w"])
    assert buffered.state.versions == {}


def test_the_servers_optimizer_takes_the_buffers_mean() -> None:
    b = Federation({"size": 1}, server_optimizer={"name": "mean", "lr": 0.5})
    assert b.round(1) == (0,)
    assert float(b.state.weights["w"]) == pytest.approx(1 + 0.5 * 0.5 * (3 - 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arrival": "asynchronous", "rounds": 1}, "which arrival: asynchronous counts on"),
        ({"ditto": 0.1}, "which own, ditto or fine_tune counts on"),
        ({"aggregation": "svd"}, "aggregation: svd is of one; take mean or freeze-a"),
        ({"control_variates": True, "optimizer": "sgd", "trainable": "full"}, "which control_variates"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config.model_validate({"buffer": {"size": 2}, **changes})
    method = FedAvg(Config.model_validate({"buffer": {"size": 2}}), 0)
    for reason in (method.sum_refusal(privacy=True), method.mean_refusal("krum")):
        assert reason and reason.startswith("buffer")


def settings(**changes: Any) -> dict[str, Any]:
    buffer = {"size": 2, "seconds": [1.0, 1.5, 4.0]}
    return {
        "data": {"train": "bundled", "clients": 5, "max_examples": 40, "holdout": {"fraction": 0.2}},
        "method": {"name": "fedavg", "rounds": 5, "batch_size": 4, "lr": 1e-3, "buffer": buffer},
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "every": 0, "bootstrap": 0},
        **changes,
    }


def test_a_run_has_its_plans_bytes_and_server_memory_with_workers_too(tmp_path: Path) -> None:
    config = parse_config(settings(), "here")
    done, planned = run(config, tmp_path / "run", Silent()), plan(config).document
    assert planned["payload_bytes"]["total"] == sum(done["payload_bytes"].values())
    assert planned["server_peak_memory_bytes"]["total"] == pytest.approx(
        done["peak_memory_bytes"]["server"], rel=0.02
    )
    lines = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    wanted = [list(arrivals(range(5), [1.0, 1.5, 4.0], 2, round)[0]) for round in range(1, 6)]
    assert [line["clients"] for line in lines[1:]] == wanted
    run(parse_config(settings(transport={"workers": 2}), "here"), tmp_path / "two", Silent())
    first, second = (
        (tmp_path / name / "final/adapter_model.safetensors").read_bytes() for name in ("run", "two")
    )
    assert first == second


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"federation": {"clients_per_round": 2}}, "whose size says how many"),
        ({"federation": {"secure_aggregation": {}}}, "buffer weighs each update by how old it is"),
        ({"federation": {"robust": {"mean": "median"}}}, "buffer holds updates of unlike age"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_config(settings(**changes), "here")
