"""`federation.selection`: tiers, candidates and moments by hand, losses asked for, runs, plans, refusals."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fedtune
from model_families import save_folder
from toy import Toy, items

from fedtune.config.file import parse_config
from fedtune.core.client import ClientRunner
from fedtune.core.cohort import sample_cohort
from fedtune.core.ledger import Ledger
from fedtune.core.loop import RoundLoop
from fedtune.core.selection import candidates, highest, there, tier, tiers
from fedtune.core.types import Arrival
from fedtune.errors import FederationError, InputError
from fedtune.federation.journal import Journal
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.federation.selecting import remembered_losses
from fedtune.measure.clock import Clock
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.planning.plan import plan
from fedtune.transport.in_process import InProcess, Simulation

CPU = torch.device("cpu")


def test_tiers_by_hand() -> None:
    """Seven clients of 1, 9, 4 s in turn: 0, 3, 6 take one second, 2, 5 four, 1, 4 nine."""
    assert tiers(range(7), [1.0, 9.0, 4.0], 3) == [[0, 3, 6], [2, 5], [1, 4]]
    assert tiers(range(5), [2.0], 2) == [[0, 1, 2], [3, 4]]
    seen = Counter[int]()
    for round in range(1, 601):
        drawn = tier(range(9), [1.0, 9.0, 4.0], 3, 2, seed=3, round=round)
        assert len(drawn) == 2 and len({client % 3 for client in drawn}) == 1
        seen.update(drawn)
    assert all(100 < times < 170 for times in seen.values())  # 600 rounds x 2 of 9: 133 each


def test_candidates_by_their_examples() -> None:
    examples = {0: 1, 1: 2, 2: 7, 3: 0}
    first = Counter(
        candidates(examples, 1, by_examples=True, seed=1, round=round)[0] for round in range(1, 2001)
    )
    assert first[3] == 0
    for client in range(3):  # the chance of the first draw is the share of examples
        assert first[client] / 2000 == pytest.approx(examples[client] / 10, abs=0.04)
    even = Counter(
        candidates(examples, 1, by_examples=False, seed=1, round=round)[0] for round in range(1, 2001)
    )
    assert all(even[client] / 2000 == pytest.approx(1 / 4, abs=0.04) for client in range(4))
    assert candidates(examples, 4, by_examples=True, seed=1, round=1) == (0, 1, 2)
    assert candidates(examples, 4, by_examples=False, seed=1, round=1) == (0, 1, 2, 3)


def test_the_highest_by_hand() -> None:
    assert highest({4: 1.0, 2: 3.0, 9: 2.0, 1: 3.0}, 2) == (1, 2)
    assert highest({4: 1.0, 2: math.inf, 9: math.inf, 1: 3.0}, 1) == (2,)
    assert highest({4: 1.0}, 3) == (4,)
    rounds: list[dict[str, Any]] = [
        {"client_losses": {"0": 2.0, "3": 1.0}, "left_out": {"2": "it dropped out"}},
        {},
        {"client_losses": {"0": 0.5}, "left_out": {"3": "it is late"}},
    ]
    wanted = {0: 0.5, 1: math.inf, 2: 0.75, 3: 1.0}  # 2 never replied: the mean of 0.5 and 1
    assert remembered_losses(rounds, range(4)) == wanted
    assert remembered_losses([], [0]) == {0: math.inf}


def test_who_is_there() -> None:
    for round in range(1, 50):
        some = there(range(6), [0.3, 1.0], 3, prefer="random", seed=0, round=round)
        assert len(set(some)) == 3 and list(some) == sorted(some)
    rare = Counter(
        client
        for round in range(1, 400)
        for client in there(range(4), [0.1, 1.0], 2, prefer="random", seed=0, round=round)
    )
    assert rare[1] > 3 * rare[0] and rare[0] > 0
    with pytest.raises(FederationError, match="in none of 10,000 moments were 2 clients there at once"):
        there(range(3), [1e-9], 2, prefer="random", seed=0, round=1)


def test_the_least_asked_come_first() -> None:
    """Where all are there, three rounds of two ask each of six clients once."""
    for begin in (1, 4, 7):
        asked = [
            there(range(6), [1.0], 2, prefer="least-asked", seed=5, round=round)
            for round in range(begin, begin + 3)
        ]
        assert sorted(client for some in asked for client in some) == list(range(6))


def bench(tells: bool = True, wire: list[dict[str, Any]] | None = None) -> tuple[RoundLoop, FedAvg, Any]:
    """Three clients of a model of one weight at 1, whose loss is (w - y)² / 2."""
    method = FedAvg(
        Config.model_validate({"trainable": "full", "optimizer": "sgd", "lr": 0.5, "batch_size": 2}), 0
    )
    data, model, clock = {0: items(3, 5), 1: items(5), 2: items(9, 1, 5)}, Toy(), Clock()
    runner = ClientRunner(
        method,
        model,
        data,
        pad_id=0,
        seed=0,
        device=CPU,
        tells=(lambda job, env: method.client_loss(job, env, None)) if tells else None,
    )
    transport = InProcess(runner, simulation=Simulation(dropout=0.9), deadline_s=None, seed=0, clock=clock)
    ledger = Ledger((wire if wire is not None else []).append, lambda entry: None)
    return RoundLoop(method, transport, ledger, clock, CPU), method, method.init(model)


def test_losses_by_hand_and_what_they_cost() -> None:
    """(2 + 8) / 2, 8 and (32 + 0 + 8) / 3; a number up, the weight down, and nobody drops out of that."""
    wire: list[dict[str, Any]] = []
    loop, _, state = bench(wire=wire)
    losses, without = loop.losses(state, sample_cohort({0: 2, 1: 1, 2: 3}, None, seed=0, round=1), 1)
    assert losses == {0: 5.0, 1: 8.0, 2: pytest.approx(40 / 3)} and without == {}
    assert highest(losses, 2) == (1, 2)
    assert {entry["kind"] for entry in wire} == {"selection"}
    assert [entry["payload_bytes"] for entry in wire] == [4] * 6


def test_a_client_that_was_not_told_so_says_no_loss() -> None:
    loop, _, state = bench(tells=False)
    losses, without = loop.losses(state, sample_cohort({0: 2, 1: 1}, None, seed=0, round=1), 1)
    assert losses == {} and all("has no federation.selection" in why for why in without.values())


def test_a_round_that_is_done_again_does_not_ask_again(tmp_path: Path) -> None:
    """The journal has two exchanges; done again, the round's own one comes back and not the first."""
    told = iter([b"loss", b"update"])

    class Once:
        def exchange(self, round: int, frames: Any, *, in_plan_order: bool) -> Any:
            yield from (Arrival(client, next(told)) for client, _ in frames)

    journal = Journal(Once(), tmp_path, {}, "always")
    found = [next(journal.exchange(1, iter([(0, b"")]), in_plan_order=True)).frame for _ in range(2)]
    journal.again(1, behind=1)
    found.append(next(journal.exchange(1, iter([(0, b"")]), in_plan_order=True)).frame)
    assert [bytes(frame) for frame in found] == [b"loss", b"update", b"update"]  # type: ignore[arg-type]


