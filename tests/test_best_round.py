"""`checkpoints.best` and `evaluation.stop`: which round a run's result is, and when it has had enough."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from model_families import save_folder

import fedtune
from fedtune.errors import InputError
from fedtune.federation import checkpoint
from fedtune.federation.keeping import best_round

WORDS = [f"w{index}" for index in range(4, 64)]
ROWS = [
    {"instruction": " ".join(WORDS[i : i + 6]), "output": " ".join(WORDS[i + 1 : i + 5])} for i in range(16)
]


def entries(*losses: float | None) -> list[dict[str, Any]]:
    """Lines of rounds.jsonl; of None the round was not scored."""
    return [
        {"round": at, "eval": {} if loss is None else {"loss": {"loss": loss}}}
        for at, loss in enumerate(losses)
    ]


def test_the_best_round_is_the_first_with_the_best_finite_score() -> None:
    assert best_round(entries(0.1, 0.9, 0.5, 0.5, 0.7), "loss.loss") == 2  # round 0 is no training
    assert best_round(entries(0.1, math.nan, math.inf, None, 0.7), "loss.loss") == 4
    assert best_round(entries(0.1, math.nan), "loss.loss") == best_round(entries(0.1), "loss.loss") == 0
    scored = [
        {"round": at, "eval": {"a": {"accuracy": score}}} for at, score in enumerate((0.0, 0.5, 0.8, 0.6))
    ]
    assert best_round(scored, "a.accuracy") == 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("models") / "tiny", blocks=2)


LORA = {"name": "fedavg", "local_steps": 4, "batch_size": 4, "lora": {"rank": 2}}


def document(tiny: Path, method: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(tiny)},
        "data": {"clients": 2, "template": "plain", "max_length": 32},
        "method": method,
        "evaluation": {"tasks": ["loss"], "max_examples": 2, "bootstrap": 0, **more.pop("evaluation", {})},
        **more,
    }


def ran(made: dict[str, Any], out: Path) -> fedtune.Run:
    return fedtune.run(made, data=ROWS, out=out, progress=False)


def weights(folder: Path) -> str:
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> fedtune.Run:
    """Six rounds at a rate that overshoots, so that the last is not the best."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    method = {**LORA, "rounds": 6, "lr": 0.5}
    run = ran(document(tiny, method, checkpoints={"best": "loss.loss", "keep": None}), out)
    losses = [entry["eval"]["loss"]["loss"] for entry in run.rounds]
    best = min(range(1, 7), key=lambda round: losses[round])
    assert best < 6, losses
    assert run.summary["best"] == {"round": best, "metric": "loss.loss"}
    assert run.summary["evaluation"]["loss"]["loss"] == losses[best] and run.summary["rounds"] == 6
    return run


def test_the_result_is_the_best_round_to_the_bit(whole: fedtune.Run, tiny: Path, tmp_path: Path) -> None:
    best = whole.summary["best"]["round"]
    replayed = tmp_path / "replayed"
    whole.replay(best, replayed)
    assert weights(whole.path / "final") == weights(replayed)
    shorter = ran(document(tiny, {**LORA, "rounds": best, "lr": 0.5}), tmp_path / "shorter")
    assert weights(shorter.path / "final") == weights(replayed) and "best" not in shorter.summary
    assert checkpoint.rounds(whole.path / "checkpoints/best") == [best]


