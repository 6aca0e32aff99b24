"""What a round gave is not taken as the next state: whom it is done without, and when the run stops."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import Command, fedtune, lines, outcome, write_config
from torch import Tensor

from fedtune.config.schema import Federation
from fedtune.core.cohort import RoundOutcome
from fedtune.core.watch import sketch
from fedtune.federation.guard import Guard, RoundRefused, last_loss
from fedtune.federation.scored import Evaluated

HERE = Path(__file__).parent


@dataclass(frozen=True)
class State:
    w: Tensor


def guard(arrival: str = "any-order", uses_wire: bool = True, **settings: Any) -> Guard:
    method = SimpleNamespace(arrival=arrival, uses_wire=uses_wire, config=SimpleNamespace())
    return Guard(Federation(**settings), method)  # type: ignore[arg-type]


class Round:
    """A mean of clients' numbers, its loss the mean's size; remembers whom each try was done without."""

    def __init__(self, updates: Mapping[int, float], seen: bool = True) -> None:
        self.updates, self.seen, self.tries = updates, seen, list[dict[int, str]]()

    def once(self, without: Mapping[int, str]) -> tuple[State, RoundOutcome]:
        self.tries.append(dict(without))
        clients = [client for client in self.updates if client not in without]
        outcome = RoundOutcome(1, tuple(self.updates), clients, left_out=dict(without))
        outcome.examples = dict.fromkeys(clients, 1)
        if self.seen:
            outcome.seen = {c: {"weights": sketch([torch.tensor([self.updates[c]])])} for c in clients}
        return State(torch.tensor([sum(self.updates[c] for c in clients) / len(clients)])), outcome

    def scored(self, state: State) -> Evaluated:
        return Evaluated({"loss": {"loss": abs(float(state.w))}})


def test_a_round_whose_loss_jumps_is_done_without_who_stands_out(caplog: pytest.LogCaptureFixture) -> None:
    round = Round({0: 1.0, 1: 1.0, 2: 50.0})
    settled = guard().settle(round.once, round.scored, loss=2.0)
    assert [list(without) for without in round.tries] == [[], [2]]
    assert float(settled.state.w) == 1.0 and settled.outcome.clients == [0, 1]
    assert "50 times the median" in settled.outcome.left_out[2]
    assert "its held-out loss is 17.33, and was 2" in settled.outcome.left_out[2]
    assert list(settled.entry["updates"]) == ["0", "1", "2"]  # who was left out is still told of
    assert settled.entry["refused"][0]["without"].keys() == {"2"} and "stands_out" not in settled.entry
    assert "client 2 is left out: the norm of its update, 50" in caplog.text


def test_one_that_does_no_harm_is_named_and_stays(caplog: pytest.LogCaptureFixture) -> None:
    round = Round({0: 1.0, 1: 1.0, 2: 50.0})
    settled = guard(max_loss_jump=20).settle(round.once, round.scored, loss=2.0)
    assert len(round.tries) == 1 and settled.outcome.clients == [0, 1, 2]
    assert list(settled.entry["stands_out"]) == ["2"] and "refused" not in settled.entry
    assert "round 1: client 2 stands out: the norm of its update" in caplog.text


def test_honest_clients_are_told_of_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    round = Round({0: 1.0, 1: 1.5, 2: 0.5})
    settled = guard().settle(round.once, round.scored, loss=2.0)
    assert settled.entry == {
        "updates": {str(c): {"norm": norm, "cosine": 1.0} for c, norm in enumerate((1.0, 1.5, 0.5))}
    }
    assert not caplog.records


@pytest.mark.parametrize("loss", [None, 2.0])
def test_a_far_too_long_update_is_left_out_of_a_round_that_nobody_evaluates(loss: float | None) -> None:
    round = Round({0: 1.0, 1: 1.0, 2: 101.0})
    settled = guard().settle(round.once, lambda state: Evaluated(), loss=loss)
    assert settled.outcome.clients == [0, 1] and "of the length of an update" in settled.outcome.left_out[2]
    kept = guard(max_norm_ratio=None).settle(round.once, lambda state: Evaluated(), loss=loss)
    assert kept.outcome.clients == [0, 1, 2] and list(kept.entry["stands_out"]) == ["2"]


def test_several_tries_end(caplog: pytest.LogCaptureFixture) -> None:
    round = Round({client: 10.0 ** (3 * client) for client in range(8)})
    with pytest.raises(RoundRefused, match="No client's update stands out"):
        guard().settle(round.once, lambda state: Evaluated({"loss": {"loss": float("nan")}}), loss=2.0)
    assert len(round.tries) <= 8
    assert all(len(a) < len(b) for a, b in zip(round.tries, round.tries[1:], strict=False))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_never_taken(value: float) -> None:
    state = State(torch.tensor([1.0, value]))

    def once(without: Mapping[int, str]) -> tuple[State, RoundOutcome]:
        return state, RoundOutcome(4, (0, 1), [0, 1], examples={0: 1, 1: 1})

    def scored(state: State) -> Evaluated:
        raise AssertionError("what is not finite is not evaluated")

    off: dict[str, Any] = {"max_loss_jump": None, "max_norm_ratio": None}
    with pytest.raises(RoundRefused, match=r"round 4: .* its w holds NaN or infinite values") as caught:
        guard(**off).settle(once, scored, loss=None)
    assert caught.value.exit_status == 3


def test_where_nobody_can_be_left_out_the_run_stops_and_says_why() -> None:
    updates = {0: 1.0, 1: 1.0, 2: 50.0}
    with pytest.raises(RoundRefused, match=r"Who stands out: client 2: .* Clients come in turn"):
        guard("in-turn").settle(Round(updates).once, Round(updates).scored, loss=2.0)
    blind, privacy = Round(updates, seen=False), {"clip": 1.0, "noise_multiplier": 1.0}
    with pytest.raises(RoundRefused, match="The server sees no single update"):
        guard(privacy=privacy, max_loss_jump=3).settle(blind.once, blind.scored, loss=2.0)
    assert len(blind.tries) == 1  # a second sum of the same updates would tell more than the first


def test_noise_may_do_what_it_does_unless_a_bound_is_set() -> None:
    """A short run with little data and much noise: the loss rises by nats, and nobody is to blame."""
    noisy: dict[str, Any] = {"privacy": {"clip": 1.0, "noise_multiplier": 1.0}}
    round = Round({0: 9.0, 1: 9.0}, seen=False)
    assert guard(**noisy).settle(round.once, round.scored, loss=2.0).outcome.clients == [0, 1]
    with pytest.raises(RoundRefused, match=r"its held-out loss is 9, and was 2\."):
        guard(**noisy, max_loss_jump=3).settle(round.once, round.scored, loss=2.0)

    def lost(state: State) -> Evaluated:
        return Evaluated({"loss": {"loss": math.nan}})

    with pytest.raises(RoundRefused, match="its held-out loss is nan"):
        guard(**noisy).settle(round.once, lost, loss=2.0)


def test_rows_that_train_on_this_machine_alone_may_get_as_bad_as_they_do() -> None:
    round = Round({0: 90.0}, seen=False)
    assert guard(uses_wire=False).settle(round.once, round.scored, loss=2.0).outcome.clients == [0]


def test_the_loss_before_is_the_last_that_was_measured() -> None:
    loss = {"eval": {"loss": {"loss": 2.5}}}
    assert last_loss([loss, {"eval": {}}]) == 2.5
    assert last_loss([{"eval": {"accuracy": {"accuracy": 1.0}}}]) is None and last_loss([]) is None


def document(**federation: Any) -> dict[str, Any]:
    return {
        "data": {"clients": 3, "max_examples": 24, "max_length": 64},
        "method": {"name": "fedavg", "rounds": 3, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}},
        "evaluation": {"tasks": ["loss"], "max_examples": 8},
        "federation": federation,
    }


def poisoned(folder: Path, poison: dict[str, Any], config: dict[str, Any], *more: str, **limits: Any) -> Any:
    (folder / "poison.json").write_text(json.dumps(poison))
    write_config(folder / "c.yaml", config)
    plugin = ("--plugin", str(HERE / "poisoners.py"), "--quiet")
    start = more or ("--out", "run")
    return Command("run", "c.yaml", *start, *plugin, cwd=folder, **limits).wait()


TIMES_1000 = {"clients": [2], "rounds": [2], "factor": 1000.0}


@pytest.mark.parametrize("method", [{}, {"control_variates": True, "optimizer": "sgd", "lr": 0.05}])
def test_one_of_three_that_sends_a_thousand_times_its_update_is_named_and_left_out(
    method: dict[str, Any], tmp_path: Path
) -> None:
    config = document() | {"checkpoints": {"journal": "always"}}
    config["method"] |= method
    done = poisoned(tmp_path, TIMES_1000, config)
    assert done.status == 0, done.err
    assert "round 2: client 2 is left out: the norm of its update" in done.err
    rounds = lines(tmp_path / "run/rounds.jsonl")
    assert [entry["clients"] for entry in rounds[1:]] == [[0, 1, 2], [0, 1], [0, 1, 2]]
    assert max(entry["eval"]["loss"]["loss"] for entry in rounds) < 4  # of the poisoned state it is above 10
    # each order and reply is entered once, the refused one's too: it was sent
    sent = [(e["round"], e["client"], e["direction"]) for e in lines(tmp_path / "run/wire.jsonl")]
    assert sorted(sent) == sorted(
        (round, client, way) for round in (1, 2, 3) for client in range(3) for way in ("down", "up")
    )
    for moment, start in ((9, "--out"), (7, "--resume")):  # in the first try's replies, and in what follows
        killed = poisoned(tmp_path, TIMES_1000, config, start, "killed", die_at=moment, watched="round-0002")
        assert killed.status == -9, killed.err
    again = poisoned(tmp_path, TIMES_1000, config, "--resume", "killed")
    assert again.status == 0, again.err
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "run")
    config["checkpoints"] = {"journal": "never"}  # the round is done again by training again
    unwritten = poisoned(tmp_path, TIMES_1000, config, "--out", "unwritten")
    assert unwritten.status == 0, unwritten.err
    assert outcome(tmp_path / "unwritten") == outcome(tmp_path / "run")


def test_numbers_just_below_the_wires_bound_do_not_end_the_run(tmp_path: Path) -> None:
    config = document()
    config["evaluation"]["every"] = 0
    done = poisoned(tmp_path, {"clients": [1], "rounds": [1]}, config)
    assert done.status == 0, done.err
    assert [entry["clients"] for entry in lines(tmp_path / "run/rounds.jsonl")[1:]][:2] == [[0, 2], [0, 1, 2]]


def test_a_round_that_all_poison_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    done = poisoned(tmp_path, {"clients": [0, 1, 2], "rounds": [2], "factor": 3000.0}, document())
    assert done.status == 3 and "Traceback" not in done.err
    assert "round 2: its result is not taken" in done.err and "No client's update stands out" in done.err
    run = tmp_path / "run"
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["round-0001"]
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"
    honest = poisoned(tmp_path, {"clients": [], "rounds": []}, document(), "--resume", "run")
    assert honest.status == 0, honest.err
    write_config(tmp_path / "c.yaml", document())
    assert fedtune("run", "c.yaml", "--out", "other", "--quiet", cwd=tmp_path).status == 0
    assert outcome(run)["final"] == outcome(tmp_path / "other")["final"]


def test_too_few_are_left_without_who_stands_out(tmp_path: Path) -> None:
    done = poisoned(tmp_path, TIMES_1000, document(quorum=3))
    assert done.status == 3 and "the quorum is 3. Left out: client 2: the norm of its update" in done.err


def test_flowers_simulation_leaves_out_the_same(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    config = document()
    config["method"]["rounds"] = 2
    here = poisoned(tmp_path, TIMES_1000, config)
    assert here.status == 0, here.err
    config["transport"] = {"name": "flower-simulation"}
    there = poisoned(tmp_path, TIMES_1000, config, "--out", "there")
    assert there.status == 0, there.err
    rounds = outcome(tmp_path / "run")["rounds"]
    assert outcome(tmp_path / "there")["rounds"] == rounds and rounds[2]["left_out"].keys() == {"2"}
