"""What clients keep as their own: parts (FedPer, FedSA-LoRA), a second model (Ditto), the final one tuned."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract import FORMS, SIZES, bits, whole
from pydantic import ValidationError
from torch import Tensor, nn
from toy import Bench, Toy, items

import fedtune
from fedtune.config.file import parse_config
from fedtune.core.personal import for_all, result_models
from fedtune.core.types import Payload
from fedtune.errors import InputError
from fedtune.methods.fedavg import own_parts
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.models.tuning import trainable
from fedtune.planning.plan import plan
from fedtune.theory.quantities import schemes

SGD = {"trainable": "full", "optimizer": "sgd", "lr": 0.5, "lr_schedule": "constant", "batch_size": 8}
TWO = {0: items(3), 1: items(5)}


class Two(nn.Module):
    """loss = mean over examples of (body + head - y)^2 / 2, y the example's first token."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.body + self.head - input_ids[:, 0]).square().mean() / 2)


def bench(model: nn.Module | None = None, data: dict[int, Any] = TWO, **settings: Any) -> Bench:
    return Bench(FedAvg(Config(**{**SGD, **settings}), seed=0), model or Toy(), data)


def own(b: Bench) -> dict[int, dict[str, float]]:
    kept = {client: own_parts.kept(state) for client, state in b.runner.states.items()}
    return {client: {name: float(t) for name, t in each.items()} for client, each in kept.items() if each}


def models(b: Bench) -> dict[str, dict[str, float]]:
    return {
        name: {n: float(p.detach()) for n, p in trainable(model).items()}
        for name, model in result_models(b.method, b.state, b.runner.states, b.model)
    }


def test_a_part_of_ones_own_by_hand() -> None:
    b = bench(Two(), own=["head"])
    assert list(b.state.weights) == ["body"]
    assert models(b) == {"global": {"body": 1.0, "head": 0.0}}  # before anybody has one of its own
    b.round(1)
    # residuals 1 - 3 and 1 - 5: both parts move by half of that; bodies 2 and 3, heads 1 and 2
    assert b.state.weights["body"].tolist() == [2.5] and own(b) == {0: {"head": 1.0}, 1: {"head": 2.0}}
    assert {n: float(p.detach()) for n, p in trainable(b.model).items()}["head"] == 0.0  # as it was
    b.round(2)
    # 2.5 + 1 - 3 = 0.5 and 2.5 + 2 - 5 = -0.5: bodies 2.25 and 2.75
    assert own(b) == {0: {"head": 0.75}, 1: {"head": 2.25}}
    assert models(b) == {
        "client-0000": {"body": 2.5, "head": 0.75},
        "client-0001": {"body": 2.5, "head": 2.25},
    }
    assert b.model.get_parameter("head").tolist() == [0.0]
    # one float32 each way and round, of two that are trained
    assert [e["payload_bytes"] for e in b.wire] == [4] * 8


def test_a_client_that_was_not_asked_has_nothing_and_one_that_comes_late_begins_as_all_did() -> None:
    b = bench(Two(), {c: items(3) for c in range(4)}, own=["head"])
    first = set(b.round(1, per_round=2).clients)
    assert set(own(b)) == first == {int(name[-4:]) for name in models(b)} and len(first) == 2
    second = set(b.round(2, per_round=2).clients)
    late, kept = second - first, first - second
    assert late and kept
    # bodies were 2 after the first round, and heads 1 of those asked: nothing left to learn for these;
    # who comes late has 2 + 0 - 3 = -1, and goes half of it
    assert {client: own(b)[client]["head"] for client in late} == dict.fromkeys(late, 0.5)
    assert {client: own(b)[client]["head"] for client in kept} == dict.fromkeys(kept, 1.0)


