"""The round loop on hand-computable clients: who is asked, who is left out and why, what is counted."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import Bench, Toy, items

from fedtune.core.aggregate import WeightedSum
from fedtune.core.cohort import Cohort, QuorumError, quorum_of, sample_cohort
from fedtune.core.ledger import Ledger
from fedtune.core.reported import reported
from fedtune.core.types import (
    Arrival,
    ClientEnv,
    ClientError,
    ClientResult,
    Order,
    Payload,
    Reply,
    ServerEnv,
    TensorSpec,
)
from fedtune.core.wire import Content, FrameError, decode, encode
from fedtune.errors import ProgramError
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config, Regions
from fedtune.transport.in_process import InProcess, Simulation

DATA = {client: items(client, client + 1) for client in range(4)}


@dataclass(frozen=True)
class State:
    w: Tensor


class Adding:
    """Client i sends i; the server adds the mean. Client 2 sends what `bad` makes."""

    rounds, arrival, pools_data, uses_wire, saves_merged, sends_model = (
        1,
        "any-order",
        False,
        True,
        False,
        False,
    )

    def __init__(self, bad: Callable[[], Mapping[str, Tensor]] | None = None) -> None:
        self.bad = bad

    def prepare(self, server: ServerEnv) -> None:
        pass

    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        return build()

    def init(self, model: nn.Module) -> State:
        return State(torch.zeros(1))

    def plan(self, state: State, round: int, cohort: Cohort) -> Iterable[Order]:
        job = Payload({"w": state.w})
        return [
            Order(client, job, {"w": TensorSpec(torch.float32, (1,), 100.0)}) for client in cohort.clients
        ]

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        if env.client == 2 and self.bad:
            return ClientResult(Payload(self.bad()), {})
        return ClientResult(Payload({"w": torch.tensor([float(env.client)])}), {"train_loss": 1.0})

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        got = [reply.payload.tensors["w"] for reply in replies]
        return State(state.w + sum(got) / len(got))

    def export(self, state: State, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield "global", model


def bench(method: Any = None, **settings: Any) -> Bench:
    return Bench(method or Adding(), Toy(), DATA, **settings)


def _fails() -> Mapping[str, Tensor]:
    raise ClientError("no battery")


def _breaks() -> Mapping[str, Tensor]:
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda: {"w": torch.tensor([torch.nan])}, "tensor w holds NaN or infinite"),
        (lambda: {"w": torch.tensor([-torch.inf])}, "tensor w holds NaN or infinite"),
        (lambda: {"w": torch.tensor([100.0])}, "tensor w holds values of 100 or more"),
        (lambda: {"w": torch.zeros(2)}, r"shape \(2,\).*\(1,\) was asked"),
        (lambda: {"w": torch.zeros(1, dtype=torch.float64)}, "float64"),
        (lambda: {"w": torch.zeros(1), "v": torch.zeros(1)}, "not asked for v"),
        (dict, "missing w"),
        (lambda: {"w": torch.zeros(1_000_000)}, "at most"),
        (_fails, "no battery"),
    ],
)
def test_what_is_not_as_asked_is_left_out_and_named(
    bad: Callable[[], Mapping[str, Tensor]], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    federation = bench(Adding(bad))
    with caplog.at_level(logging.WARNING, logger="fedtune"):
        outcome = federation.round(1, quorum=0.75)
    assert outcome.clients == [0, 1, 3]
    assert list(outcome.left_out) == [2]
    assert re.search(reason, outcome.left_out[2])
    assert "client 2 is left out" in caplog.text
    assert federation.state.w.item() == pytest.approx((0 + 1 + 3) / 3)
    # what was not accepted is not counted as received; the order was sent all the same
    assert [(e["client"], e["direction"]) for e in federation.wire if e["client"] == 2] == [(2, "down")]
    with pytest.raises(QuorumError, match=f"3 of 4 .* quorum is 4. Left out: client 2: .*{reason}"):
        bench(Adding(bad)).round(1, quorum=4)


def test_what_any_client_would_meet_is_not_left_out() -> None:
    federation = bench(Adding(_breaks))
    said = r"training of client 2 in round 1: .* ZeroDivisionError: division by zero\. .*test_loop\.py, line"
    with pytest.raises(ProgramError, match=said) as ended:
        federation.round(1, quorum=1)
    assert isinstance(ended.value.__cause__, ZeroDivisionError)


class Rewriting:
    """Passes another transport's arrivals on, after `change` has rewritten them."""

    def __init__(self, inner: InProcess, change: Callable[[Arrival], list[Arrival]]) -> None:
        self.inner, self.change = inner, change

    def exchange(
        self, round: int, frames: Iterable[tuple[int, bytes]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        for arrival in self.inner.exchange(round, frames, in_plan_order=in_plan_order):
            yield from self.change(arrival)


def _with_meta(arrival: Arrival, **meta: Any) -> Arrival:
    message = decode(arrival.frame)
    return Arrival(arrival.client, encode(Content(message.payload, {**message.meta, **meta})))


def _with_scalars(arrival: Arrival, **scalars: Any) -> Arrival:
    message = decode(arrival.frame)
    return Arrival(arrival.client, encode(Content(Payload(message.payload.tensors, scalars), message.meta)))


def bent(**meta: Any) -> Callable[[Arrival], list[Arrival]]:
    return lambda a: [_with_meta(a, **meta) if a.client == 2 else a]


@pytest.mark.parametrize(
    ("change", "clients", "reason"),
    [
        (lambda a: [_with_meta(a, client=1)] if a.client == 2 else [a], [0, 1, 3], "round 1 of client 1"),
        (lambda a: [_with_meta(a, round=7)] if a.client == 2 else [a], [0, 1, 3], "round 7 of client 2"),
        (lambda a: [Arrival(2, a.frame[:-1])] if a.client == 2 else [a], [0, 1, 3], "header says"),
        (
            lambda a: [_with_meta(a, train_loss=float("nan"))] if a.client == 2 else [a],
            [0, 1, 3],
            "train_loss",
        ),
        (
            lambda a: [_with_meta(a, trained_tokens=-3)] if a.client == 2 else [a],
            [0, 1, 3],
            "trained_tokens is -3; it must be in 0..9,007,199,254,740,992",
        ),
        (bent(peak_bytes=-5e300), [0, 1, 3], "peak_bytes is -5e+300; it must be in 0..9,007"),
        (bent(steps=2**60), [0, 1, 3], "steps is 1.15292e+18; it must be in 0..9,007"),
        (bent(train_loss="2"), [0, 1, 3], "train_loss must be a finite number, got '2'"),
        (bent(train_loss=True), [0, 1, 3], "train_loss must be a finite number, got True"),
        (bent(**{"x\x1b[2J" * 9: 1}), [0, 1, 3], "metric x\ufffd[2J"),
        (
            lambda a: [_with_scalars(a, crc32=7)] if a.client == 2 else [a],
            [0, 1, 3],
            "scalars that were not asked for: crc32",
        ),
        (lambda a: [a, a], [0, 1, 2, 3], None),
        (lambda a: [a, Arrival(99, a.frame)], [0, 1, 2, 3], None),
    ],
    ids=[
        *("other client", "other round", "cut", "metric", "fewer than no tokens", "fewer than no bytes"),
        *("endless steps", "a text", "a flag", "a foreign metric", "a scalar", "twice", "not asked"),
    ],
)
def test_replies_of_others_are_not_believed(
    change: Callable[[Arrival], list[Arrival]], clients: list[int], reason: str | None
) -> None:
    federation = bench()
    federation.loop.transport = Rewriting(federation.loop.transport, change)
    outcome = federation.round(1, quorum=3)
    assert outcome.clients == clients
    assert federation.state.w.item() == pytest.approx(sum(clients) / len(clients))
    if reason is None:
        assert outcome.left_out == {}
    else:
        assert list(outcome.left_out) == [2]
        assert reason in outcome.left_out[2]


def test_a_round_that_is_run_again_without_one_takes_all_others() -> None:
    federation = bench()
    cohort = sample_cohort({client: 1 for client in DATA}, None, seed=0, round=1)
    state, outcome = federation.loop.run(
        federation.state,
        cohort,
        1,
        quorum=3,
        on_arrival=lambda state, outcome: None,
        without={0: "it stands out"},
    )
    assert outcome.clients == [1, 2, 3] and outcome.left_out == {0: "it stands out"}
    assert state.w.item() == 2.0 and federation.wire == []  # nothing is counted a second time


def test_a_metric_that_is_not_known_is_told_which_are() -> None:
    known = "computed_tokens, device_bytes, host_bytes, how, mine, padding_tokens, peak_bytes, steps, "
    known += "train_loss, trained_tokens"
    with pytest.raises(FrameError, match=f"metric other was not asked for; known are {known}$"):
        reported({"other": 1.0}, more=["mine"])
    assert reported({"mine": 2.0, "round": 1}, more=["mine"]) == ({"mine": 2.0}, "not measured")


class Reporting(Adding):
    """Its orders ask for a metric and a scalar of their own."""

    def plan(self, state: State, round: int, cohort: Cohort) -> Iterable[Order]:
        own = {"scalars": frozenset({"votes"}), "metrics": frozenset({"doubt"})}
        return [replace(order, **own) for order in super().plan(state, round, cohort)]

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        return ClientResult(Payload({"w": torch.ones(1)}, {"votes": 3}), {"train_loss": 1.0, "doubt": 0.5})


def test_an_order_may_ask_for_a_metric_and_a_scalar_of_its_own() -> None:
    outcome = bench(Reporting()).round(1)
    assert outcome.left_out == {}
    assert all(metrics == {"train_loss": 1.0, "doubt": 0.5} for metrics in outcome.metrics.values())


def test_a_round_without_a_reply_raises_whatever_the_quorum() -> None:
    federation = bench(simulation=Simulation(dropout=1.0))
    with pytest.raises(QuorumError, match=r"round 1: 0 of 4 clients.*clients 0, 1, 2, 3: it dropped out"):
        federation.round(1, quorum=0)
    assert federation.state.w.item() == 0.0


def test_a_round_without_a_client_raises() -> None:
    federation = Bench(Adding(), Toy(), {})
    with pytest.raises(QuorumError, match="0 of 0 clients"):
        federation.round(1)


def test_one_by_one_a_round_under_quorum_raises_too() -> None:
    method = FedAvg(
        Config(trainable="full", rounds=1, arrival="asynchronous", optimizer="sgd", lr=0.1), seed=0
    )
    federation = Bench(method, Toy(), {**DATA, 1: []})
    with pytest.raises(QuorumError, match=r"3 of 4.*client 1: .*no examples"):
        federation.round(1, quorum=4)
    assert federation.state.weight == 0


@pytest.mark.parametrize(
    ("cohort", "quorum", "needed"),
    [
        (10, 0.5, 5),
        (10, 0.51, 6),
        (3, 0.5, 2),
        (10, 1.0, 10),
        (10, 1, 1),
        (10, 7, 7),
        (4, 0.0, 1),
        (0, 0.5, 1),
        (10, 0.7, 7),
        (100, 0.07, 7),  # 0.07 * 100 is more than 7 in floating point
    ],
)
def test_quorum_as_count_and_fraction(cohort: int, quorum: float | int, needed: int) -> None:
    assert quorum_of(cohort, quorum) == needed


@pytest.mark.parametrize(
    ("per_round", "size"),
    [(None, 20), (0.05, 1), (0.1, 2), (0.125, 3), (1.0, 20), (0.001, 1), (7, 7), (1, 1)],
)
def test_cohort_by_count_and_fraction(per_round: float | int | None, size: int) -> None:
    cohort = sample_cohort({client: client + 1 for client in range(20)}, per_round, seed=3, round=1)
    assert len(cohort.clients) == size
    assert list(cohort.clients) == sorted(set(cohort.clients))
    assert cohort.total_examples == sum(client + 1 for client in cohort.clients)
    assert cohort.population == 20


def test_cohorts_differ_by_round_and_seed_and_by_nothing_else() -> None:
    examples = dict.fromkeys(range(20), 1)
    drawn = {
        (seed, round): sample_cohort(examples, 5, seed=seed, round=round).clients
        for seed in range(3)
        for round in range(1, 30)
    }
    assert len(set(drawn.values())) > 80  # of 87; one of C(20, 5) = 15,504 each
    assert drawn[1, 2] == sample_cohort(examples, 5, seed=1, round=2).clients
    counts = [sum(client in drawn[seed, r] for seed in range(3) for r in range(1, 30)) for client in examples]
    assert min(counts) > 8  # 87 / 4 = 21.75 expected, standard deviation 4


def test_dropped_and_late_clients_are_named_and_do_not_train() -> None:
    federation = bench(simulation=Simulation(dropout=0.3, delay_s=2.0), deadline_s=3.0)
    trained: list[int] = []
    step = federation.method.client_step
    federation.method.client_step = lambda job, env: trained.append(env.client) or step(job, env)
    reasons: list[str] = []
    for round in (1, 3, 4, 5, 6):  # in the second nobody is left
        trained.clear()
        outcome = federation.round(round, quorum=0)
        assert trained == outcome.clients
        assert sorted([*outcome.clients, *outcome.left_out]) == [0, 1, 2, 3]
        reasons += outcome.left_out.values()
    dropped = [reason for reason in reasons if reason == "it dropped out"]
    late = [reason for reason in reasons if reason.startswith("its reply comes after")]
    assert len(dropped) + len(late) == len(reasons)
    assert len(dropped) > 0
    assert len(late) > 0
    assert all(float(reason.split()[4]) >= 3.0 and reason.endswith("deadline is 3 s") for reason in late)


def test_delays_set_the_order_of_arrival_where_order_is_free() -> None:
    one = bench(simulation=Simulation(delay_s=1.0)).round(1)
    assert sorted(one.clients) == [0, 1, 2, 3]
    orders = {tuple(bench(simulation=Simulation(delay_s=1.0)).round(r).clients) for r in range(1, 12)}
    assert len(orders) > 5  # of 24
    method = Adding()
    method.arrival = "plan-order"
    assert bench(method, simulation=Simulation(delay_s=1.0)).round(1).clients == [0, 1, 2, 3]


def test_the_order_of_arrival_does_not_change_fedavg() -> None:
    def end(simulation: Simulation) -> Tensor:
        method = FedAvg(Config(trainable="full", rounds=2, optimizer="sgd", lr=0.3, batch_size=1), seed=0)
        federation = Bench(method, Toy(), DATA, simulation)
        for round in (1, 2):
            federation.round(round)
        return federation.state.weights["w"]

    assert torch.equal(end(Simulation()), end(Simulation(delay_s=1.0)))


@pytest.mark.parametrize("regions", [None, Regions(of=[0, 1], rounds=1)])
def test_no_update_is_in_memory_while_the_next_client_trains(
    regions: Regions | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"trainable": "full", "rounds": 1, "optimizer": "sgd", "regions": regions}
    method = FedAvg(Config(**settings), seed=0)
    federation, earlier, alive = Bench(method, Toy(), DATA), list[weakref.ref[Tensor]](), list[int]()
    step, add = method.client_step, WeightedSum.add

    def stepped(*args: Any) -> ClientResult:
        alive.append(sum(each() is not None for each in earlier))
        return step(*args)

    def added(total: WeightedSum, update: Mapping[str, Tensor], weight: int) -> WeightedSum:
        earlier.extend(weakref.ref(tensor) for tensor in update.values())
        return add(total, update, weight)

    monkeypatch.setattr(method, "client_step", stepped)
    monkeypatch.setattr(WeightedSum, "add", added)
    federation.round(1)
    assert len(earlier) == 4 and alive == [0, 0, 0, 0]


@pytest.mark.parametrize(("rounds", "per_round"), [(1, None), (3, None), (4, 2)])
def test_payload_bytes_are_twice_m_rounds_and_size(rounds: int, per_round: int | None) -> None:
    class Wide(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Parameter(torch.zeros(7, 11))

    method = FedAvg(Config(trainable="full", rounds=rounds, optimizer="sgd", lr=0.1), seed=0)
    federation = Bench(method, Wide(), DATA)
    for round in range(1, rounds + 1):
        federation.round(round, per_round=per_round)
    size, clients = 4 * (1 + 7 * 11), per_round or 4
    assert federation.ledger.payload_bytes == {"down": clients * rounds * size, "up": clients * rounds * size}
    assert federation.ledger.payload_bytes.total() == 2 * clients * rounds * size
    assert federation.ledger.payload_bytes_per_client_round() == 2 * size
    assert len(federation.wire) == 2 * clients * rounds
    for way in ("down", "up"):
        entries = [entry for entry in federation.wire if entry["direction"] == way]
        assert len({(entry["round"], entry["client"]) for entry in entries}) == clients * rounds
        assert federation.ledger.framed_bytes[way] == sum(entry["framed_bytes"] for entry in entries)
        assert all(entry["framed_bytes"] > entry["payload_bytes"] == size for entry in entries)


def test_the_ledger_enters_the_bytes_that_the_transport_carried() -> None:
    carried: list[tuple[int, str, int]] = []
    federation = bench()
    inner = federation.loop.transport

    class Watching:
        def exchange(
            self, round: int, frames: Iterable[tuple[int, bytes]], *, in_plan_order: bool
        ) -> Iterator[Arrival]:
            def seen() -> Iterator[tuple[int, bytes]]:
                for client, frame in frames:
                    carried.append((client, "down", len(frame)))
                    yield client, frame

            for arrival in inner.exchange(round, seen(), in_plan_order=in_plan_order):
                carried.append((arrival.client, "up", len(arrival.frame)))
                yield arrival

    federation.loop.transport = Watching()
    federation.round(1)
    assert [(e["client"], e["direction"], e["framed_bytes"]) for e in federation.wire] == carried


def test_a_repeated_round_makes_frames_of_the_same_length() -> None:
    first, second = bench(), bench()
    first.round(1), second.round(1)
    assert first.wire == second.wire


def test_a_restored_ledger_has_the_same_totals() -> None:
    federation = bench()
    federation.round(1)
    again = Ledger(lambda entry: pytest.fail("restored entries are not written again"), pytest.fail)
    again.restore(federation.wire, federation.memory)
    assert again.payload_bytes == federation.ledger.payload_bytes
    assert again.framed_bytes == federation.ledger.framed_bytes
    assert again.peak_memory_bytes == federation.ledger.peak_memory_bytes
    assert again.payload_bytes_per_client_round() == federation.ledger.payload_bytes_per_client_round() == 8.0


def test_mean_metrics_are_weighted_by_examples() -> None:
    federation = Bench(Adding(), Toy(), {0: items(0), 1: items(1, 1, 1)})
    federation.method.client_step = lambda job, env: ClientResult(
        Payload({"w": torch.zeros(1)}), {"train_loss": float(2 + 4 * env.client)}
    )
    outcome = federation.round(1)
    assert outcome.mean("train_loss") == (1 * 2.0 + 3 * 6.0) / 4
    assert outcome.mean("unheard of") is None


def test_everyone_is_asked_even_when_the_quorum_is_out_of_reach() -> None:
    """Who is left out has to be named."""
    federation = bench(Adding(_fails))
    with pytest.raises(QuorumError):
        federation.round(1, quorum=4)
    assert {entry["client"] for entry in federation.wire} == {0, 1, 2, 3}


class InTurn(Adding):
    """Client i adds i to what the turn before left; client 2 may fail. The state counts turns."""

    arrival, sends_model = "in-turn", True

    def plan(self, state: State, round: int, cohort: Cohort) -> Iterable[Order]:
        client = cohort.clients[int(state.w[1])]
        model = {"model:base": torch.ones(10)} if state.w[1] == 0 else {}
        yield Order(client, Payload({"w": state.w} | model), {"w": TensorSpec(torch.float32, (2,), 100.0)})

    def init(self, model: nn.Module) -> State:
        return State(torch.zeros(2))

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        assert not list(env.model.parameters())  # the server's model is not the client's
        if env.client == 2 and self.bad:
            self.bad()
        held = {n: t for n, t in job.tensors.items() if n.startswith("model:")}
        if held:
            env.store.put(Payload(held))
        return ClientResult(Payload({"w": job.tensors["w"] + torch.tensor([env.client, 1.0])}), {})

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        for reply in replies:
            return State(reply.payload.tensors["w"])
        return State(state.w + torch.tensor([0.0, 1.0]))


def test_clients_in_turn_see_what_the_one_before_left() -> None:
    b = bench(InTurn())
    outcome = b.round(1)
    assert outcome.clients == sorted(DATA)
    assert b.state.w.tolist() == [sum(DATA), len(DATA)]
    held = [(e["kind"], e["client"], e["payload_bytes"]) for e in b.wire if e["direction"] == "down"][:2]
    first = min(DATA)
    assert held == [("model", first, 40), ("train", first, 8)]
    assert b.ledger.framed_bytes["down"] == sum(e["framed_bytes"] for e in b.wire if e["direction"] == "down")


def test_a_client_that_fails_in_its_turn_is_passed_over() -> None:
    b = bench(InTurn(_fails))
    outcome = b.round(1, quorum=1)
    assert set(outcome.left_out) == {2} and "no battery" in outcome.left_out[2]
    assert b.state.w.tolist() == [sum(DATA) - 2, len(DATA)]
