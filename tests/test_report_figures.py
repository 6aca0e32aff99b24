"""What the figures of a report show: means over seeds, axes that mislead nobody, nothing of what is not."""

from __future__ import annotations

import base64
import re
import statistics
from typing import Any

import pytest

from fedtune.report import figures
from fedtune.report.folders import RunData, differences, flat, kinds

pytest.importorskip("matplotlib")


def run(name: str, losses: list[float], seed: int = 0, sent: int = 1500, **more: Any) -> RunData:
    entries = [
        {
            "round": round,
            "seconds": 0.5 * round,
            "train_loss": None,
            "eval": {"loss": {"loss": loss, "loss_low": loss - 1, "loss_high": loss + 1}},
        }
        for round, loss in enumerate(losses)
    ]
    settings = {"seed": seed, "run.name": name, "method.lr": more.pop("lr", 0.1)}
    payload = {round: {"down": sent - 500, "up": 500} for round in range(1, len(losses))}
    return RunData(name, "", "fedavg", more.pop("entries", entries), payload, {}, {}, settings, **more)


def texts(image: str) -> list[str]:
    """The words that a figure has, in order: each stands in a comment before its outlines."""
    return re.findall(
        r"<!-- (.*?) -->", base64.b64decode(image.partition("base64,")[2].rstrip('">')).decode()
    )


def test_runs_that_differ_in_their_seed_are_one_curve_with_its_spread() -> None:
    runs = [run("a", [4.0, 2.0]), run("b", [4.0, 3.0], seed=1), run("c", [5.0, 1.0], lr=0.2)]
    assert {name: [one.name for one in some] for name, some in kinds(runs).items()} == {
        "a (2 seeds)": ["a", "b"],
        "c": ["c"],
    }
    again = [run("a", [4.0]), run("b", [4.0])]  # of one seed: two runs, and no spread over seeds
    assert list(kinds(again)) == ["a", "b"]
    both = figures.curve("a (2 seeds)", runs[:2], "loss", "loss")
    assert both is not None and (both.rounds, both.values) == ([0, 1], [4.0, 2.5])
    off = statistics.stdev([2.0, 3.0])
    assert both.low == [4.0, 2.5 - off] and both.high == [4.0, 2.5 + off]
    assert both.megabytes == [0.0, 0.0015] and both.seconds == [0.0, 0.5]
    alone = figures.curve("c", runs[2:], "loss", "loss")
    assert alone is not None and (alone.low, alone.high) == ([4.0, 0.0], [6.0, 2.0])  # its own interval
    assert figures.curve("d", [run("d", [4.0])], "loss", "loss") is None  # a lone dot is no curve
    (image,) = figures.scores(runs)
    assert {"a (2 seeds)", "c", "round", "seconds by then"} <= set(texts(image))
    assert not [*figures.scores([run("d", [4.0])])]


def drawn(what: str, *runs: RunData) -> Any:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    curves = [figures.curve(one.name, [one], "loss", "loss") for one in runs]
    figures.against(what, [one for one in curves if one is not None])(axis)
    return axis


def test_rounds_have_whole_ticks() -> None:
    for losses in ([4.0, 3.0], [4.0, 3.0, 2.0]):
        ticks = drawn("rounds", run("x", losses)).get_xticks()
        assert all(tick == int(tick) for tick in ticks)


def test_noise_is_not_magnified() -> None:
    flat = run("x", [2.5, 2.5001])
    for entry in flat.rounds:
        del entry["eval"]["loss"]["loss_low"], entry["eval"]["loss"]["loss_high"]
    low, high = drawn("rounds", flat).get_ylim()
    assert high - low >= 0.02 * 2.5 and low < 2.5 < high


def test_bytes_that_are_far_apart_have_a_logarithmic_axis_with_its_zero() -> None:
    few, many = run("few", [2.0, 1.0]), run("many", [2.0, 1.0], sent=1_500_000)
    assert drawn("megabytes", few).get_xscale() == "linear"
    axis = drawn("megabytes", few, many)
    assert axis.get_xscale() == "symlog" and axis.get_xlim()[0] <= 0


def test_what_differs_is_named_and_nothing_else() -> None:
    assert dict(flat({"a": {"b": 1, "c": {}}, "d": [{"e": 2}]})) == {"a.b": 1, "a.c": {}, "d": [{"e": 2}]}
    one, two = run("a", [1.0]), run("b", [1.0], lr=0.2)
    assert differences([one, two]) == {"run.name": ["a", "b"], "method.lr": ["0.1", "0.2"]}
    assert differences([one, one]) == {}


def test_clients_split_arrivals_privacy_and_updates() -> None:
    per_client = {"loss": {"loss": {"mean": 2.0, "clients": {"0": 1.0, "1": 3.0, "2": None}}}}
    entries = [
        {"round": 0, "seconds": 0.0, "train_loss": None, "eval": {"loss": {"loss": 3.0}}},
        {
            "round": 1,
            "seconds": 1.0,
            "train_loss": 2.0,
            "eval": {"loss": {"loss": 2.0}},
            "per_client": per_client,
            "privacy": {"epsilon": 1.5},
            "updates": {"0": {"norm": 1.0}, "1": {"norm": None}},
            "arrivals": [
                {"clients": list(range(n)), "eval": {"loss": {"loss": 3.0 - n / 2}}} for n in (1, 2)
            ],
        },
        {"round": 2, "seconds": 1.0, "train_loss": 1.0, "eval": {}, "privacy": {"epsilon": 2.0}},
    ]
    split = [
        {"client": 0, "examples": 5, "labels": {"x": 3, "y": 1}},
        {"client": 1, "examples": 2, "labels": {}},
    ]
    one = run("one", [], entries=entries, split=split)
    assert one.clients("loss", "loss") == {0: 1.0, 1: 3.0}
    assert "loss: loss, a dot a client" in texts(next(iter(figures.clients([one]))))
    assert {"x", "y", "others", "examples", "client"} <= set(texts(next(iter(figures.split([one, one])))))
    assert len([*figures.split([one, one])]) == 1  # the same split is drawn once
    assert "clients that have arrived" in texts(next(iter(figures.arrivals([one]))))
    assert "ε spent by then" in texts(figures.privacy([one]))
    assert "norm of an update, a dot a client" in texts(figures.updates([one]))
    plain = run("plain", [2.0, 1.0])
    empty = [figures.privacy([plain]), figures.updates([plain]), figures.memory([plain])]
    assert [*figures.clients([plain]), *figures.split([plain]), *figures.arrivals([plain])] == []
    assert empty == ["", "", ""]


def test_probabilities_of_seeds_are_drawn_by_round() -> None:
    """Of seven rounds the first, the third, the fifth and the last; nothing of a method without them."""
    spread = {str(percent): 2.0 - percent / 50 for percent in range(0, 101, 5)}
    entries = [{"round": 0, "eval": {}}] + [
        {"round": round, "eval": {}, "seeds": {"drawn": 3, "probability": spread}} for round in range(1, 8)
    ]
    (image,) = figures.probabilities([run("pro", [], entries=entries), run("plain", [4.0, 3.0])])
    said = texts(image)
    assert [text for text in said if re.fullmatch(r"round \d", text)] == [
        "round 1",
        "round 3",
        "round 5",
        "round 7",
    ]
    assert {"probabilities of the seeds, pro", "times the uniform probability"} <= set(said)
    assert [*figures.probabilities([run("plain", [4.0, 3.0])])] == []