@pytest.mark.parametrize(("tie", "second"), [(1.0, {0: 2.75, 1: 3.75}), (0.0, {0: 2.5, 1: 4.0})])
def test_ditto_by_hand(tie: float, second: dict[int, float]) -> None:
    b, plain = bench(ditto=tie), bench()
    b.round(1), plain.round(1)
    # v = w(0) = 1, and nothing pulls yet: 1 + 0.5·2 and 1 + 0.5·4
    assert own(b) == {0: {"w": 2.0}, 1: {"w": 3.0}} and b.state.weights["w"].tolist() == [2.5]
    b.round(2), plain.round(2)
    # λ = 1: (2 - 3) + (2 - 2.5) = -1.5 and (3 - 5) + (3 - 2.5) = -1.5; λ = 0: training alone, -1 and -2
    assert own(b) == {client: {"w": value} for client, value in second.items()}
    assert models(b) == {
        "global": {"w": 3.25},
        "client-0000": {"w": second[0]},
        "client-0001": {"w": second[1]},
    }
    assert torch.equal(b.state.weights["w"], plain.state.weights["w"])  # the global model is FedAvg's
    assert [e["payload_bytes"] for e in b.wire] == [e["payload_bytes"] for e in plain.wire]


def test_a_great_tie_holds_the_own_model_at_the_global_one() -> None:
    b = bench(ditto=2.0**20, lr=2.0**-20, local_steps=40)
    b.round(1), b.round(2)
    before = b.state.weights["w"].item()
    b.round(3)
    assert all(abs(each["w"] - before) < 1e-4 for each in own(b).values())


@pytest.mark.parametrize(
    ("tune", "tuned"), [({"local_steps": 1}, (2.75, 3.75)), ({"local_epochs": 2}, (2.875, 4.375))]
)
def test_fine_tuning_by_hand(tune: dict[str, int], tuned: tuple[float, float]) -> None:
    b = bench(rounds=1, fine_tune=tune)
    assert b.method.rounds == 2 and [for_all(b.method, r) for r in (1, 2)] == [False, True]
    b.round(1)
    assert own(b) == {} and b.state.weights["w"].tolist() == [2.5]
    state = b.state
    outcome = b.round(2)
    assert b.state is state  # nothing came back
    assert own(b) == {0: {"w": tuned[0]}, 1: {"w": tuned[1]}}
    assert list(models(b)) == ["global", "client-0000", "client-0001"]
    assert outcome.mean("train_loss") is not None
    sent = [(e["round"], e["direction"], e["payload_bytes"]) for e in b.wire]
    assert sent.count((2, "down", 4)) == 2 and sent.count((2, "up", 0)) == 2
    faster = bench(rounds=1, fine_tune={"local_steps": 1, "lr": 1.0})
    faster.round(1), faster.round(2)
    assert own(faster) == {0: {"w": 3.0}, 1: {"w": 5.0}}


def test_a_narrow_part_moves_by_less_than_its_dtype_tells_apart() -> None:
    parameters = {"a": nn.Parameter(torch.ones(1, dtype=torch.bfloat16))}
    before = {"a": torch.ones(1)}
    for step in range(1, 4):
        start = before["a"].to(torch.bfloat16).float()
        before = own_parts.moved(before, {"a": start + 2**-10}, parameters)
        assert before["a"].tolist() == [1 + step * 2**-10]
    assert torch.tensor([1 + 2**-10]).to(torch.bfloat16).tolist() == [1.0]


NAMES = ["layers.0.q.lora_A.weight", "layers.0.q.lora_B.weight", "layers.11.q.lora_B.weight", "head.bias"]


@pytest.mark.parametrize(
    ("patterns", "places"),
    [(["lora_B"], [1, 2]), (["layers.1"], None), (["layers.*"], [0, 1, 2]), (["head", "layers.11"], [2, 3])],
)
def test_a_pattern_is_whole_parts_of_a_name(patterns: list[str], places: list[int] | None) -> None:
    if places is None:
        with pytest.raises(
            InputError, match=r"'layers.1' is part of no trained tensor's name; there are layers"
        ):
            own_parts.chosen(NAMES, patterns)
    else:
        assert own_parts.chosen(NAMES, patterns) == {NAMES[place] for place in places}


def test_nothing_left_to_share_is_refused() -> None:
    with pytest.raises(InputError, match=r"leaves nothing that is shared; take method\.name: standalone"):
        own_parts.chosen(NAMES, ["*"])
    with pytest.raises(InputError, match="leaves nothing that is shared"):
        bench(Toy(), own=["w"])


