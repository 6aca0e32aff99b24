"""Secure aggregation: exact sums, a server that sees noise, and clients that drop out, break or lie."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import write_config
from protected import DATA, federation, kseed
from scipy import stats
from secure_rounds import SECURE, bits_of, equal
from toy import items

from fedtune.config.file import load_config, parse_config
from fedtune.core.client import ClientRunner
from fedtune.core.cohort import QuorumError
from fedtune.core.types import ClientError, Payload
from fedtune.errors import InputError
from fedtune.federation import run as runs
from fedtune.federation.journal import Journal
from fedtune.federation.progress import Silent
from fedtune.measure.clock import Clock
from fedtune.protection import masking
from fedtune.protection.settings import Privacy, SecureAggregation, threshold_of
from fedtune.transport.in_process import InProcess, Simulation

# Exact sums

ROUNDS = (3, 4, 5)  # client 2 drops out of the second, client 1 of the third

METHODS: dict[str, Any] = {
    "mean": {},
    "momentum": {"server_optimizer": {"name": "momentum"}},
    "adam": {"server_optimizer": {"name": "adam"}},
    "scaffold": {"control_variates": True},
    "proximal": {"proximal": 1.0},
    "fedkseed pairs": {"method": kseed},
    "fedkseed sums": {"method": lambda: kseed(local_steps=30)},
}


@pytest.mark.parametrize(("name", "bits"), [("mean", 64), *((name, 48) for name in METHODS)])
def test_the_final_bits_are_those_without_masks(name: str, bits: int) -> None:
    """Three rounds; in some of them one of four clients drops out after it has shared its secrets."""
    settings = dict(METHODS[name])
    build = settings.pop("method", lambda: None)
    ends, lost = [], 0
    for secure in (None, SecureAggregation(bits=bits)):
        bench, _ = federation(secure, method=build(), simulation=Simulation(dropout=0.25), **settings)
        outcomes = [bench.round(round, quorum=0.5) for round in ROUNDS]
        ends.append((bench, outcomes))
        lost = sum(len(outcome.left_out) for outcome in outcomes)
    (plain, before), (masked, after) = ends
    assert lost >= 2
    assert equal(plain, masked)
    for mine, theirs in zip(before, after, strict=True):
        assert mine.clients == theirs.clients
        assert mine.left_out == theirs.left_out
        assert theirs.mean("train_loss") == pytest.approx(mine.mean("train_loss"), abs=1e-6)
        assert set(map(str, theirs.metrics.values())) == {"{}"}  # nothing of a single client


def test_the_loss_under_masks_is_the_mean_over_trained_tokens() -> None:
    """Losses 1, 2, 3 and 5 over 1, 7, 0 and 12 tokens; a client without one has no loss."""
    bench, _ = federation(SECURE)
    step, tokens = bench.method.client_step, (1, 7, 0, 12)

    def counted(job: Any, env: Any) -> Any:
        metrics = {"trained_tokens": tokens[env.client]}
        if tokens[env.client]:
            metrics["train_loss"] = (1.0, 2.0, 3.0, 5.0)[env.client]
        return replace(step(job, env), metrics=metrics)

    bench.method.client_step = counted
    assert bench.round(1).mean("train_loss") == pytest.approx((1 + 2 * 7 + 5 * 12) / 20, abs=1e-6)
    tokens = (0, 0, 0, 0)
    nothing = bench.round(2)
    assert nothing.mean("train_loss") is None and nothing.totals == {}


@pytest.mark.parametrize("phase", ["keys", "shares", "opened", "masked", "unmask"])
def test_one_of_four_may_drop_out_in_any_phase(phase: str) -> None:
    bench, bent = federation(SECURE)
    bent.reply = lambda at, client, tensors: "no battery" if (at, client) == (phase, 2) else None
    outcome = bench.round(1, quorum=0.5)
    inside = phase == "unmask"  # its update is in the sum; the others are enough to unmask it
    assert sorted(outcome.clients) == ([0, 1, 2, 3] if inside else [0, 1, 3])
    assert (2 in outcome.left_out) == (not inside)
    plain, other = federation()
    other.reply = lambda at, client, tensors: "no battery" if client == 2 and not inside else None
    plain.round(1, quorum=0.5)
    assert equal(plain, bench)
    bent.reply = other.reply = lambda at, client, tensors: None
    assert sorted(bench.round(2).clients) == [0, 1, 2, 3]  # the next round finds it back
    plain.round(2)
    assert equal(plain, bench)


@pytest.mark.parametrize("phase", ["keys", "shares", "opened", "masked", "unmask"])
def test_below_the_threshold_the_round_fails_and_nothing_is_lost(phase: str) -> None:
    bench, bent = federation(SECURE)
    before = bits_of(bench)
    bent.reply = lambda at, client, tensors: "no battery" if at == phase and client in (1, 2) else None
    with pytest.raises(
        QuorumError, match=rf"2 of 4 clients .*{phase}.* threshold is 3.*Nothing was unmasked"
    ):
        bench.round(1, quorum=0.5)
    after = bits_of(bench)
    assert all(torch.equal(before[name], after[name]) for name in before)
    bent.reply = lambda at, client, tensors: None
    bench.round(1)  # asked again, all make new keys
    plain, _ = federation()
    plain.round(1)
    assert equal(plain, bench)


def test_below_the_quorum_nothing_is_unmasked() -> None:
    bench, bent = federation(SECURE)
    bent.reply = lambda at, client, tensors: "no battery" if at == "masked" and client == 1 else None
    with pytest.raises(QuorumError, match="3 of 4 clients gave a usable reply, the quorum is 4"):
        bench.round(1, quorum=1.0)
    assert bent.of("unmask") == {}


def test_a_client_without_examples_is_left_out_before_it_has_a_part_in_it() -> None:
    bench, _ = federation(SECURE, data={**DATA, 1: []})
    outcome = bench.round(1, quorum=0.5)
    assert outcome.left_out == {1: "it has no examples"}


@pytest.mark.parametrize("bits", [40, 48])
def test_a_number_too_large_for_the_bits_is_the_clients_error(bits: int) -> None:
    bench, _ = federation(SecureAggregation(bits=bits), data={c: items(10**6) for c in range(4)})
    with pytest.raises(QuorumError, match=rf"bits={bits} it must be below .*; set more bits"):
        bench.round(1, quorum=0.5)


# What the server sees


VIEWS, NUMBERS, CHANCE = 30, 4 * 91 * 11 + 3, 1e-8


@pytest.fixture(scope="module")
def views() -> Any:
    """What three clients send in 30 rounds, the same update each time: uint64 (round, client, number)."""
    bench, bent = federation(SECURE, data={c: items(c, 1) for c in range(3)}, rows=4 * 91)
    start, seen = bench.state, []
    for _ in range(VIEWS):
        bench.state = start
        bench.round(1)
        masked = [bent.of("masked")[client]["masked"].numpy() for client in range(3)]
        seen.append([np.ascontiguousarray(rows).view("<u8").reshape(-1) for rows in masked])
    return np.array(seen, dtype=np.uint64)


def chance_of_bytes(numbers: Any) -> float:
    """That uniform bytes are as far from equally frequent as these: chi-square, 255 degrees of freedom."""
    raw = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1)
    return float(stats.chisquare(np.bincount(raw, minlength=256)).pvalue)


def chance_of_numbers(numbers: Any) -> float:
    """The same of numbers in [0, 2^64): Kolmogorov and Smirnov."""
    return float(stats.kstest(numbers.reshape(-1).astype(np.float64) / 2.0**64, "uniform").pvalue)


def test_what_the_server_sees_of_an_update_is_noise(views: Any) -> None:
    """Keys come from the operating system: by chance alone a test fails once in 10⁸."""
    assert views.shape == (VIEWS, 3, NUMBERS)  # the parameters, the loss and its tokens
    one = views[:, 1]
    assert chance_of_bytes(one) > CHANCE
    assert chance_of_numbers(one) > CHANCE
    for place in range(8):  # each byte of a number by itself
        assert chance_of_bytes(one.view(np.uint8).reshape(-1, 8)[:, place]) > CHANCE
    for view in one:  # each round by itself
        assert min(chance_of_bytes(view), chance_of_numbers(view)) > CHANCE
    # each number over the rounds: how often its bits are 1, of 64 · 30
    ones = np.unpackbits(one.copy().view(np.uint8).reshape(VIEWS, NUMBERS, 8), axis=2).sum(axis=(0, 2))
    smooth = ones + np.random.default_rng(0).random(NUMBERS) - 960.5  # counts are whole numbers
    assert stats.kstest(smooth / 480**0.5, "norm").pvalue > CHANCE
    # two rounds of one client have nothing in common but the update
    assert chance_of_bytes(one[0::2] - one[1::2]) > CHANCE
    assert len({view.tobytes() for view in one}) == VIEWS


def test_sums_of_several_clients_are_noise_too_until_they_are_unmasked(views: Any) -> None:
    for some in ((0, 1), (1, 2), (0, 1, 2)):
        assert chance_of_bytes(views[:, some].sum(axis=1, dtype=np.uint64)) > CHANCE


def test_those_tests_see_what_has_no_mask() -> None:
    bench, _ = federation(rows=4 * 91)
    shapes = bench.method.sum_shapes(bench.state)
    update = Payload({"w": torch.tensor([0.5]), "more": torch.randn(shapes["more"])})
    summand = bench.method.summand(update, weight=3, total=14, population=4, shapes=shapes)
    numbers = np.stack([summand["more"].reshape(-1).numpy().view(np.uint64)] * VIEWS)
    assert chance_of_bytes(numbers) < CHANCE
    assert chance_of_numbers(numbers) < CHANCE
    half = numbers + np.frombuffer(masking.fresh(numbers.size * 4), "<u4").reshape(numbers.shape)
    assert chance_of_bytes(half) < CHANCE  # a mask of 32 bits on numbers of 64


def test_the_server_never_gets_both_kinds_of_shares_of_one_client() -> None:
    bench, bent = federation(SECURE)
    bent.reply = lambda at, client, tensors: "no battery" if (at, client) == ("masked", 0) else None
    bench.round(1, quorum=0.5)
    dealt = bent.of("shares")
    for client, tensors in bent.of("unmask").items():
        for sender, share in zip(range(4), tensors["shares"], strict=True):
            kind = b"s" if sender == 0 else b"b"
            about = sender.to_bytes(8, "big") + client.to_bytes(8, "big")
            wanted = hashlib.sha256(kind + about + share.numpy().tobytes()).digest()
            assert wanted == dealt[sender]["commitments"][client, 1 if sender == 0 else 0].numpy().tobytes()


# Bytes, settings, whole runs


@pytest.mark.parametrize("bits", [48, 64])
def test_the_ledger_has_what_it_costs_under_its_own_kind(bits: int) -> None:
    plain, _ = federation()
    plain.round(1)
    bench, _ = federation(SecureAggregation(bits=bits))
    bench.round(1)
    n, numbers = 4, 78 + 2  # the loss and its tokens go with the update
    shapes = len('{"w": [1], "more": [7, 11]}')
    down = 2 * 32 * n + 96 * n + 8 * n + 8 * n + 4 * 8 + shapes  # keys, signatures, whose, weights, terms
    down += 60 * n + 64 * n + 8 * n  # sealed shares, commitments, whose
    down += 8 * n + 8 * n  # whose sum, who is in it
    up = (
        96 + 64 + 60 * n + 64 * n + 32 + n + 16 * n
    )  # signature, keys; shares, commitments; which opened; shares to unmask
    up += numbers * bits // 8 - 78 * 4
    for client in range(4):
        of = [e for e in bench.wire if e["client"] == client]
        without = [e for e in plain.wire if e["client"] == client]
        for way, extra in (("down", down), ("up", up)):
            train = [e["payload_bytes"] for e in of if (e["kind"], e["direction"]) == ("train", way)]
            assert train == [e["payload_bytes"] for e in without if e["direction"] == way]
            secure = [e for e in of if (e["kind"], e["direction"]) == ("secure-aggregation", way)]
            assert sum(e["payload_bytes"] for e in secure) == extra
            assert len(secure) == 5
            assert all(e["framed_bytes"] >= e["payload_bytes"] for e in secure)


@pytest.mark.parametrize(
    ("threshold", "cohort", "needed"), [(0.6, 3, 2), (0.6, 4, 3), (0.75, 4, 3), (0.6, 10, 6), (7, 10, 7)]
)
def test_the_threshold_as_count_and_fraction(threshold: float | int, cohort: int, needed: int) -> None:
    assert threshold_of(SecureAggregation(threshold=threshold), cohort) == needed


@pytest.mark.parametrize(
    ("threshold", "cohort", "reason"),
    [
        (3, 2, "no round could reach it"),
        (0.6, 1, "ask at least two"),
        (5, 10, "6 or more"),
        (2, 4, "3 or more"),
    ],
)
def test_thresholds_that_are_not_safe_or_out_of_reach(
    threshold: float | int, cohort: int, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        threshold_of(SecureAggregation(threshold=threshold), cohort)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "flora": ({"name": "fedavg", "aggregation": "stack"}, "needs each client's factors"),
    "asynchronous": (
        {"name": "fedavg", "rounds": 1, "arrival": "asynchronous"},
        "takes each reply in alone, as it comes",
    ),
    "trimmed mean": ({"name": "fedkseed", "aggregation": "trimmed-mean"}, "compares the clients' scalars"),
    "median": ({"name": "fedkseed", "aggregation": "median-of-means"}, "compares the clients' scalars"),
    "clip": ({"name": "fedkseed", "clip": 1.0}, "clip looks at each client's scalars"),
    "limit": ({"name": "fedkseed", "scalar_limit": 1.0}, "scalar_limit looks at each client's scalars"),
    "pro": ({"name": "fedkseed-pro"}, "counts how often each seed was drawn"),
    "fedcybgd": ({"name": "fedcybgd"}, "come one after another"),
    "infinite pool": ({"name": "infinite-pool"}, "needs more of each reply than a weighted sum"),
    "zero-shot": ({"name": "zero-shot"}, "its clients send nothing"),
    "centralized": ({"name": "centralized"}, "its clients send nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("block", ["secure_aggregation", "privacy"])
def test_methods_that_need_more_than_a_sum_are_refused(name: str, block: str) -> None:
    method, reason = REFUSED[name]
    settings = {"clip": 1.0, "noise_multiplier": 1.0} if block == "privacy" else {}
    with pytest.raises(
        InputError, match=rf"federation.{block} does not go with {method['name']}: .*{reason}"
    ):
        parse_config({"method": method, "federation": {block: settings}}, "test")


def config(**federation: Any) -> dict[str, Any]:
    return {
        "data": {"clients": 4, "max_examples": 16, "max_length": 48},
        "method": {
            "name": "fedavg",
            "rounds": 2,
            "local_steps": 1,
            "batch_size": 2,
            "lr": 0.01,
            "lora": {"rank": 2, "client_ranks": [1, 2], "targets": ["q_proj"]},
        },
        "evaluation": {"tasks": ["loss"], "max_examples": 2, "every": 0, "bootstrap": 0},
        "federation": federation,
        "seed": 3,
    }


def test_a_killed_run_goes_on_under_masks_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA of unlike ranks with one client lost; killed in each phase of a round, and resumed each time."""
    simulate = {"simulate": {"dropout": 0.25}}
    runs.run(parse_config(config(**simulate), "test"), tmp_path / "plain", Silent())
    write_config(tmp_path / "c.yaml", config(**simulate, secure_aggregation={}))
    secure = load_config(tmp_path / "c.yaml")
    handled, kills = 0, iter([2, 9, 15, 18, 31, 10**9])
    limit = next(kills)
    handle = ClientRunner.handle

    def run(self: Any, client: int, frame: bytes) -> Any:
        nonlocal handled
        handled += 1
        if handled > limit:
            raise KeyboardInterrupt
        return handle(self, client, frame)

    monkeypatch.setattr(ClientRunner, "handle", run)
    resumed = 0
    while True:
        try:
            summary = runs.run(secure, tmp_path / "run", Silent(), resume=resumed > 0)
            break
        except KeyboardInterrupt:
            handled, limit, resumed = limit, next(kills), resumed + 1
    assert resumed == 5
    assert summary["status"] == "done"
    assert handled == 4 + 4 + 4 + 3 + 3 + 4 + 4 + 4 + 4 + 4  # nobody was asked anything twice
    plain, masked = (
        (tmp_path / name / "final/adapter_model.safetensors").read_bytes() for name in ("plain", "run")
    )
    assert plain == masked
    kept = load_states(tmp_path / "run")
    assert not [name for name in kept if "seed" in name or "private" in name]


