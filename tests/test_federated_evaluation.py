"""Clients score the global model on held-out examples of their own; the server gets counts and sums."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import fedtune, lines, outcome, write_config

from fedtune.config.file import parse_config
from fedtune.config.schema import RunConfig
from fedtune.core.cohort import Cohort
from fedtune.core.types import SECURE, ClientError, Payload, Reply
from fedtune.core.wire import decode, meta_of
from fedtune.data.holdout import own_part, scored_part
from fedtune.errors import FederationError, InputError
from fedtune.evaluation import federated as module
from fedtune.evaluation.federated import UNIT, FederatedEvaluation, State
from fedtune.federation import run as runs
from fedtune.federation.asked import Asked
from fedtune.federation.client import join
from fedtune.federation.consent import Consent
from fedtune.federation.data import prepare_data
from fedtune.federation.progress import Silent
from fedtune.methods import registry
from fedtune.methods.references import Nothing
from fedtune.planning.plan import plan
from fedtune.transport import network, remote
from fedtune.transport.acceptance import Acceptance
from fedtune.transport.in_process import InProcess
from fedtune.transport.messages import Message
from fedtune.transport.network import Invitation, RoundExchange, invite_clients
from fedtune.transport.remote import Remote
from fedtune.transport.worker import Worker

LORA = {"name": "fedavg", "rounds": 2, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}}
DATA = {"clients": 3, "max_examples": 24, "max_length": 64, "holdout": {"client_fraction": 0.25}}
KSEED = {"name": "fedkseed", "rounds": 1, "seeds": 8, "local_steps": 2, "batch_size": 4, "lr": 1e-4}


def document(**changes: Any) -> dict[str, Any]:
    return {
        "data": DATA,
        "method": LORA,
        "model": {"device": "cpu"},
        "evaluation": {"where": "clients", "tasks": ["loss"], **changes.pop("evaluation", {})},
        **changes,
    }


def ran(path: Path, **changes: Any) -> dict[str, Any]:
    """The summary of a run in this process; its folder is `path`."""
    return runs.run(parse_config(document(**changes), "test"), path, Silent())


# By hand


def evaluation(*tasks: str) -> FederatedEvaluation:
    config = parse_config(document(), "test").method
    method = registry.build(config, 0)
    return FederatedEvaluation(method, registry.state_class("fedavg"), tasks, classifier=False)


def reply(client: int, sums: list[float], weights: list[float], examples: int) -> Reply:
    in_units = [torch.tensor([round(x / UNIT) for x in numbers]) for numbers in (sums, weights)]
    content = {"sums": in_units[0], "weights": in_units[1], "examples": torch.tensor([examples])}
    return Reply(client, Payload(content), {}, Cohort((0, 1), {0: 7, 1: 9}, 2))


def test_a_score_is_the_mean_over_all_clients_examples() -> None:
    """Losses of 6 nats over 3 tokens and 5 over 1: 11 / 4. Right: 1 of 2 and 3 of 3 answers: 4 / 5."""
    of = evaluation("loss", "accuracy")
    replies = [reply(0, [6.0, 1.0], [3.0, 2.0], 2), reply(1, [5.0, 3.0], [1.0, 3.0], 3)]
    done = of.server_step(State({}, {}), iter(replies))
    assert of.scores(done.sums) == {
        "loss": {"loss": 2.75, "examples": 5, "perplexity": math.exp(2.75), "tokens": 4},
        "accuracy": {"accuracy": 0.8, "examples": 5},
    }
    spread = of.spread(done)
    assert spread["loss"]["loss"]["clients"] == {"0": 2.0, "1": 5.0}
    assert (spread["loss"]["loss"]["mean"], spread["loss"]["loss"]["worst_client"]) == (3.5, 1)
    assert (spread["accuracy"]["accuracy"]["worst"], spread["accuracy"]["accuracy"]["worst_client"]) == (
        0.5,
        0,
    )
    other_way = of.server_step(State({}, {}), reversed(replies))
    assert of.scores(other_way.sums) == of.scores(done.sums)  # whole numbers: in any order


def test_a_task_without_weight_has_no_score() -> None:
    of = evaluation("loss", "accuracy")
    done = of.server_step(State({}, {}), [reply(0, [0.0, 1.0], [0.0, 1.0], 1)])
    assert list(of.scores(done.sums)) == ["accuracy"] and list(of.spread(done)) == ["accuracy"]


@pytest.mark.parametrize("n", [2, 5, 24])
def test_a_clients_part_is_split_alike_wherever_it_lies(n: int) -> None:
    def rng() -> np.random.Generator:
        return np.random.default_rng(3)

    train, held = own_part(n, 0.25, rng(), "client 1")
    assert sorted([*train, *held]) == list(range(n)) and len(held) == max(1, round(0.25 * n))
    assert list(train) == sorted(train) and list(held) == sorted(held)
    few = scored_part(held, 2, rng())
    assert set(few) <= set(held) and len(few) == min(2, len(held)) and list(few) == sorted(few)
    assert list(scored_part(held, None, rng())) == list(held)
    with pytest.raises(InputError, match=r"client_fraction is 0\.25, but north has 1 examples"):
        own_part(1, 0.25, rng(), "north")


def test_each_client_scores_as_many_as_are_asked_for() -> None:
    config = parse_config(document(evaluation={"max_examples": 1}), "test")
    split = prepare_data(config, pooled=False)
    assert {client: len(own) for client, own in split.own.items()} == {0: 1, 1: 1, 2: 1}
    for client, own in split.own.items():
        assert not set(map(id, own)) & set(map(id, split.clients[client]))


# Beside the same examples scored in one place

FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"lora": None, "trainable": "full", "lr": 1e-4},
    "stack": {"aggregation": "stack"},
    "residual": {"aggregation": "residual"},
    "asynchronous": {"arrival": "asynchronous", "rounds": 1},
    "fedkseed": KSEED,
    "infinite-pool": {"name": "infinite-pool", "rounds": 1, "local_steps": 2, "batch_size": 4, "lr": 1e-4},
}


@pytest.mark.parametrize("form", FORMS)
def test_clients_scores_are_those_of_one_machine_with_all_examples(form: str, tmp_path: Path) -> None:
    changes = FORMS[form]
    method = changes if "name" in changes else {k: v for k, v in (LORA | changes).items() if v is not None}
    tasks = ["loss", "accuracy"] if form == "lora" else ["loss"]
    found = ran(tmp_path / "clients", method=method, evaluation={"tasks": tasks})
    wanted = ran(tmp_path / "server", method=method, evaluation={"tasks": tasks, "where": "server"})
    for moment in ("zero_shot", "evaluation"):
        for task in tasks:
            assert found[moment][task][task] == pytest.approx(wanted[moment][task][task], abs=2e-6)
            assert found[moment][task]["examples"] == wanted[moment][task]["examples"] == 6
    if "accuracy" in tasks:
        assert found["evaluation"]["accuracy"]["accuracy"] == wanted["evaluation"]["accuracy"]["accuracy"]
    assert found["scored"] == {"clients": [0, 1, 2], "left_out": {}} and "scored" not in wanted
    here, there = outcome(tmp_path / "clients"), outcome(tmp_path / "server")
    assert here["final"] == there["final"]  # training is as it was
    training = [entry for entry in here["wire"] if entry["kind"] != "evaluation"]
    assert training == there["wire"]
    assert found["payload_bytes_per_client_round"] == wanted["payload_bytes_per_client_round"]
    asked = [entry for entry in here["wire"] if entry["kind"] == "evaluation"]
    assert found["evaluation_bytes"] == {
        way: sum(e["payload_bytes"] for e in asked if e["direction"] == way) for way in ("down", "up")
    }
    assert {e["payload_bytes"] for e in asked if e["direction"] == "up"} == {16 * len(tasks) + 8}
    memory = [entry for entry in lines(tmp_path / "clients/memory.jsonl") if entry["where"] == "evaluation"]
    assert {entry["client"] for entry in memory} == {0, 1, 2, None}
    assert found["peak_memory_bytes"]["evaluation"] == max(entry["peak_bytes"] for entry in memory)


# Secure aggregation


def test_under_masks_the_scores_are_the_same_and_no_clients_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("Crypto", reason="secure aggregation is not installed (the extra `privacy`)")
    plain = ran(tmp_path / "plain")
    replies: list[tuple[dict[str, Any], set[str]]] = []
    exchange = InProcess.exchange

    def watched(self: InProcess, round: int, frames: Any, *, in_plan_order: bool) -> Iterator[Any]:
        def sent() -> Iterator[Any]:
            for client, frame in frames:
                asked.append(dict(meta_of(frame)))
                yield client, frame

        asked: list[dict[str, Any]] = []
        for arrival in exchange(self, round, sent(), in_plan_order=in_plan_order):
            if asked[-1].get("scores"):
                replies.append((asked[-1], set(decode(arrival.frame).payload.tensors)))
            yield arrival

    monkeypatch.setattr(InProcess, "exchange", watched)
    secure = {"secure_aggregation": {"threshold": 0.6, "bits": 48}}
    masked = ran(tmp_path / "masked", federation=secure)
    assert masked["evaluation"] == plain["evaluation"] and masked["zero_shot"] == plain["zero_shot"]
    assert outcome(tmp_path / "masked")["final"] == outcome(tmp_path / "plain")["final"]
    assert plain["per_client"]["loss"]["loss"]["clients"].keys() == {"0", "1", "2"}
    assert masked["per_client"] == {} and masked["scored"] == plain["scored"]
    assert len(replies) == 3 * 5 * 3  # three evaluations of five exchanges with three clients
    assert {name for _, names in replies for name in names if not name.startswith(SECURE)} == set()
    with_content = [names for meta, names in replies if meta["phase"] == "masked"]
    assert with_content == [{SECURE + "masked"}] * 9
    own = [
        e
        for e in lines(tmp_path / "masked/memory.jsonl")
        if e["where"] != "server" and e["client"] is not None
    ]
    assert own == []  # a client reports nothing of its own
    kinds = {entry["kind"] for entry in lines(tmp_path / "masked/wire.jsonl")}
    assert kinds == {"train", "secure-aggregation", "evaluation"}


# Other ways to the clients


@pytest.mark.parametrize("way", ["transport.workers=2", "transport.name=flower-simulation"])
def test_in_processes_of_their_own_clients_give_the_same_bits(way: str, tmp_path: Path) -> None:
    if "flower" in way:
        pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    pytest.importorskip("Crypto", reason="secure aggregation is not installed (the extra `privacy`)")
    write_config(tmp_path / "c.yaml", document(method={**LORA, "rounds": 1}))
    secure = "federation.secure_aggregation={threshold: 0.6}"
    for name, more in {"here": (), "there": (way,), "masked": (way, secure)}.items():
        done = fedtune("run", "c.yaml", *more, "--out", name, "--quiet", cwd=tmp_path)
        assert done.status == 0, done.err
    here, there, masked = (outcome(tmp_path / name) for name in ("here", "there", "masked"))
    assert there["rounds"] == here["rounds"] and there["final"] == here["final"] == masked["final"]
    assert [r["eval"] for r in masked["rounds"]] == [r["eval"] for r in here["rounds"]]
    assert lines(tmp_path / "there/memory.jsonl") == lines(tmp_path / "here/memory.jsonl")


class Post:
    """A channel to clients of a network that are in this process; each is started anew after some messages.

    Args:
        start: Makes a client, by its number.
        every: Messages between two starts.
    """

    def __init__(self, start: Callable[[int], Worker], *, every: int) -> None:
        self.start, self.every = start, every
        self.workers = {client: start(client) for client in range(3)}
        self.messages: list[tuple[int, Message]] = []

    def online(self) -> set[int]:
        return set(self.workers)

    def push(self, client: int, message: Message, *, lifetime_s: float) -> str:
        self.messages.append((client, message))
        if len(self.messages) % self.every == 0:
            self.workers[client] = self.start(client)
        return str(len(self.messages) - 1)

    def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
        for name in ids:
            client, message = self.messages[int(name)]
            yield name, self.workers[client].answer(message)


class Elsewhere:
    """What `fedtune server` is for a run, without Flower in between."""

    def __init__(self, config: RunConfig, post: Post) -> None:
        self.config, self.post = config, post
        self.reply_limit: Callable[[int], int] = lambda client: 0

    def join(self, assembly: Any, known: Any) -> dict[int, int]:
        document = self.config.resolved()
        document["data"] |= {"max_length": assembly.room.tokens, "template": assembly.template_told}
        loaded = assembly.loaded
        self.invitation = Invitation(
            "ab12",
            json.dumps(document),
            loaded.weights_sha256,
            loaded.quantization,
            loaded.quantized_sha256,
        )
        names = dict.fromkeys(range(3), "")
        self.joined = invite_clients(self.post, self.invitation, names, wait_s=60, log_line=lambda line: None)
        return dict(self.joined)

    def partition(self) -> dict[str, Any]:
        each = [{"client": client, "examples": count} for client, count in sorted(self.joined.items())]
        return {"run": "ab12", "clients": each}

    def transport(self, assembly: Any, clock: Any) -> Remote:
        states, limit = assembly.runner.states, lambda client: self.reply_limit(client)
        exchange = RoundExchange(self.invitation, self.joined, states, limit=limit)
        return Remote(self.post, exchange, window=None, deadline_s=None, clock=clock)


@pytest.mark.parametrize("secure", [False, True])
def test_clients_with_files_of_their_own_give_the_same_bits(
    secure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each splits its file as one process would; every fifth message meets a client that was started anew."""
    if secure:
        pytest.importorskip("Crypto", reason="secure aggregation is not installed (the extra `privacy`)")
    federation: dict[str, Any] = {"secure_aggregation": {"threshold": 0.6}} if secure else {}
    here = ran(tmp_path / "here", federation=federation)
    whole = parse_config(
        document(data={**DATA, "holdout": {"source": "bundled"}}, evaluation={"where": "server"}), ""
    )
    for client, examples in prepare_data(whole, pooled=False).clients.items():
        rows = "".join(json.dumps(asdict(example)) + "\n" for example in examples)
        (tmp_path / f"{client}.jsonl").write_text(rows)
    monkeypatch.setattr(network, "LOOK_S", 0.001)
    monkeypatch.setattr(remote, "POLL_S", 0.001)

    def start(client: int) -> Worker:
        def joins(invitation: Any) -> Any:
            data = tmp_path / f"{client}.jsonl"
            return join(invitation, data=data, fields={}, model=None, device="cpu", consent=Consent())

        return Worker(joins, Acceptance(), tmp_path / f"state-{client}", lambda line: None)

    data = {"train": "clients", "clients": 3, "max_length": 64, "holdout": DATA["holdout"]}
    config = parse_config(document(data=data, federation=federation, transport={"name": "flower"}), "test")
    monkeypatch.setattr(runs, "check_transport", lambda config, deployment: None)
    there = runs.run(config, tmp_path / "there", Silent(), deployment=Elsewhere(config, Post(start, every=5)))
    for key in ("zero_shot", "evaluation", "scored", "per_client", "payload_bytes", "evaluation_bytes"):
        assert there[key] == here[key], key
    assert outcome(tmp_path / "there")["final"] == outcome(tmp_path / "here")["final"]
    assert (there["per_client"] == {}) == secure
    partition = json.loads((tmp_path / "there/partition.json").read_text())
    assert (partition["held_out"], [c["examples"] for c in partition["clients"]]) == (0, [6, 6, 6])


