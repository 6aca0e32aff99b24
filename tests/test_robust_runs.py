"""Robust means in whole runs: methods, masks, plans, resume, simulation; what is refused before round 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fedtune, lines, outcome, write_config
from fedbiot_bench import ALIGNED
from fedbiot_bench import Run as BiotRun
from fedcybgd_bench import bench as cyclic
from fedkseed_bench import toy as kseed
from protected import federation
from secure_rounds import equal
from toy import Bench, items

from fedtune.config.file import parse_config
from fedtune.core import robust as rules
from fedtune.core.types import ClientError
from fedtune.errors import InputError
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.methods.fedcybgd.settings import FedBAvgConfig
from fedtune.methods.registry import METHODS
from fedtune.planning.plan import plan
from fedtune.protection.robust import Robust
from fedtune.protection.robust_mean import robust_mean
from fedtune.protection.settings import SecureAggregation
from fedtune.transport.in_process import Simulation


def document(robust: dict[str, Any] | None, method: dict[str, Any], **federation: Any) -> dict[str, Any]:
    return {
        "data": {"clients": 5, "max_examples": 20, "max_length": 48, "holdout": {"source": "bundled"}},
        "method": {"name": "fedavg", "batch_size": 4, "lr": 0.01, "rounds": 2, **method},
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "bootstrap": 0},
        "federation": {"quorum": 1.0, **({"robust": robust} if robust else {}), **federation},
    }


LORA = {"lora": {"rank": 2}}


@pytest.mark.parametrize(
    ("robust", "method"),
    [
        ({"mean": "median"}, LORA),
        ({"mean": "trimmed-mean", "norm_quantile": 0.5}, {"trainable": "adapter"}),
        ({"mean": "krum"}, {**LORA, "aggregation": "stack"}),
        ({"mean": "krum", "keep": 3}, {"trainable": "full"}),
        ({"norm_quantile": 0.5}, {"lora": {"rank": 4, "client_ranks": [1, 2, 4]}}),
        ({"max_norm": 0.1}, {**LORA, "arrival": "asynchronous", "rounds": 1}),
    ],
)
def test_a_plan_with_a_robust_mean_is_what_a_run_measures(
    robust: dict[str, Any], method: dict[str, Any], tmp_path: Path
) -> None:
    config = parse_config(document(robust, method), "test")
    planned = plan(config).document
    summary = run(config, tmp_path / "run", Silent())
    assert summary["payload_bytes"] == {
        "down": planned["payload_bytes"]["down"],
        "up": planned["payload_bytes"]["up"],
    }
    measured = summary["peak_memory_bytes"]["server"]
    assert planned["server_peak_memory_bytes"]["total"] == pytest.approx(measured, rel=0.02)
    up = planned["payload_bytes"]["up"] // planned["rounds"]
    gathers = "max_norm" not in robust
    assert gathers == any(
        f"all replies of a round at once: {up:,} bytes of the server's disk" in n for n in planned["notes"]
    )
    assert not list((tmp_path / "run/checkpoints").glob("tmp*"))


def test_a_bound_takes_no_more_memory_than_none_and_a_median_no_cohort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def server(robust: dict[str, Any] | None, clients: int) -> int:
        given = document(robust, {"trainable": "full", "rounds": 1})
        given["data"] |= {"clients": clients}
        return int(plan(parse_config(given, "test")).document["server_peak_memory_bytes"]["total"])

    assert server({"max_norm": 1.0}, 5) <= server(None, 5) * 1.3
    monkeypatch.setattr(rules, "PIECE", 1 << 14)
    assert server({"mean": "median"}, 20) <= server({"mean": "median"}, 5) * 1.05


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    from command import Command

    given = document({"mean": "median", "norm_quantile": 0.6}, LORA)
    write_config(tmp_path / "c.yaml", given | {"checkpoints": {"journal": "always"}})
    whole = fedtune("run", "c.yaml", "--out", "whole", "--quiet", cwd=tmp_path)
    assert whole.status == 0, whole.err
    for watched, at in (("round-0002.replies", 4), ("checkpoints/.round", 3)):
        killed = Command("run", "c.yaml", "--out", "run", "--quiet", cwd=tmp_path, die_at=at, watched=watched)
        assert killed.wait().status == -9
        again = fedtune("run", "c.yaml", "--resume", "run", "--quiet", cwd=tmp_path)
        assert again.status == 0, again.err
        assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
        __import__("shutil").rmtree(tmp_path / "run")


def test_in_flowers_simulation_the_bits_are_the_same(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    given = document({"mean": "krum", "keep": 2, "max_norm": 0.05}, LORA, weights="capped")
    write_config(tmp_path / "c.yaml", given)
    for out, more in (("one", ()), ("many", ("transport.name=flower-simulation", "transport.workers=2"))):
        done = fedtune("run", "c.yaml", *more, "--out", out, "--quiet", cwd=tmp_path)
        assert done.status == 0, done.err
    one, many = (outcome(tmp_path / out) for out in ("one", "many"))
    assert one["final"] == many["final"] and one["rounds"] == many["rounds"]
    assert _bytes(one["wire"]) == _bytes(many["wire"])


def _bytes(wire: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return sorted((e["round"], e["client"], e["direction"], e["payload_bytes"]) for e in wire)


def test_what_was_registered_is_in_the_run_and_what_counts_beside_it(tmp_path: Path) -> None:
    given = document(None, {**LORA, "rounds": 1}, max_examples=3, quorum=0.5)
    given["data"] |= {"clients": 3, "partition": {"name": "quantity", "fractions": [0.1, 0.2, 0.7]}}
    write_config(tmp_path / "c.yaml", given)
    done = fedtune("run", "c.yaml", "--out", "run", cwd=tmp_path)
    assert done.status == 0, done.err
    said = "client 2 registered 14 examples and counts as 3"
    assert said in done.err + done.out
    clients = json.loads((tmp_path / "run/partition.json").read_text())["clients"]
    assert [(c["examples"], c.get("weight")) for c in clients] == [(2, None), (4, 3), (14, 3)]
    assert lines(tmp_path / "run/rounds.jsonl")[1]["clients"] == [0, 1, 2]


# methods


def test_fedbavg_takes_the_median_of_a_block_and_its_clients_hold_what_they_held() -> None:
    def ends(robust: dict[str, Any] | None) -> Bench:
        made = cyclic(3, config=FedBAvgConfig)
        if robust:
            mean = robust_mean(Robust(**robust), made.method, None)
            made = cyclic(3, config=FedBAvgConfig, robust=mean)
        before = dict(made.state.weights)
        made.round(1), made.round(2)
        assert before.keys() == made.state.weights.keys()
        return made

    plain, median = ends(None), ends({"mean": "median"})
    assert plain.state.held == median.state.held and _bytes(plain.wire) == _bytes(median.wire)
    moved = [n for n, w in plain.state.weights.items() if not torch.equal(w, median.state.weights[n])]
    assert moved


def test_a_cycle_of_blocks_has_its_changes_bounded() -> None:
    free = cyclic(2)
    mean = robust_mean(Robust(max_norm=1e-3), free.method, None)
    held = cyclic(2, robust=mean)
    start = dict(held.state.weights)
    free.round(1), held.round(1)
    for made, most in ((free, 10.0), (held, 2.1e-3)):
        moved = sum(float((w - start[n]).square().sum()) for n, w in made.state.weights.items()) ** 0.5
        assert (moved <= 2.1e-3) == (most < 1) and moved > 0


def test_fedbiots_adapters_have_a_robust_mean() -> None:
    plain, bounded = BiotRun(**ALIGNED), BiotRun(**ALIGNED, robust={"max_norm": 1e-3})
    start = {n: t.clone() for n, t in bounded.state.adapter.items()}
    for made in (plain, bounded):
        made.round(1), made.round(2)
    assert [e["payload_bytes"] for e in plain.wire] == [e["payload_bytes"] for e in bounded.wire]
    norm = sum(float((t - start[n]).square().sum()) for n, t in bounded.state.adapter.items()) ** 0.5
    assert 0 < norm <= 2e-3


def test_fedkseeds_sums_are_bounded_in_either_form_of_a_reply() -> None:
    for steps in (2, 30):  # pairs, and the dense sums
        free = kseed({0: items(3), 1: items(900)}, local_steps=steps)
        free.round(1)
        mean = robust_mean(Robust(max_norm=0.5), free.method, None)
        held = kseed({0: items(3), 1: items(900)}, local_steps=steps, robust=mean)
        held.round(1)
        assert float(free.state.accumulator.norm()) > 10
        assert 0 < float(held.state.accumulator.norm()) <= 0.5
        assert held.state.holders == free.state.holders


# secure aggregation


@pytest.mark.parametrize("name", ["mean", "momentum", "fedkseed"])
def test_clients_under_masks_keep_to_the_bound_that_a_server_would_set(name: str) -> None:
    from protected import kseed as masked_kseed

    settings = {"server_optimizer": {"name": "momentum"}} if name == "momentum" else {}
    method = masked_kseed if name == "fedkseed" else lambda: None
    robust = Robust(max_norm=0.05)
    plain, _ = federation(None, robust=robust, method=method(), **settings)
    masked, _ = federation(
        SecureAggregation(bits=48), robust=robust, method=method(), simulation=Simulation(), **settings
    )
    free, _ = federation(None, method=method(), **settings)
    for made in (plain, masked, free):
        made.round(1), made.round(2)
    assert equal(plain, masked) and not equal(plain, free)


def test_under_masks_a_client_checks_what_it_weighs_and_everyone_the_bound() -> None:
    from dataclasses import replace

    from fedtune.core.types import Payload
    from fedtune.protection.terms import Terms

    terms = Terms(
        (0, 1),
        torch.zeros(2, 2, 32, dtype=torch.uint8),
        torch.zeros(2, 96, dtype=torch.uint8),
        (1, 1),
        2,
        1,
        2,
        2,
        {},
    )
    terms.check(0, 1, privacy=False)
    with pytest.raises(ClientError, match="it is said to weigh 1 in the mean, and it weighs 7"):
        terms.check(0, 7, privacy=False)
    digests = {terms.digest(1, 48, None, max_norm=bound) for bound in (None, 1.0, 2.0)}
    assert len(digests) == 3
    assert replace(terms, total=3).digest(1, 48, None, max_norm=1.0) not in digests
    assert isinstance(terms.payload(), Payload)


@pytest.mark.parametrize("weights", [{"weights": "equal"}, {"max_examples": 2}])
def test_under_masks_the_weights_are_those_without(weights: dict[str, Any], tmp_path: Path) -> None:
    ends = []
    for secure in ({}, {"secure_aggregation": {"threshold": 1.0, "bits": 48}}):
        given = document({"max_norm": 0.5}, {**LORA, "rounds": 1}, **weights, **secure)
        given["data"] |= {"clients": 3, "partition": {"name": "quantity", "fractions": [0.1, 0.2, 0.7]}}
        path = tmp_path / f"run{len(ends)}"
        run(parse_config(given, "test"), path, Silent())
        ends.append((path / "final/adapter_model.safetensors").read_bytes())
    assert ends[0] == ends[1]


# what is refused


def _refused(given: dict[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        parse_config(given, "test")
    return str(error.value)


ALONE = "takes each reply in alone"
SECOND = "a second update beside the first"
SCAFFOLD = {"control_variates": True, "optimizer": "sgd", "trainable": "full"}


@pytest.mark.parametrize(
    ("robust", "method", "says"),
    [
        ({"mean": "median"}, {"rounds": 1, "arrival": "asynchronous"}, ALONE),
        ({"norm_quantile": 0.5}, {"rounds": 1, "arrival": "asynchronous"}, ALONE),
        ({"mean": "median"}, {"aggregation": "stack"}, "every client draw factors of its own"),
        ({"mean": "trimmed-mean"}, {"aggregation": "stack"}, "take krum"),
        ({"mean": "median"}, {"lora": {"rank": 2, "client_ranks": [1, 2]}}, "leave client_ranks out"),
        ({"mean": "krum"}, {"lora": {"rank": 2, "client_ranks": [1, 2]}}, "leave client_ranks out"),
        ({"mean": "krum"}, SCAFFOLD, SECOND),
        ({"max_norm": 1.0}, SCAFFOLD, SECOND),
        ({"mean": "median", "max_norm": 1.0}, SCAFFOLD, SECOND),
        ({"mean": "median"}, {"name": "fedkseed"}, "method.aggregation has means"),
        ({"mean": "krum"}, {"name": "fedkseed-pro"}, "method.aggregation has means"),
        ({"mean": "median"}, {"name": "infinite-pool"}, "takes no mean of its clients' tensors"),
        ({"max_norm": 1.0}, {"name": "infinite-pool"}, "takes no mean of its clients' tensors"),
        ({"mean": "median"}, {"name": "fedcybgd"}, "one client a turn trains a block"),
        ({"norm_quantile": 0.5}, {"name": "fedcybgd"}, "no other norms in it"),
        ({"mean": "median"}, {"name": "offsite-tuning"}, "one client holds all data"),
        ({"mean": "median"}, {"name": "standalone"}, "the clients of standalone send nothing"),
        ({"mean": "median"}, {"name": "zero-shot"}, "the clients of zero-shot send nothing"),
        ({"trim": 0.3}, {}, "trim has no effect with mean: weighted"),
        ({"mean": "median", "keep": 2}, {}, "keep has no effect with mean: median"),
        ({"mean": "weighted"}, {}, "nothing is asked for"),
        ({"max_norm": 1.0, "norm_quantile": 0.5}, {}, "both set"),
        ({"mean": "trimmed-mean", "trim": 0.5}, {}, "less than 0.5"),
        ({"mean": "krum", "keep": 5}, {}, "at most 4 can be kept"),
        ({"mean": "krum", "byzantine": 2}, {}, "needs 7 replies for 2 bad"),
        ({"mean": "trimmed-mean", "trim": 0.1}, {}, "leaves nobody out; set trim to 0.2 or more"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(
    robust: dict[str, Any], method: dict[str, Any], says: str
) -> None:
    given = document(robust, method)
    if method.get("name"):
        given["method"] = method
    assert says in _refused(given)


def test_a_quorum_too_small_for_krum_is_refused_before_any_round(tmp_path: Path) -> None:
    given = document({"mean": "krum"}, LORA, quorum=0.4)
    assert (
        "needs 3 replies for 0 bad clients (2f + 3), and federation.quorum allows a round of 2"
        in _refused(given)
    )
    by_field = {"clients": None, "partition": {"name": "by-field"}, "max_examples": 40}
    given["data"] |= by_field  # how many clients there are, only the data say
    config = parse_config({**given, "federation": {**given["federation"], "quorum": 1}}, "test")
    with pytest.raises(InputError, match="allows a round of 1 replies"):
        run(config, tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("federation", "says"),
    [
        (
            {"robust": {"mean": "median"}, "secure_aggregation": {}},
            "mean: median compares them; max_norm works",
        ),
        ({"robust": {"norm_quantile": 0.5}, "secure_aggregation": {}}, "norm_quantile compares them"),
        (
            {"robust": {"max_norm": 1.0}, "privacy": {"clip": 1.0, "noise_multiplier": 1.0}},
            "set federation.privacy.clip",
        ),
        ({"weights": "equal", "max_examples": 3}, "max_examples has no effect with weights: equal"),
        ({"weights": "capped", "secure_aggregation": {}}, "it does not know"),
        ({"weights": "equal", "privacy": {"clip": 1.0, "noise_multiplier": 1.0}}, "weigh the same already"),
        ({"max_examples": 3, "privacy": {"clip": 1.0, "noise_multiplier": 1.0}}, "weigh the same already"),
    ],
)
def test_beside_masks_and_noise(federation: dict[str, Any], says: str) -> None:
    pytest.importorskip("cryptography", reason="extra `privacy`")
    federation = dict(federation)
    assert says in _refused(document(federation.pop("robust", None), LORA, **federation))


def test_the_command_validate_says_it(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", document({"mean": "median"}, {"aggregation": "stack"}))
    done = fedtune("validate", "c.yaml", cwd=tmp_path)
    assert done.status == 2
    assert "federation.robust: fedavg: aggregation: stack has every client draw factors" in done.err


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_takes_a_bound_or_says_why_not(name: str) -> None:
    taken = {"fedavg", "fedkseed", "fedkseed-pro", "fedbiot", "fedot", "fedcybgd", "fedbavg"}
    given = {"method": {"name": name}, "federation": {"robust": {"max_norm": 1.0}}}
    if name in ("fedbiot", "fedot"):
        given["data"] = {"public": {"source": "bundled"}}
    if name in taken:
        assert parse_config(given, "test").federation.robust == Robust(max_norm=1.0)
    else:
        assert "federation.robust: " in _refused(given)
