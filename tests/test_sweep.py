"""`fedtune sweep`: the grid, what is chosen by what, points that fail, and going on."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.cli.main import main
from fedtune.config.file import load_config, parse_config
from fedtune.config.yaml_text import read_yaml
from fedtune.errors import FederationError, InputError
from fedtune.evaluation.better import better
from fedtune.evaluation.types import Outcome
from fedtune.federation import several
from fedtune.federation.data import prepare_data
from fedtune.federation.run import run as run_one
from fedtune.federation.sweep import Axis, axis, points
from fedtune.report.sweeps import sweep_plot, sweep_rows


def test_commas_inside_brackets_and_quotes_belong_to_a_value() -> None:
    assert axis("method.lr=1e-4, 3e-4") == Axis("method.lr", ("1e-4", "3e-4"))
    assert axis("method.lora={rank: 2, alpha: 4},{rank: 4}").values == ("{rank: 2, alpha: 4}", "{rank: 4}")
    assert axis("method.lora.targets=[q_proj,v_proj],auto").values == ("[q_proj,v_proj]", "auto")
    assert axis("data.category='a,b',c").values == ("'a,b'", "c")


@pytest.mark.parametrize("word", ["method.lr", "=1,2", "method..lr=1", "method.lr=", "method.lr=1,,2"])
def test_what_is_no_axis_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="is no axis of a sweep; write key=value,value"):
        axis(word)


def test_a_value_is_there_once_and_a_setting_too() -> None:
    with pytest.raises(InputError, match="has a value twice"):
        axis("method.lr=1e-4,1e-4")
    with pytest.raises(InputError, match=r"each once, as in method\.lr=1e-4,3e-4; got a, a"):
        points([axis("a=1,2"), axis("a=3")], None, 0)
    with pytest.raises(InputError, match="seed is no axis of a sweep"):
        points([axis("seed=1,2")], None, 0)
    with pytest.raises(InputError, match="got none"):
        points([], None, 0)


def test_the_grid_is_whole_and_in_order() -> None:
    found = points([axis("method.lr=1,2"), axis("method.lora.rank=4,8,16")], None, 0)
    assert [point.name for point in found] == [
        *("lr=1,rank=4", "lr=1,rank=8", "lr=1,rank=16", "lr=2,rank=4", "lr=2,rank=8", "lr=2,rank=16")
    ]
    assert found[4].settings == {"method.lr": "2", "method.lora.rank": "8"}


def test_names_tell_points_apart_and_fit_a_folder() -> None:
    same_end = points([axis("data.max_examples=1,2"), axis("evaluation.max_examples=3")], None, 0)
    assert same_end[0].name == "data.max_examples=1,evaluation.max_examples=3"
    odd = points([axis("model.name=a/b,a:b")], None, 0)
    assert [point.name for point in odd] == ["name=a_b-0", "name=a_b-1"]


def test_trials_are_of_the_grid_each_once_and_the_seed_s() -> None:
    axes = [axis("a=1,2,3,4"), axis("b=1,2,3,4,5")]
    whole = [point.name for point in points(axes, None, 0)]
    for seed in range(20):
        some = [point.name for point in points(axes, 7, seed)]
        assert len(set(some)) == 7 and some == [name for name in whole if name in some]
        assert some == [point.name for point in points(axes, 7, seed)]
    assert len({tuple(point.name for point in points(axes, 7, seed)) for seed in range(20)}) > 10
    with pytest.raises(InputError, match="trials must be from 1 to the grid's 20 points, got 21"):
        points(axes, 21, 0)
    many = [axis(f"k{i}={','.join(map(str, range(11)))}") for i in range(3)]
    with pytest.raises(InputError, match="1,331 points, more than 1,000; set trials"):
        points(many, None, 0)
    assert len(points(many, 5, 0)) == 5


def test_losses_are_better_lower_and_all_else_higher() -> None:
    assert min([0.7, 0.3, math.nan], key=better("loss.loss")) == 0.3
    assert min([0.7, 0.3, math.inf], key=better("accuracy.accuracy")) == 0.7
    assert min([7.0, 3.0], key=better("wikitext.word_perplexity")) == 3.0
    assert min([0.7, 0.3], key=better("loss.accuracy")) == 0.7  # the metric's word counts, not the task's
    assert min([0.7, 0.3], key=better("accuracy.accuracy/add")) == 0.7
    for unknown in ("mine.brier_score", "mine.wer", "mine.error_free"):  # a guess would choose the worst
        with pytest.raises(InputError, match="is better when lower or higher is not known"):
            better(unknown)


def test_who_brings_a_metric_says_which_way_is_better(parts_as_before: None, tmp_path: Path) -> None:
    fedtune.register_metric("letters-off", lower_is_better=True, summary="a length")(
        lambda answer, reference: len(reference)
    )
    fedtune.register_metric("letters-right", summary="a length")(lambda answer, reference: len(answer))
    assert min([0.7, 0.3], key=better("letters-off.letters_off")) == 0.3
    assert min([0.7, 0.3], key=better("letters-right.letters_right")) == 0.7

    def nothing(env: object) -> Outcome:
        return Outcome({})

    fedtune.register_task("unsaid", metric="this", summary="nothing")(nothing)
    fedtune.register_task("said", metric="this", lower_is_better=True, summary="nothing")(nothing)
    assert min([0.7, 0.3], key=better("said.this")) == 0.3
    with pytest.raises(InputError, match=r"unsaid.this is better when lower or higher is not known"):
        fedtune.sweep(
            document(evaluation={"tasks": ["unsaid"]}), {"method.lr": [1e-3]}, out=tmp_path / "none"
        )
    assert not (tmp_path / "none").exists()


def document(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"name": "bundled"},
        "data": {"train": "bundled", "clients": 2, "max_examples": 16},
        "method": {"name": "fedavg", "rounds": 1, "local_steps": 1, "batch_size": 4, "trainable": "lora"},
        "evaluation": {"tasks": ["loss"], "every": 0, "max_examples": 8, "bootstrap": 0},
    } | changes


def test_a_sweep_finds_the_best_and_goes_on_where_it_was(tmp_path: Path) -> None:
    grid: dict[str, Any] = {"method.lr": [1e-4, 1e-2], "method.lora.rank": [2]}
    found = fedtune.sweep(document(), grid, seeds=[0, 1], validation=0.25, out=tmp_path / "s", progress=False)
    saved = json.loads((tmp_path / "s/sweep.json").read_text())
    assert found.document["points"] == saved["points"] and len(saved["rows"]) == 4
    means = {p["name"]: p["metrics"]["loss.loss"]["mean"] for p in saved["points"]}
    assert found.best == min(means, key=lambda name: means[name]) == "lr=0.01,rank=2"
    assert found.settings == {"method.lr": "0.01", "method.lora.rank": "2"}
    best = load_config(tmp_path / "s/best.yaml")
    assert read_yaml(tmp_path / "s/best.yaml").keys() == document().keys()  # what was set, and no more
    assert best.method.lr == 0.01 and best.data.holdout.validation is None  # type: ignore[attr-defined]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*-seed*/summary.json")}
    assert len(made) == 4
    again = fedtune.sweep(
        document(),
        ["method.lr=0.0001,0.01", "method.lora.rank=2"],
        seeds=[0, 1],
        validation=0.25,
        out=tmp_path / "s",
        progress=False,
    )
    assert {path: path.stat().st_mtime_ns for path in made} == made and str(again) == str(found)
    assert (tmp_path / "s/table.md").read_text() == str(found)
    assert str(found).splitlines()[4].startswith("| lr=0.01,rank=2 (best) |")
    assert "25% of the training examples, held out for this" in str(found)
    with pytest.raises(
        InputError, match=r"no metric loss\.f1 in these runs; there are loss\.loss, loss\.perplexity"
    ):
        fedtune.sweep(
            document(),
            grid,
            seeds=[0, 1],
            validation=0.25,
            metric="loss.f1",
            out=tmp_path / "s",
            progress=False,
        )


def test_what_is_validated_on_is_never_trained_on_nor_held_out(tmp_path: Path) -> None:
    for holdout in ({"fraction": 0.2}, {"source": "bundled"}, {"category": "last"}):
        own = document(data={"train": "bundled", "clients": 2, "holdout": holdout})
        shared = document(data={"train": "bundled", "clients": 2, "holdout": {**holdout, "validation": 0.3}})
        plain, validated = (prepare_data(parse_config(each, "x"), pooled=True) for each in (own, shared))
        trained, scored = set(validated.clients[0]), set(validated.held_out)
        assert not trained & scored and not scored & set(plain.held_out)
        assert trained | scored == set(plain.clients[0])
        assert len(validated.held_out) == round(0.3 * len(plain.clients[0]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"holdout": {"client_fraction": 0.2, "validation": 0.1}}, "not with client_fraction"),
        ({"holdout": {"fraction": 0.2, "validation": 1.0}}, "less than 1"),
        ({"holdout": {"validation": 0.1}}, "set exactly one of fraction"),
    ],
)
def test_validation_that_makes_no_sense_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_config(document(data={"train": "bundled", "clients": 2, **changes}), "x")


def test_every_point_is_checked_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"at method\.lr=-1: .*greater than 0"):
        fedtune.sweep(document(), ["method.lr=1e-3,-1"], out=tmp_path / "s", progress=False)
    with pytest.raises(InputError, match="learnin"):
        fedtune.sweep(document(), ["method.learning_rate=1e-3"], out=tmp_path / "s", progress=False)
    for wrong in ([0, 0], [-1], [True], []):
        with pytest.raises(InputError, match="different whole numbers"):
            fedtune.sweep(document(), ["method.lr=1e-3"], seeds=wrong, out=tmp_path / "s", progress=False)
    with pytest.raises(InputError, match="validation is a share"):
        fedtune.sweep(document(), ["method.lr=1e-3"], validation=2.0, out=tmp_path / "s", progress=False)
    with pytest.raises(InputError, match=r"of a task that is scored; there are loss, got f1\.f1"):
        fedtune.sweep(document(), ["method.lr=1"], metric="f1.f1", out=tmp_path / "s", progress=False)
    with pytest.raises(InputError, match="a dictionary or a list of texts"):
        fedtune.sweep(document(), "method.lr=1e-3", out=tmp_path / "s", progress=False)
    with pytest.raises(InputError, match=r"method\.lr takes a list of values"):
        fedtune.sweep(document(), {"method.lr": "1e-3"}, out=tmp_path / "s", progress=False)
    assert not (tmp_path / "s").exists()


def test_a_point_that_cannot_finish_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_one

    def run(config: Any, path: Path, *rest: Any, **named: Any) -> dict[str, Any]:
        if config.method.lr == 1.0:
            raise FederationError("the loss became nan")
        return real(config, path, *rest, **named)

    monkeypatch.setattr(several, "run", run)
    found = fedtune.sweep(document(), ["method.lr=1.0,1e-3"], out=tmp_path / "s", progress=False)
    assert found.best == "lr=1e-3"
    assert found.document["points"][0]["error"] == "seed 0: the loss became nan"
    header, rows = sweep_rows(found.document)
    assert header[-1] == "ended by" and rows[1] == ["lr=1.0", "", "", "", "seed 0: the loss became nan"]
    every = fedtune.sweep(document(), ["method.lr=1.0"], out=tmp_path / "t", progress=False)
    assert every.best is None and not (tmp_path / "t/best.yaml").exists()
    with pytest.raises(InputError, match="no run of the sweep came to its end"):
        assert every.settings


def drawn_of(settings: list[dict[str, str]]) -> str | None:
    made = [
        {"name": str(at), "settings": each, "metrics": {"loss.loss": {"mean": 1.0 + at, "sd": 0.1}}}
        for at, each in enumerate(settings)
    ]
    return sweep_plot({"metric": "loss.loss", "points": made, "rows": []})


def test_the_picture_has_a_line_for_each_value_of_the_others() -> None:
    pytest.importorskip("matplotlib")
    two = [{"method.lr": lr, "method.lora.rank": rank} for rank in ("2", "4") for lr in ("1e-4", "1e-2")]
    drawn = drawn_of(two)
    assert drawn is not None and "rank 2" in drawn and "rank 4" in drawn and "method.lr" in drawn
    assert drawn == drawn_of(two)
    assert drawn_of([{"method.optimizer": "sgd"}, {"method.optimizer": "adamw"}]) is None
    assert drawn_of([]) is None


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(document()))

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fedtune", "sweep", str(tmp_path / "c.yaml"), *words, "--quiet"])
        main()
        return capsys.readouterr().out

    out = str(tmp_path / "s")
    said = call("method.lr=1e-3,1e-2", "--validation", "0.25", "--set", "seed=3", "--out", out)
    assert "(best)" in said and f"The best: fedtune run {out}/best.yaml" in said
    found = json.loads(
        call("method.lr=1e-3,1e-2", "--validation", "0.25", "--set", "seed=3", "--out", out, "--json")
    )
    assert found["best"] in ("lr=1e-3", "lr=1e-2") and found["validation"] == 0.25
    assert [row["seed"] for row in found["rows"]] == [3, 3]
    with pytest.raises(SystemExit):
        call("method.lr=1e-3", "--seeds", "a")
    assert "--seeds must be different whole numbers" in capsys.readouterr().err
