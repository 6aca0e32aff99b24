"""Errors and intervals of scores, and their spread over clients, against hand computation."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import fedtune, write_config
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.file import parse_config
from fedtune.core.seeds import numpy_generator
from fedtune.errors import InputError
from fedtune.evaluation.bootstrap import metrics_of, summarize
from fedtune.evaluation.clients import spread
from fedtune.evaluation.types import Outcome, Scored
from fedtune.federation.data import Split, prepare_data

numbers = st.floats(-100, 100)


def one(scored: Scored, resamples: int = 300) -> dict[str, float]:
    return summarize([Outcome({"m": scored})], resamples=resamples, seed=3)


@given(st.lists(numbers, min_size=2, max_size=20))
def test_a_mean_has_the_textbook_error(items: list[float]) -> None:
    got = one(Scored(items))
    assert got["m"] == pytest.approx(sum(items) / len(items))
    assert got["m_stderr"] == pytest.approx(statistics.stdev(items) / math.sqrt(len(items)), abs=1e-9)
    assert min(items) - 1e-9 <= got["m_low"] <= got["m_high"] <= max(items) + 1e-9
    assert got["examples"] == len(items)


@given(st.lists(st.tuples(numbers, st.integers(1, 9)), min_size=2, max_size=12))
def test_a_weighted_mean_has_the_linearised_error_of_a_ratio(pairs: list[tuple[float, int]]) -> None:
    values, weights = zip(*pairs, strict=True)
    got = one(Scored(values, weights=weights))
    n, total = len(pairs), sum(weights)
    mean = sum(v * w for v, w in pairs) / total
    squares = sum((w * (v - mean)) ** 2 for v, w in pairs)
    assert got["m"] == pytest.approx(mean, abs=1e-9)
    assert got["m_stderr"] == pytest.approx(math.sqrt(n / (n - 1) * squares) / total, abs=1e-9)
    repeated = [v for v, w in pairs for _ in range(w)]
    assert got["m"] == pytest.approx(sum(repeated) / len(repeated), abs=1e-9)


def test_the_interval_is_the_middle_of_the_draws() -> None:
    items = [0.0, 1.0, 1.0, 3.0]
    drawn = numpy_generator(3, "bootstrap").integers(0, 4, size=(300, 4))
    means = [sum(items[i] for i in row) / 4 for row in drawn]
    low, high = np.percentile(means, (2.5, 97.5))
    got = one(Scored(items))
    assert (got["m_low"], got["m_high"]) == (pytest.approx(low), pytest.approx(high))
    assert got == one(Scored(items))
    weighted = one(Scored(items, weights=[1, 1, 1, 1]))
    assert weighted == pytest.approx(got)
    by_hand = one(Scored(items, aggregate=lambda drawn: sum(drawn) / len(drawn)))
    assert (by_hand["m_low"], by_hand["m_high"]) == (pytest.approx(low), pytest.approx(high))
    assert by_hand["m_stderr"] == pytest.approx(statistics.stdev(means))


def test_the_interval_covers_about_95_in_100() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        got = one(Scored((rng.random(60) < 0.4).tolist()))
        inside += got["m_low"] <= 0.4 <= got["m_high"]
    assert 180 <= inside <= 198


def test_what_has_no_error() -> None:
    assert one(Scored([1.0])) == {"m": 1.0, "examples": 1}
    assert set(one(Scored([1.0, 2.0]), resamples=0)) == {"m", "m_stderr", "examples"}
    assert set(one(Scored([1.0, 2.0], aggregate=max), resamples=0)) == {"m", "examples"}
    assert summarize([Outcome({}, {"skipped": 3})], resamples=10, seed=0) == {"skipped": 3}
    assert one(Scored([1.0, 2.0], exact=1.25))["m"] == 1.25


def test_several_models_are_one_mean_over_the_same_examples() -> None:
    a, b = Scored([0.0, 1.0, 1.0, 0.0]), Scored([1.0, 1.0, 0.0, 0.0])
    got = summarize(
        [Outcome({"m": a}, {"cut": 1}), Outcome({"m": b}, {"cut": 2, "x": 5})], resamples=300, seed=3
    )
    alone = one(Scored([0.5, 1.0, 0.5, 0.0]))
    assert {name: got[name] for name in alone} == pytest.approx(alone)
    assert (got["cut"], got["x"]) == (1.5, 5)


def test_a_metric_that_one_model_lacks_is_the_mean_over_the_others() -> None:
    outcomes = {
        "client-0000": Outcome({}, {"unjudged": 2}),  # none of its answers could be judged
        "client-0001": Outcome({"m": Scored([1.0, 3.0])}, {"unjudged": 0}),
        "client-0002": Outcome({"m": Scored([5.0, 7.0])}, {"unjudged": 0}),
    }
    got = summarize(list(outcomes.values()), resamples=0, seed=0)
    assert got["m"] == (2.0 + 6.0) / 2
    assert got["m_stderr"] == pytest.approx(1.0)  # of 3 and 5, the models' mean on each example
    assert (got["examples"], got["unjudged"]) == (2, 2 / 3)
    over = spread({name: {"mt-bench": outcome} for name, outcome in outcomes.items()}, [])
    assert over["mt-bench"]["m"]["clients"] == {"1": 2.0, "2": 6.0}


def test_metrics_are_told_from_their_errors() -> None:
    scores = dict.fromkeys(
        ["f1", "f1_stderr", "f1_low", "f1_high", "examples", "truncated", "f1/x_low", "slow_low"], 0.0
    )
    assert metrics_of(scores) == ["f1", "f1/x_low", "slow_low"]


LOSS = Scored([1.0, 2.0, 3.0, 4.0], weights=[1, 3, 1, 1], lower_is_better=True)


def test_clients_with_models_of_their_own() -> None:
    better = replace(LOSS, items=[1.0, 1.0, 1.0, 1.0])
    outcomes = {
        "client-0000": {"loss": Outcome({"loss": better})},
        "client-0007": {"loss": Outcome({"loss": LOSS})},
    }
    mean = (1 + 6 + 3 + 4) / 6
    assert spread(outcomes, ())["loss"]["loss"] == {
        "mean": pytest.approx((1 + mean) / 2),
        "sd": pytest.approx(abs(mean - 1) / math.sqrt(2)),
        "worst": pytest.approx(mean),
        "worst_client": 7,
        "clients": {"0": 1.0, "7": pytest.approx(mean)},
    }
    own = spread(outcomes, (7, 7, 0, 7))["loss"]["loss"]
    assert own["clients"] == {"0": 1.0, "7": pytest.approx((1 + 6 + 4) / 5)}


def test_clients_with_examples_of_their_own() -> None:
    right = Outcome({"accuracy": Scored([True, False, True, True])})
    outcomes = {"global": {"accuracy": right, "far_task": right}}
    got = spread(outcomes, (0, 0, 1, 1))
    assert list(got) == ["accuracy"]  # the examples of another task belong to nobody
    assert got["accuracy"]["accuracy"] == {
        "mean": 0.75,
        "sd": pytest.approx(0.5 / math.sqrt(2)),
        "worst": 0.5,
        "worst_client": 0,
        "clients": {"0": 0.5, "1": 1.0},
    }
    assert spread(outcomes, ()) == {}
    assert spread(outcomes, (4, 4, 4, 4))["accuracy"]["accuracy"]["sd"] is None


def split(**changes: Any) -> Split:
    data = {"clients": 5, "max_examples": 60, "holdout": {"client_fraction": 0.25}, **changes}
    return prepare_data(parse_config({"data": data}, "test"), pooled=False)


def test_each_client_keeps_a_part_of_its_own() -> None:
    dealt, whole = split(), split(holdout={"source": "bundled"})
    assert len(dealt.evaluation) == len(dealt.owners) == 15
    for client, before in whole.clients.items():
        own = [e for e, owner in zip(dealt.evaluation, dealt.owners, strict=True) if owner == client]
        assert len(own) == 3
        assert len(dealt.clients[client]) == 9
        assert sorted(map(repr, own + dealt.clients[client])) == sorted(map(repr, before))
    assert dealt.partition["held_out"] == 15
    pooled = prepare_data(
        parse_config(
            {"data": {"clients": 5, "max_examples": 60, "holdout": {"client_fraction": 0.25}}}, "test"
        ),
        pooled=True,
    )
    assert pooled.evaluation == dealt.evaluation
    assert sorted(map(repr, pooled.clients[0])) == sorted(
        repr(e) for part in dealt.clients.values() for e in part
    )
    with pytest.raises(InputError, match=r"client_fraction is 0\.25, but client 0 has 1 examples"):
        split(max_examples=5)


def test_a_comparison_shows_interval_and_worst_client(tmp_path: Path) -> None:
    write_config(
        tmp_path / "c.yaml",
        {
            "data": {"clients": 3, "max_examples": 30, "max_length": 64, "holdout": {"client_fraction": 0.2}},
            "method": {"name": "fedavg", "rounds": 1, "batch_size": 4, "lr": 0.05, "lora": {"rank": 2}},
            "evaluation": {"tasks": ["loss"], "bootstrap": 100},
        },
    )
    done = fedtune("compare", "c.yaml", "--out", "out", "--json", "--quiet", cwd=tmp_path)
    assert done.status == 0, done.err
    document = done.json()
    assert [row["config"] for row in document["rows"]] == ["c", "standalone", "centralized", "zero-shot"]
    for row, entry in zip(document["rows"], document["table"], strict=True):
        scores, cell = row["evaluation"]["loss"], entry["metrics"]["loss.loss"]
        clients = row["per_client"]["loss"]["loss"]
        assert set(clients["clients"]) == {"0", "1", "2"}
        assert clients["worst"] == max(clients["clients"].values())
        assert (cell["low"], cell["high"]) == (scores["loss_low"], scores["loss_high"])
        assert (cell["worst"], cell["client_sd"]) == (clients["worst"], clients["sd"])
        assert cell["low"] < cell["mean"] < cell["high"]
    assert document["rows"][3]["per_client"] != document["rows"][0]["per_client"]
    header, _, first = (tmp_path / "out/table.md").read_text().splitlines()[2:5]
    assert header.startswith(
        "| configuration | loss | 95 % over examples | worst client | against the first |"
    )
    cell = document["table"][0]["metrics"]["loss.loss"]
    assert f"| {cell['mean']:.4f} | {cell['low']:.4f} to {cell['high']:.4f} | {cell['worst']:.4f} |" in first