LOSS = {"name": "loss", "candidates": 4}
LAST = {"name": "loss", "losses": "last"}
SPEED = {"name": "speed", "seconds": [1.0, 2.0], "tiers": 2}
THERE = {"name": "availability", "chances": [0.9, 0.4], "prefer": "least-asked"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and 30 examples."""
    folder = tmp_path_factory.mktemp("tiny")
    save_folder(folder / "model", blocks=4)
    rows = [{"instruction": f"w{4 + i} w{5 + i}", "output": f"w{20 + i % 5} w30"} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def _in_tiny(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)


def settings(selection: dict[str, Any], **changes: Any) -> dict[str, Any]:
    federation = {"clients_per_round": 2, "selection": selection, **changes.pop("federation", {})}
    return {
        "model": {"name": "model"},
        "data": {
            "train": "rows.jsonl",
            "template": "plain",
            "max_length": 32,
            "clients": 6,
            "holdout": {"fraction": 0.2},
        },
        "method": {
            "name": "fedavg",
            "rounds": 3,
            "batch_size": 4,
            "lr": 1e-2,
            "lora": {"rank": 2},
            **changes.pop("method", {}),
        },
        "federation": federation,
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "every": 0, "bootstrap": 0},
        **changes,
    }


def rounds_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()][1:]


@pytest.mark.parametrize("selection", [LOSS, LAST, SPEED, THERE], ids=["loss", "last", "speed", "there"])
def test_a_run_has_its_plans_bytes(selection: Any, tmp_path: Path) -> None:
    config = parse_config(settings(selection), "here")
    done, planned = run(config, tmp_path / "run", Silent()), plan(config).document["payload_bytes"]
    assert planned["exact"]
    assert {way: planned[way] for way in ("down", "up")} == done["payload_bytes"]
    assert planned["per_client_round"] == pytest.approx(done["payload_bytes_per_client_round"], abs=1) or (
        selection == LOSS
    )
    rounds = rounds_of(tmp_path / "run")
    assert all(len(entry["clients"]) == 2 for entry in rounds)
    if selection == LOSS:
        for entry in rounds:
            losses = {int(client): loss for client, loss in entry["asked_losses"].items()}
            assert len(losses) == 4 and tuple(entry["clients"]) == highest(losses, 2)
    if selection == LAST:
        assert sorted(client for entry in rounds for client in entry["clients"]) == list(range(6))
        assert all(set(map(int, entry["client_losses"])) == set(entry["clients"]) for entry in rounds)


def test_workers_are_asked_for_their_loss_too(tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        config = parse_config(settings(LOSS, transport={"workers": workers}), "here")
        run(config, tmp_path / name, Silent())
    first, second = (rounds_of(tmp_path / name) for name in ("one", "two"))
    for entry in (*first, *second):
        del entry["seconds"]
    assert first == second
    for file in ("wire.jsonl", "final/adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("selection", [LOSS, LAST], ids=["loss", "last"])
@pytest.mark.parametrize("moment", [1, 3, 5], ids=["while asked", "behind the losses", "in the round"])
def test_killed_in_a_round_it_ends_with_the_same_bits(
    selection: Any, moment: int, tiny: Path, tmp_path: Path
) -> None:
    config = settings(selection, checkpoints={"journal": "always"}, method={"rounds": 2})
    config["model"]["name"], config["data"]["train"] = str(tiny / "model"), str(tiny / "rows.jsonl")
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    run(parse_config(config, "here"), tmp_path / "whole", Silent())
    fedtune(
        "run", "c.yaml", "--out", "run", "--quiet", cwd=tmp_path, die_at=moment, watched="round-0002.replies"
    )
    ended = fedtune("run", "c.yaml", "--resume", "run", "--quiet", cwd=tmp_path)
    assert ended.status == 0, ended.err
    for name in ("wire.jsonl", "final/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    for one, other in zip(rounds_of(tmp_path / "whole"), rounds_of(tmp_path / "run"), strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {
            k: v for k, v in other.items() if k != "seconds"
        }


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"aggregation": "stack"}},
        {"method": {"aggregation": "residual"}},
        {"method": {"rounds": 1, "arrival": "asynchronous", "local_epochs": 1}},
        {"federation": {"wire": {"dtype": "int8"}}},
        {"federation": {"robust": {"mean": "median"}}},
        {"seed": 3, "federation": {"simulate": {"dropout": 0.36}}},  # never both of a round
        {"method": {"ditto": 0.1}},
        {"method": {"fine_tune": {"local_steps": 1}}},
    ],
    ids=["stack", "residual", "asynchronous", "int8", "median", "dropout", "ditto", "fine-tune"],
)
def test_losses_go_with_other_settings(changes: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(settings({**LOSS, "examples": 3}, **changes), "here")
    done, planned = run(config, tmp_path / "run", Silent()), plan(config).document["payload_bytes"]
    if "simulate" not in changes.get("federation", {}):
        assert {way: planned[way] for way in ("down", "up")} == done["payload_bytes"]
    rounds = rounds_of(tmp_path / "run")
    asked = rounds[: config.method.rounds]  # type: ignore[attr-defined]
    for entry in asked:
        losses = {int(client): loss for client, loss in entry["asked_losses"].items()}
        assert set(entry["clients"]) | set(map(int, entry["left_out"])) == set(highest(losses, 2))
    assert all("asked_losses" not in entry for entry in rounds[len(asked) :])  # the round of fine-tuning


@pytest.mark.parametrize("aggregation", ["mean", "stack", "residual"])
def test_the_loss_that_is_told_is_the_global_models(aggregation: str, tmp_path: Path) -> None:
    """One client, with the held-out examples as its own: round 2 begins with what round 1 was scored at."""
    document = settings(
        {"name": "loss"},
        method={"aggregation": aggregation, "rounds": 2},
        federation={"clients_per_round": 1},
    )
    document["data"] |= {"clients": 1, "holdout": {"source": "rows.jsonl"}}
    document["evaluation"] |= {"every": 1, "max_examples": None}
    run(parse_config(document, "here"), tmp_path / "run", Silent())
    first, second = rounds_of(tmp_path / "run")
    assert second["asked_losses"]["0"] == pytest.approx(first["eval"]["loss"]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["fedkseed", "fedbiot", "fedcybgd"])
@pytest.mark.parametrize("selection", [SPEED, THERE], ids=["speed", "there"])
def test_other_methods_ask_them_too(name: str, selection: Any, tmp_path: Path) -> None:
    document = settings(selection)
    document["method"] = {"name": name, "rounds": 2, "batch_size": 4}
    if name == "fedkseed":
        document["method"] |= {"local_steps": 2, "seeds": 16, "lr": 1e-5}
    if name == "fedbiot":
        document["method"] |= {"alignment": {"steps_before": 0, "steps": 0}, "adapter_layers": 1}
    config = parse_config(document, "here")
    done, planned = run(config, tmp_path / "run", Silent()), plan(config).document["payload_bytes"]
    assert {way: planned[way] for way in ("down", "up")} == done["payload_bytes"]
    for place, entry in enumerate(rounds_of(tmp_path / "run"), 1):
        wanted = config.federation.selection.chosen(range(6), 2, seed=0, round=place)
        assert tuple(entry["clients"]) == wanted


def test_the_last_losses_of_other_methods(tmp_path: Path) -> None:
    document = settings(LAST)
    document["method"] = {"name": "fedkseed", "rounds": 3, "local_steps": 2, "seeds": 16, "lr": 1e-5}
    config = parse_config(document, "here")
    run(config, tmp_path / "run", Silent())
    rounds = rounds_of(tmp_path / "run")
    assert sorted(client for entry in rounds for client in entry["clients"]) == list(range(6))
    assert not plan(config).document["payload_bytes"]["exact"]


def test_tiers_go_with_secure_aggregation(tmp_path: Path) -> None:
    """The same clients and, in fixed point, the same sum as without."""
    pytest.importorskip("Crypto", reason="secure aggregation is not installed (the extra `privacy`)")
    found = []
    for name, secure in (("plain", {}), ("masked", {"secure_aggregation": {"threshold": 2}})):
        federation = {"clients_per_round": 3, **secure}
        run(parse_config(settings(SPEED, federation=federation), "here"), tmp_path / name, Silent())
        found.append([entry["clients"] for entry in rounds_of(tmp_path / name)])
    assert found[0] == found[1]


def test_ranks_that_differ_make_a_plan_no_more_than_likely() -> None:
    lora = {"lora": {"rank": 4, "client_ranks": [1, 4]}}
    document = plan(parse_config(settings(LOSS, method=lora), "here")).document
    assert not document["payload_bytes"]["exact"]
    assert any("losses decide which clients" in note for note in document["notes"])
    assert plan(parse_config(settings(SPEED, method=lora), "here")).document["payload_bytes"]["exact"]


@pytest.mark.parametrize(
    ("selection", "changes", "said"),
    [
        (LOSS, {"federation": {"clients_per_round": None}}, "set federation.clients_per_round"),
        (LOSS, {"federation": {"secure_aggregation": {}}}, "keeps clients' own numbers from the server"),
        (SPEED, {"federation": {"privacy": {"clip": 1.0, "noise_multiplier": 1.0}}}, "even and secret draw"),
        (LOSS, {"method": {"own": ["lora_B"]}}, "no whole model; take losses: last"),
        (LOSS, {"method": {"name": "fedkseed"}}, "do not tell their loss without training"),
        (LAST, {"method": {"rounds": 1}}, "no client has one before the only round"),
        ({**LAST, "examples": 3}, {}, "examples is of losses that are asked for"),
        (LAST, {"method": {"name": "fedcybgd"}}, "of their own turn's model"),
        (SPEED, {"method": {"buffer": {"size": 2}}, "federation": {"clients_per_round": 1}}, "method.buffer"),
        ({"name": "loss", "tiers": 2}, {}, "tiers"),
        ({"name": "speed", "seconds": []}, {}, "seconds"),
        ({"name": "availability", "chances": [0.0]}, {}, "chances"),
    ],
)
def test_what_makes_no_sense_is_refused(selection: Any, changes: dict[str, Any], said: str) -> None:
    document = settings(selection, **changes)
    if document["method"]["name"] != "fedavg":
        document["method"] = {"name": document["method"]["name"]}
    with pytest.raises(InputError, match=said):
        parse_config(document, "here")


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ({**SPEED, "tiers": 4}, "6 clients in 4 tiers are 1 in the smallest, and a round asks 2"),
        ({"name": "loss", "candidates": 1}, "which is 1 of 6 clients, and a round asks 2"),
        ({"name": "loss", "candidates": 9}, "but there are 6 clients"),
    ],
)
def test_too_few_clients_are_refused_before_anything(selection: Any, said: str, tmp_path: Path) -> None:
    config = parse_config(settings(selection), "here")
    for attempt in (lambda: run(config, tmp_path / "run", Silent()), lambda: plan(config)):
        with pytest.raises(InputError, match=said):
            attempt()
    assert not (tmp_path / "run").exists()


def test_too_few_losses_end_the_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FedAvg, "client_loss", lambda self, job, env, examples: math.nan)
    config = parse_config(settings(LOSS, federation={"quorum": 2}), "here")
    with pytest.raises(FederationError, match="0 of 4 clients that were asked for their loss gave one"):
        run(config, tmp_path / "run", Silent())