def test_a_kill_after_any_round_ends_with_the_same_result(
    whole: fedtune.Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {**LORA, "rounds": 6, "lr": 0.5}
    made = document(tiny, method, checkpoints={"best": "loss.loss", "keep": None})
    real = checkpoint.save
    for at in (1, 2, whole.summary["best"]["round"] * 2, 9):
        calls = 0

        def save(*given: Any, last: int = at, **named: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise KeyboardInterrupt
            real(*given, **named)

        out = tmp_path / f"killed-{at}"
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", save)
            try:
                ran(made, out)
            except KeyboardInterrupt:
                fedtune.open(out, data=ROWS).resume(progress=False)
        again = fedtune.open(out, data=ROWS)
        assert again.summary["best"] == whole.summary["best"]
        assert weights(out / "final") == weights(whole.path / "final")


def test_a_run_ends_when_its_score_no_longer_gets_better(
    whole: fedtune.Run, tiny: Path, tmp_path: Path
) -> None:
    for patience in (1, 2):
        stop = {"metric": "loss.loss", "patience": patience}
        made = document(
            tiny,
            {**LORA, "rounds": 50, "lr": 0.5},
            evaluation={"stop": stop},
            checkpoints={"best": "loss.loss"},
        )
        run = ran(made, tmp_path / f"stopped-{patience}")
        losses = [entry["eval"]["loss"]["loss"] for entry in run.rounds]
        seen = next(
            end for end in range(1, 51) if end - min(range(1, end + 1), key=lambda at: losses[at]) >= patience
        )
        assert run.summary["rounds"] == seen == len(losses) - 1 < 50
        assert run.summary["stopped_early"] == {**stop, "best_round": seen - patience}
        assert run.summary["status"] == "done"
        same = run.resume(progress=False)  # nothing is left to do
        assert same.summary == run.summary


def test_scores_of_every_second_round_are_counted_as_evaluations(tiny: Path, tmp_path: Path) -> None:
    made = document(
        tiny,
        {**LORA, "rounds": 40, "lr": 0.5},
        evaluation={"stop": {"metric": "loss.perplexity", "patience": 1}, "every": 2},
    )
    run = ran(made, tmp_path / "run")
    scored = [entry["round"] for entry in run.rounds if entry["eval"]]
    assert scored == list(range(0, run.summary["rounds"] + 1, 2)) and run.summary["rounds"] < 40
    assert run.summary["stopped_early"]["best_round"] == run.summary["rounds"] - 2
    assert not (run.path / "checkpoints/best").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"checkpoints": {"best": "accuracy.accuracy"}},
            r"best is accuracy\.accuracy; it takes",
        ),
        ({"checkpoints": {"best": "loss"}}, r"takes task\.metric of one of evaluation\.tasks, loss"),
        ({"checkpoints": {"best": "loss.loss"}, "evaluation": {"every": 0}}, r"set evaluation\.every to 1"),
        ({"evaluation": {"stop": {"metric": "a.b"}}}, r"evaluation\.stop\.metric is a\.b"),
        ({"evaluation": {"stop": {"patience": 0}}}, "greater than or equal to 1"),
        (
            {"checkpoints": {"best": "loss.f1"}},
            r"best: there is no metric loss\.f1; there are loss\.loss",
        ),
        ({"evaluation": {"stop": {"metric": "loss.f1"}}}, r"evaluation\.stop: there is no metric loss\.f1"),
    ],
)
def test_what_cannot_choose_is_refused_before_anything_is_written(
    changes: dict[str, Any], says: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        ran(document(tiny, {**LORA, "rounds": 2}, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rollback_behind_the_best_round_is_refused(whole: fedtune.Run, tiny: Path, tmp_path: Path) -> None:
    made = document(tiny, {**LORA, "rounds": 3, "lr": 1e-3}, checkpoints={"best": "loss.loss", "keep": None})
    run = ran(made, tmp_path / "run")
    assert run.summary["best"]["round"] == 3
    with pytest.raises(InputError, match=r"has its best round in 3 .*go back to round 3 or a later one"):
        run.rollback(1, progress=False)
    before = json.loads((run.path / "summary.json").read_text())
    assert before == run.summary


def test_more_rounds_may_find_a_better_one(tiny: Path, tmp_path: Path) -> None:
    checkpoints = {"best": "loss.loss"}
    method = {**LORA, "lr": 1e-3}
    whole = ran(document(tiny, {**method, "rounds": 3}, checkpoints=checkpoints), tmp_path / "whole")
    run = ran(document(tiny, {**method, "rounds": 2}, checkpoints=checkpoints), tmp_path / "run")
    assert run.summary["best"]["round"] == 2
    more = run.resume(rounds=3, progress=False)
    assert more.summary["best"] == whole.summary["best"]
    assert weights(more.path / "final") == weights(whole.path / "final")


def test_what_was_left_alone_can_be_scored_later(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = document(tiny, {**LORA, "rounds": 1}, evaluation={"max_examples": None})
    plain = {**made, "data": {**made["data"], "holdout": {"fraction": 0.25}}}
    made["data"] = {**made["data"], "holdout": {"fraction": 0.25, "validation": 0.5}}
    run = ran(made, tmp_path / "run")
    recorded = json.loads((run.path / "examples.json").read_text())
    assert len(recorded["held_out"]) == 6 == len(recorded["trained"])
    again = fedtune.evaluate(run, ["loss"])
    assert again["scores"]["global"]["loss"]["loss"] == run.summary["evaluation"]["loss"]["loss"]
    left = fedtune.evaluate(run, ["loss"], "data.holdout.validation=null")
    assert left["scores"]["global"]["loss"]["examples"] == 4 and not caplog.records
    held = json.loads((ran(plain, tmp_path / "plain").path / "examples.json").read_text())["held_out"]
    assert len(held) == 4 and not set(held) & {*recorded["held_out"], *recorded["trained"]}
    with pytest.raises(InputError, match=r"data\.max_examples is not the run's"):
        fedtune.evaluate(run, ["loss"], "data.holdout.validation=null", "data.max_examples=3")