def test_what_a_client_keeps_is_taken_apart_again() -> None:
    rest = Payload({"exp_avg:w": torch.zeros(2)}, {"round": 3})
    parts = {"w": torch.ones(2)}
    both = own_parts.joined(parts, rest)
    assert bits(Payload(own_parts.kept(both))) == bits(Payload(parts))
    assert bits(own_parts.beside(both) or Payload()) == bits(rest)
    assert own_parts.beside(own_parts.joined(parts, None)) is None and own_parts.kept(None) == {}


@pytest.mark.parametrize("label", [one for one in FORMS["fedavg"] if one.startswith(("own", "fine"))])
def test_only_what_is_shared_crosses_the_wire(label: str) -> None:
    federation = whole("fedavg", label)
    config, shared = federation.method.config, trainable(federation.model)
    for name in own_parts.chosen(shared, config.own):
        del shared[name]
    assert set(shared) == set(federation.state.weights)
    size = sum(parameter.nbytes for parameter in shared.values())
    control = sum(4 * p.numel() for p in shared.values()) if config.control_variates else 0
    rounds, clients = config.rounds, len(SIZES)
    down = [e["payload_bytes"] for e in federation.wire if e["direction"] == "down"]
    assert down == [size + control] * (federation.method.rounds * clients)
    up = [e["payload_bytes"] for e in federation.wire if e["direction"] == "up"]
    if federation.compression is None:
        assert up[: rounds * clients] == [size + control] * (rounds * clients)
    assert up[rounds * clients :] == [0] * (clients if config.fine_tune else 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ditto": 0.1, "own": ["w"]}, "a whole model of its own already; leave own or ditto out"),
        ({"ditto": 0.1, "fine_tune": {"local_steps": 1}}, "leave fine_tune or ditto out"),
        ({"trainable": "lora", "aggregation": "svd", "own": ["lora_B"]}, "take mean or freeze-a"),
        ({"trainable": "lora", "aggregation": "alternate", "own": ["lora_B"]}, "trains A and B in turn"),
        ({"trainable": "lora", "aggregation": "stack", "ditto": 0.1}, "would not stand"),
        (
            {"trainable": "lora", "aggregation": "residual", "fine_tune": {"local_steps": 1}},
            "would not stand",
        ),
        ({"fine_tune": {}}, "local_epochs or local_steps; neither is set"),
        ({"fine_tune": {"local_epochs": 1, "local_steps": 1}}, "both are set"),
        ({"ditto": -0.1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Config.model_validate({**SGD, **settings})


CONFIG: dict[str, Any] = {
    "data": {
        "clients": 3,
        "max_examples": 36,
        "max_length": 64,
        "holdout": {"client_fraction": 0.25},
        "partition": {"name": "by-field"},
    },
    "method": {"name": "fedavg", "rounds": 2, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}},
    "evaluation": {"tasks": ["loss"], "every": 0, "bootstrap": 0},
}
TUNE = {"local_steps": 2}


def as_texts(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"federation.secure_aggregation": {}, "method.fine_tune": TUNE}, "nothing summed; take ditto"),
        ({"federation.robust": {"mean": "median"}, "method.fine_tune": TUNE}, "there is no other mean"),
        ({"federation.robust": {"max_norm": 1.0}, "method.fine_tune": TUNE}, "there is no other mean"),
        ({"checkpoints.best": "loss.loss", "evaluation.every": 1, "method.fine_tune": TUNE}, "of the last"),
        (
            {"federation.wire": {"dtype": "int8"}, "method.aggregation": "sparsity", "method.prune": {}},
            "numbers that are exactly 0",
        ),
        ({"model.adapter": "there", "method.own": ["lora_B"]}, "begins as clients draw it"),
        ({"method.own": ["lora_C"]}, "'lora_C' is part of no trained tensor's name"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        fedtune.run(CONFIG, *as_texts(settings), out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("personal", [{"method.own": ["lora_B"]}, {"method.ditto": 0.5}])
@pytest.mark.parametrize(
    "more",
    [
        {"federation.secure_aggregation": {}},
        {"federation.privacy": {"clip": 1.0, "noise_multiplier": 0.1}},
        {"federation.robust": {"mean": "median"}},
        {"federation.clients_per_round": 1, "method.proximal": 0.1, "checkpoints.best": "loss.loss"},
        {"model.dtype": "bfloat16", "method.server_optimizer": {"name": "momentum"}},
    ],
)
def test_what_it_goes_with(personal: dict[str, Any], more: dict[str, Any], tmp_path: Path) -> None:
    settings = as_texts({**personal, **more, "evaluation.every": 1})
    run = fedtune.run(CONFIG, *settings, out=tmp_path / "run", progress=False)
    assert run.status == "done"
    best = run.summary.get("best", {"round": 2})["round"]
    seen = {f"client-{c:04d}" for entry in run.rounds[: best + 1] for c in entry["clients"]}
    assert {path.name for path in (tmp_path / "run/final").glob("client-*")} == seen
    if "federation.secure_aggregation" in more:  # the sums, and so all that follows, are those of plain ones
        fedtune.run(
            CONFIG, *as_texts({**personal, "evaluation.every": 1}), progress=False, out=tmp_path / "plain"
        )
        for path in (tmp_path / "plain/final").rglob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / "run" / path.relative_to(tmp_path / "plain")).read_bytes()


def test_the_one_shot_theory_has_no_models_of_clients_own() -> None:
    for name, value in {"own": ["lora_B"], "ditto": 0.1, "fine_tune": TUNE}.items():
        with pytest.raises(InputError, match=f"method.{name} gives clients others"):
            schemes(Config.model_validate({"rounds": 3, name: value}))


def test_a_plan_counts_both_models_operations() -> None:
    one, two = (
        plan(parse_config({**CONFIG, "method": {**CONFIG["method"], **more}}, "test"))
        for more in ({}, {"ditto": 0.1})
    )
    assert two.document["flops_per_client_round"] == 2 * one.document["flops_per_client_round"] > 0
    assert two.document["payload_bytes"] == one.document["payload_bytes"]


RUNS: dict[str, dict[str, Any]] = {
    "own": {"own": ["lora_B"]},
    "ditto": {"ditto": 0.5},
    "fine-tune": {"fine_tune": TUNE, "rounds": 1},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_scores_saves_and_exports_each_clients_model(name: str, tmp_path: Path) -> None:
    settings = {f"method.{key}": value for key, value in RUNS[name].items()}
    run = fedtune.run(CONFIG, *as_texts(settings), out=tmp_path / "run", progress=False)
    names = [f"client-{client:04d}" for client in range(3)]
    own_only = name == "own"
    last = json.loads((tmp_path / "run/rounds.jsonl").read_text().splitlines()[-1])
    assert list(last["eval_clients"]) == ([] if own_only else ["global"]) + names
    spread = run.summary["per_client"]["loss"]["loss"]
    each = spread["clients"]
    assert list(each) == ["0", "1", "2"] and len(set(each.values())) == 3
    assert spread["mean"] == pytest.approx(sum(each.values()) / 3) and spread["worst"] == max(each.values())
    scores = [last["eval_clients"][one]["loss"]["loss"] for one in names]
    if own_only:  # there is no other model whose score it could be
        assert run.summary["evaluation"]["loss"]["loss"] == pytest.approx(sum(scores) / 3)
    else:
        assert run.summary["evaluation"] == last["eval_clients"]["global"]
    again = fedtune.evaluate(run, ["loss"])["scores"]
    assert {one: again[one]["loss"]["loss"] for one in again} == {
        one: last["eval_clients"][one]["loss"]["loss"] for one in again
    }
    assert sorted(again) == sorted(last["eval_clients"])
    (written,) = run.export(tmp_path / "own", name="client-0001")
    assert (
        written == tmp_path / "own"
        and (written / "adapter_model.safetensors").read_bytes()
        == (tmp_path / "run/final/client-0001/adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(InputError, match="has no result named 'client-0009'"):
        run.export(tmp_path / "none", name="client-0009")
    alone = fedtune.open(run.path).model("client-0001")
    assert {n for n, _ in alone.named_parameters() if "lora_B" in n}
    replayed = run.replay(1, tmp_path / "replayed")
    assert len(replayed) == (1 if name == "fine-tune" else len(last["eval_clients"]))