def load_states(run: Path) -> list[str]:
    """Names of what clients keep in the newest checkpoint."""
    from safetensors import safe_open

    newest = sorted((run / "checkpoints").glob("round-*"))[-1]
    path = newest / "clients.safetensors"
    if not path.exists():
        return []
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def test_the_journal_gives_back_what_a_client_kept_between_phases(tmp_path: Path) -> None:
    bench, bent = federation(SECURE)
    transport = Journal(bent, tmp_path, bench.runner.states)
    bench.loop.transport = transport
    bench.round(1)
    first = bits_of(bench)
    again, _ = federation(SECURE)
    again.loop.transport = Journal(
        InProcess(again.runner, simulation=Simulation(), deadline_s=None, seed=0, clock=Clock()),
        tmp_path,
        again.runner.states,
    )
    again.runner.handle = lambda client, frame: pytest.fail("it was answered before")  # type: ignore[method-assign]
    again.round(1)
    assert all(torch.equal(first[name], tensor) for name, tensor in bits_of(again).items())


@pytest.mark.parametrize(("secure", "privacy"), [(False, False), (True, False), (False, True), (True, True)])
def test_each_arrival_is_told_whatever_the_server_sees_of_it(secure: bool, privacy: bool) -> None:
    bench, _ = federation(
        SECURE if secure else None, Privacy(clip=1.0, noise_multiplier=0.0) if privacy else None
    )
    before, step = bench.state, bench.method.client_step

    def without_one(job: Any, env: Any) -> Any:
        if env.client == 2:
            raise ClientError("gone")
        return step(job, env)

    bench.method.client_step = without_one
    outcome = bench.round(1, quorum=0.75)
    assert outcome.clients == [0, 1, 3] and set(outcome.left_out) == {2}
    assert [state is before for state in bench.states_on_the_way] == [True] * 3
    assert (outcome.mean("train_loss") is None) == privacy


def test_replies_that_come_in_another_order_than_they_were_asked_for_give_the_same_bits() -> None:
    slow = Simulation(delay_s=10.0)
    (plain, _), (masked, transport) = federation(simulation=slow), federation(SECURE, simulation=slow)
    for round in (1, 2):
        arrived = plain.round(round).clients
        assert sorted(masked.round(round).clients) == sorted(arrived) == [0, 1, 2, 3]
    came = [client for phase, client, _ in transport.seen if phase == "keys"]
    assert came != sorted(came[:4]) * 2
    assert equal(plain, masked)