# Faults


def test_who_cannot_score_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = module.score
    found = ran(tmp_path / "all")
    own = found["per_client"]["loss"]["loss"]["clients"]

    def broken(model: Any, tokenizer: Any, examples: Any, *rest: Any) -> Any:
        if examples[0].instruction == first.instruction:
            raise InputError(f"{first.output} is not to be told")
        return score(model, tokenizer, examples, *rest)

    first = prepare_data(parse_config(document(), "test"), pooled=False).own[1][0]
    monkeypatch.setattr(module, "score", broken)
    summary = ran(tmp_path / "two")
    why = "its held-out examples cannot be scored; its own log says why"
    assert summary["scored"] == {"clients": [0, 2], "left_out": {"1": why}}
    assert summary["per_client"]["loss"]["loss"]["clients"] == {c: own[c] for c in ("0", "2")}
    assert summary["evaluation"]["loss"]["examples"] == 4


@pytest.mark.parametrize(
    ("made", "said"), [("global", "cannot be scored"), ("client-0000", "makes no global")]
)
def test_a_model_is_left_as_it_was_whatever_comes(
    made: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that cannot be scored, and a method of one's own that makes none for all clients."""
    left = []

    def export(state: Any, model: Any) -> Iterator[Any]:
        try:
            yield made, model
        finally:
            left.append(model)

    def score(*given: Any) -> Any:
        raise InputError("no token carries loss")

    monkeypatch.setattr(module, "score", score)
    method: Any = SimpleNamespace(config=SimpleNamespace(name="mine"), export=export)
    scorer: Any = SimpleNamespace(tokenizer=None, settings=None, examples={0: ["one"]})
    of = FederatedEvaluation(method, Nothing, ["loss"], classifier=False, scorer=scorer)
    model = torch.nn.Linear(1, 1)
    env: Any = SimpleNamespace(client=0, device=torch.device("cpu"), memory=None, model=model)
    with pytest.raises(ClientError, match=said):
        of.client_step(Payload(), env)
    assert left == [model]
    env.client = 1
    with pytest.raises(ClientError, match="it has no held-out examples"):
        of.client_step(Payload(), env)


def test_without_enough_scores_the_run_stops_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three clients fail in the evaluation after round 2; resumed, the run has the same bits."""
    whole = ran(tmp_path / "whole")
    step, failing = FederatedEvaluation.client_step, [True]

    def client_step(self: FederatedEvaluation, job: Any, env: Any) -> Any:
        if failing[0] and env.round == 2 and env.client != 1:
            return module.ClientResult(Payload({"sums": torch.tensor([math.nan])}), {})
        return step(self, job, env)

    monkeypatch.setattr(FederatedEvaluation, "client_step", client_step)
    config = parse_config(document(), "test")
    said = r"evaluation by clients after round 2: 1 of 3 clients gave a usable reply, the quorum is 2"
    with pytest.raises(FederationError, match=said):
        runs.run(config, tmp_path / "run", Silent())
    failing[0] = False
    again = runs.run(config, tmp_path / "run", Silent(), resume=True)
    assert again["evaluation"] == whole["evaluation"] and again["scored"] == whole["scored"]
    here, there = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
    assert here["final"] == there["final"] and here["rounds"] == there["rounds"]


def test_clients_that_drop_out_are_not_scored(tmp_path: Path) -> None:
    simulate = {"simulate": {"dropout": 0.3}, "quorum": 1}
    summary = ran(tmp_path / "run", method={**LORA, "rounds": 4}, federation=simulate)
    rounds = lines(tmp_path / "run/rounds.jsonl")
    assert {why for entry in rounds for why in entry["scored"]["left_out"].values()} == {"it dropped out"}
    for entry in rounds:
        there = {*map(str, entry["scored"]["clients"]), *entry["scored"]["left_out"]}
        assert there == {"0", "1", "2"}
        assert entry["eval"]["loss"]["examples"] == 2 * len(entry["scored"]["clients"])
    assert summary["scored"] == rounds[-1]["scored"]


# What is made of the scores


def test_the_best_round_and_the_end_are_chosen_by_them(tmp_path: Path) -> None:
    changes = {"method": {**LORA, "rounds": 6, "lr": 0.03}, "checkpoints": {"best": "loss.loss"}}
    changes["federation"] = {"max_loss_jump": None}
    summary = ran(tmp_path / "run", evaluation={"stop": {"metric": "loss.loss", "patience": 1}}, **changes)
    rounds = lines(tmp_path / "run/rounds.jsonl")
    losses = {entry["round"]: entry["eval"]["loss"]["loss"] for entry in rounds if entry["round"]}
    best = min(losses, key=lambda round: losses[round])
    assert summary["best"] == {"round": best, "metric": "loss.loss"}
    assert summary["evaluation"]["loss"]["loss"] == losses[best]
    assert summary["rounds"] == best + 1 and summary["stopped_early"]["best_round"] == best


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fraction": ({"data": {**DATA, "holdout": {"fraction": 0.1}}}, "set data.holdout.client_fraction"),
    "noise": ({"federation": {"privacy": {"clip": 1, "noise_multiplier": 1}}}, "would tell what ε must not"),
    "emulator": (
        {
            "method": {"name": "fedbiot", "adapter_layers": 1},
            "data": {**DATA, "public": {"source": "bundled"}},
        },
        "fedbiot: its clients never hold the model",
    ),
    "blocks": ({"method": {"name": "fedcybgd"}}, "fedcybgd: its clients never hold the model"),
    "own models": ({"method": {**LORA, "own": ["lora_B"]}}, "models of clients' own"),
    "graph": ({"method": {**KSEED, "graph": "full"}}, "models of clients' own"),
    "arrivals": (
        {"method": {**LORA, "rounds": 1, "arrival": "asynchronous"}, "evaluation": {"arrivals": True}},
        "asked for scores after each reply",
    ),
    "its own questions": (
        {"evaluation": {"tasks": ["gsm8k-0shot"]}},
        "task gsm8k-0shot, whose score is no mean",
    ),
    "correlation": ({"evaluation": {"tasks": ["pearson"]}}, "task pearson, whose score is no mean"),
    "best": (
        {"evaluation": {"tasks": ["accuracy"]}, "checkpoints": {"best": "accuracy.accuracy/add"}},
        "of clients' scores there are accuracy.accuracy",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_go_with_is_refused(name: str) -> None:
    changes, said = REFUSED[name]
    with pytest.raises(InputError, match=r"evaluation\.where: clients does not go with") as refused:
        parse_config(document(**changes), "test")
    assert said in str(refused.value)


def test_a_reference_beside_it_is_scored_where_all_examples_are() -> None:
    """It sends nothing, and its one process has every client's examples."""
    parse_config(document(method={"name": "zero-shot"}, evaluation={"tasks": ["pearson"]}), "test")


def test_a_threshold_has_to_hold_for_all_clients_too(tmp_path: Path) -> None:
    """Two of three asked are enough for a round, and not above one half of the four that score."""
    pytest.importorskip("Crypto", reason="secure aggregation is not installed (the extra `privacy`)")
    federation = {"clients_per_round": 3, "secure_aggregation": {"threshold": 2}}
    with pytest.raises(InputError, match="it must be above one half of them, 3 or more"):
        ran(tmp_path / "run", data={**DATA, "clients": 4}, federation=federation)
    assert not (tmp_path / "run").exists()


def test_an_operator_is_told_what_is_scored_and_who_sees_it() -> None:
    from fedtune.data.examples import Example

    said = {}
    for name, federation in {"plain": {}, "masked": {"secure_aggregation": {}}}.items():
        config = parse_config(document(federation=federation), "test")
        method = registry.build(config.method, 0)
        asked = Asked.of(config, method, [Example("a", output="b")], {}, weights="0", signed=True, scored=5)
        said[name] = next(line for line in asked.words("fed:443") if "scores" in line)
    sent = "it scores the model on 5 more of your examples, which are not trained on; the server gets sums of"
    assert said["plain"] == f"{sent} scores and counts, this client's own"
    assert said["masked"] == f"{sent} scores and counts, their sums over all clients"


@pytest.mark.parametrize("form", ["lora", "full", "fedkseed"])
def test_a_plan_has_what_the_ledger_has(form: str, tmp_path: Path) -> None:
    changes = FORMS[form]
    method = changes if "name" in changes else {k: v for k, v in (LORA | changes).items() if v is not None}
    config = parse_config(document(method=method, evaluation={"every": 2}), "test")
    planned, summary = plan(config).document, runs.run(config, tmp_path / "run", Silent())
    assert planned["payload_bytes"]["evaluation"] == summary["evaluation_bytes"]
    totals = {way: planned["payload_bytes"][way] for way in ("down", "up")}
    assert totals == summary["payload_bytes"]
    assert planned["payload_bytes"]["per_client_round"] == summary["payload_bytes_per_client_round"]
    measured = summary["peak_memory_bytes"]["evaluation"]
    assert planned["evaluation_peak_memory_bytes"]["total"] == pytest.approx(measured, rel=0.01)
