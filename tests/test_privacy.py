"""Differential privacy: the accountant's numbers, exact clipping, noise from no seed, and ε that stays."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import lines, write_config
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st
from protected import federation, kseed
from scipy import stats
from toy import items

from fedtune.config.file import load_config, parse_config
from fedtune.core.client import ClientRunner
from fedtune.core.cohort import QuorumError
from fedtune.errors import InputError
from fedtune.federation import run as runs
from fedtune.federation.progress import Silent
from fedtune.protection.account import PrivacyAccount
from fedtune.protection.noise import add_noise_, clip_, epsilon, poisson_cohort
from fedtune.protection.settings import Privacy, SecureAggregation

UNIT = 2.0**-44  # of FedAvg's sums


# The accountant


def delta_of(epsilon: float, z: float) -> float:
    """δ of one Gaussian sum: Φ(1/2z − εz) − e^ε Φ(−1/2z − εz) (Balle and Wang 2018, Theorem 5)."""
    phi = stats.norm.cdf
    return float(phi(1 / (2 * z) - epsilon * z) - math.exp(epsilon) * phi(-1 / (2 * z) - epsilon * z))


def test_a_known_value() -> None:
    """One sum with noise as large as the clip is (4.377, 10⁻⁵)-private."""
    assert epsilon(1.0, 1, 1e-5) == pytest.approx(4.377178, abs=1e-6)
    assert delta_of(4.377178, 1.0) == pytest.approx(1e-5, rel=1e-5)


@pytest.mark.parametrize(("z", "rounds", "delta"), [(0.5, 1, 1e-3), (1.0, 10, 1e-5), (4.0, 100, 1e-6)])
def test_rounds_compose_as_the_formula_and_the_library_say(z: float, rounds: int, delta: float) -> None:
    ours = epsilon(z, rounds, delta)
    assert delta_of(ours, z / math.sqrt(rounds)) == pytest.approx(delta, rel=1e-6)
    theirs = PLDAccountant(value_discretization_interval=1e-3)
    theirs.compose(GaussianDpEvent(z), rounds)
    assert ours == pytest.approx(theirs.get_epsilon(delta), rel=1e-4)


@pytest.mark.parametrize(("z", "rate", "rounds"), [(1.0, 0.1, 10), (1.0, 0.01, 1000), (0.6, 0.3, 20)])
def test_with_sampling_it_is_the_librarys(z: float, rate: float, rounds: int) -> None:
    ours = epsilon(z, rounds, 1e-5, rate=rate)
    event = PoissonSampledDpEvent(rate, GaussianDpEvent(z))
    tight, loose = PLDAccountant(), RdpAccountant()
    tight.compose(event, rounds), loose.compose(event, rounds)
    assert ours == pytest.approx(tight.get_epsilon(1e-5), rel=2e-4)
    assert ours < loose.get_epsilon(1e-5)
    whole = epsilon(z, rounds, 1e-5)
    assert ours < whole


def test_no_noise_is_no_privacy_and_no_sum_costs_nothing() -> None:
    assert epsilon(0.0, 1, 1e-5) is None
    assert epsilon(1.0, 0, 1e-5) == 0.0


# Clipping and noise


@given(
    numbers=st.lists(st.integers(-(2**61), 2**61), min_size=1, max_size=30),
    bound=st.floats(1.0, 2.0**62),
)
def test_after_clipping_no_norm_is_larger_than_the_clip(numbers: list[int], bound: float) -> None:
    """In whole numbers, so that no rounding hides anything."""
    clipped = clip_(torch.tensor(numbers), bound).tolist()
    assert sum(number**2 for number in clipped) <= int(bound) ** 2 + 2 * int(bound) + 1
    assert math.isqrt(sum(number**2 for number in clipped)) <= bound
    if math.isqrt(sum(number**2 for number in numbers)) + 1 < bound * (1 - 2.0**-19):
        assert clipped == numbers
    largest = max(map(abs, numbers))
    for before, after in zip(numbers, clipped, strict=True):
        assert before * after >= 0
        assert abs(after) <= abs(before)
        if clipped != numbers and largest:  # the direction stays, but for whole numbers
            shrunk = max(map(abs, clipped)) / largest
            assert after == pytest.approx(before * shrunk, abs=2 + 1e-9 * abs(before))


def test_clipping_by_hand() -> None:
    assert clip_(torch.tensor([3000, -4000]), 5001.0).tolist() == [3000, -4000]
    assert clip_(torch.tensor([3000, -4000]), 2500.0).tolist() == [1499, -1999]  # towards zero, just below


@pytest.mark.parametrize("size", [1, 2, 100_001, 3 * 2**18 + 1])
def test_noise_is_gaussian_and_comes_from_no_seed(size: int) -> None:
    torch.manual_seed(0)
    one = add_noise_(torch.zeros(size, dtype=torch.int64), 1e6)
    torch.manual_seed(0)
    other = add_noise_(torch.zeros(size, dtype=torch.int64), 1e6)
    if size < 3:
        assert one.abs().max() < 8.7e6
        return
    assert not torch.equal(one, other)
    for noise in (one, other):
        assert stats.kstest(noise.numpy() / 1e6, "norm").pvalue > 1e-8
    assert stats.kstest((one - other).numpy() / (1e6 * 2**0.5), "norm").pvalue > 1e-8
    together = np.corrcoef(one[:-1:2].numpy(), one[1::2].numpy()[: len(one[:-1:2])])[0, 1]
    assert abs(together) < 6 / (size / 2) ** 0.5


def test_noise_of_no_size_changes_nothing() -> None:
    assert add_noise_(torch.tensor([5, -3]), 0.0).tolist() == [5, -3]


# Rounds


def test_a_round_by_hand() -> None:
    """Updates of 1 and −3 for each of two clients' only weight, clipped to 2: (1 − 2) / 2."""
    bench, _ = federation(None, Privacy(clip=2.0, noise_multiplier=0.0), data={0: items(1), 1: items(1)})
    start = {name: weight.clone() for name, weight in bench.state.weights.items()}
    given_by = {0: 1.0, 1: -3.0}
    step = bench.method.client_step

    def fixed(job: Any, env: Any) -> Any:
        result = step(job, env)
        result.payload.tensors["w"].fill_(given_by[env.client])
        result.payload.tensors["more"].zero_()
        return result

    bench.method.client_step = fixed
    outcome = bench.round(1)
    assert float(bench.state.weights["w"] - start["w"]) == pytest.approx((1 - 2) / 2, abs=1e-5)
    assert torch.equal(bench.state.weights["more"], start["more"])
    assert outcome.mean("train_loss") is None


@pytest.mark.parametrize("method", ["fedavg", "fedkseed"])
def test_who_drops_out_counts_as_zero_and_examples_do_not_weigh(method: str) -> None:
    def build() -> Any:
        return kseed() if method == "fedkseed" else None

    settings = Privacy(clip=1e-3, noise_multiplier=0.0)
    ends = []
    for secure in (None, SecureAggregation()):
        bench, bent = federation(secure, settings, method=build())
        bent.reply = lambda at, client, tensors: "no" if client == 2 and at in ("", "masked") else None
        before = vector_of(bench)
        bench.round(1, quorum=0.5)
        ends.append((vector_of(bench) - before).double())
    plain, masked = ends
    assert torch.equal(plain, masked)  # the same bits, clipped by the server or by clients
    # three of four updates of norm 1e-3 each, summed and divided by four
    assert 0 < float(plain.norm()) <= 3 / 4 * 1e-3 * (1 + 1e-4)


def vector_of(bench: Any) -> torch.Tensor:
    state = bench.state
    tensors = state.weights.values() if hasattr(state, "weights") else [state.accumulator]
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@pytest.mark.parametrize("dropped", [0, 1])
def test_the_noise_of_a_sum_is_as_large_as_said(dropped: int) -> None:
    """Central: z · clip / asked. Under masks: of each of k clients 1/k of the variance, k the fewest."""
    settings, rows = Privacy(clip=0.5, noise_multiplier=2.0), 2000
    for secure, spread in (
        (None, 2.0 * 0.5 / 4),
        (SecureAggregation(), 2.0 * 0.5 / 4 * math.sqrt((4 - dropped) / 3)),
    ):
        bench, bent = federation(secure, settings, rows=rows)
        bent.reply = lambda at, client, tensors: "no" if client < dropped and at in ("", "masked") else None
        step = bench.method.client_step

        def still(job: Any, env: Any, step: Any = step) -> Any:
            result = step(job, env)
            for tensor in result.payload.tensors.values():
                tensor.zero_()
            return result

        bench.method.client_step = still
        before = bench.state.weights["more"].double()
        bench.round(1, quorum=0.5)
        noise = (bench.state.weights["more"].double() - before).reshape(-1).numpy()
        assert stats.kstest(noise / spread, "norm").pvalue > 1e-8
        assert noise.std() == pytest.approx(spread, rel=0.03)


def test_a_client_refuses_to_unmask_a_sum_with_too_little_noise() -> None:
    """Noise was added for at least as many clients as the quorum; a sum of fewer would have less of it."""
    bench, bent = federation(SecureAggregation(), Privacy(clip=1.0, noise_multiplier=1.0))
    bent.order = lambda at, client, tensors: (
        {"survivors": torch.tensor([0, 1, 2])} if at == "unmask" else None
    )
    with pytest.raises(QuorumError, match="0 of 4 clients were there after phase unmask"):
        bench.round(1, quorum=1.0)


def test_bits_must_hold_the_noise() -> None:
    bench, _ = federation(SecureAggregation(bits=40), Privacy(clip=1.0, noise_multiplier=1.0))
    with pytest.raises(QuorumError, match=r"bits=40 it must be below .*; set more bits"):
        bench.round(1, quorum=0.5)


# Sampling


def test_each_client_is_asked_with_the_same_chance_independently() -> None:
    examples = dict.fromkeys(range(40), 1)
    draws = [poisson_cohort(examples, 10, 7, draw) for draw in range(1, 401)]
    counts = np.array([[client in draw.clients for client in examples] for draw in draws])
    assert abs(counts.mean() - 0.25) < 6 * (0.25 * 0.75 / counts.size) ** 0.5
    sizes = counts.sum(axis=1)
    assert sizes.var() == pytest.approx(40 * 0.25 * 0.75, rel=0.3)  # of a fixed size it would be 0
    assert abs(np.corrcoef(counts[:, 0], counts[:, 1])[0, 1]) < 0.25
    assert draws[0].expected == 10
    assert poisson_cohort(examples, 10, 7, 1) == draws[0]
    assert poisson_cohort(examples, 10, 8, 1) != draws[0]


def account(folder: Path, **settings: Any) -> PrivacyAccount:
    defaults = {"per_round": None, "population": 10, "secure": False}
    return PrivacyAccount(
        Privacy(clip=1.0, noise_multiplier=1.0, delta=1e-3), folder, **{**defaults, **settings}
    )


def test_under_masks_the_one_that_took_part_most_often_counts(tmp_path: Path) -> None:
    """The server knows who takes part, so that not being asked hides nobody from it."""
    spending = account(tmp_path, per_round=2, secure=True)
    assert spending.cohort(dict.fromkeys(range(10), 1)) is None
    found = [spending.spend(1, clients)["epsilon"] for clients in ([0, 1], [2, 3], [1, 4])]
    assert found == [epsilon(1.0, count, 1e-3) for count in (1, 1, 2)]


def test_without_masks_sampling_makes_it_smaller(tmp_path: Path) -> None:
    spending = account(tmp_path, per_round=0.2)
    found = [spending.spend(1, clients)["epsilon"] for clients in ([0, 1], [], [1, 4])]
    assert found == [epsilon(1.0, count, 1e-3, rate=0.2) for count in (1, 2, 3)]
    (tmp_path / "other").mkdir()
    everyone = account(tmp_path / "other", per_round=1.0)
    assert everyone.spend(1, [0])["epsilon"] == epsilon(1.0, 1, 1e-3)


def test_whom_a_round_asks_is_not_in_the_configuration(tmp_path: Path) -> None:
    examples = dict.fromkeys(range(10), 1)
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir(), second.mkdir()
    drawn = []
    for folder in (first, first, second):
        (folder / "privacy.jsonl").unlink(missing_ok=True)
        spending = account(folder, per_round=5)
        drawn.append([spending.cohort(examples)])
        for number in range(4):  # used sums move the draw on; before, it is the same again
            assert spending.cohort(examples) == drawn[-1][-1]
            spending.spend(number + 1, [])
            drawn[-1].append(spending.cohort(examples))
    assert drawn[0] == drawn[1]  # continued
    assert drawn[0] != drawn[2]  # another run
    secret = first / "sampling.secret"
    assert secret.stat().st_mode & 0o077 == 0 and len(bytes.fromhex(secret.read_text())) == 16


@pytest.mark.parametrize("secure", [False, True])
def test_what_was_spent_stays_spent(secure: bool, tmp_path: Path) -> None:
    first = account(tmp_path, secure=secure)
    for number in (1, 2, 3):
        first.spend(number, [0, 1])
    assert not first.ahead
    again = account(tmp_path, secure=secure, done=2)  # the checkpoint of round 3 is gone
    assert again.ahead
    assert again.spend(3, [0, 1])["epsilon"] == epsilon(1.0, 4, 1e-3)
    assert account(tmp_path, secure=secure, done=3).spent() == again.spent()
    # a line that was not whole when the power went: nobody has seen that sum
    path = tmp_path / "privacy.jsonl"
    path.write_text(path.read_text() + '{"round": 4, "cli')
    assert account(tmp_path, secure=secure, done=3).spent() == again.spent()
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("text", "done", "says"),
    [
        (None, 1, "has no entry of round 1"),
        ('{"round": 1, "clients": [0]}\n{"round": 3, "clients": [0]}\n', 3, "has no entry of round 2"),
        ('{"round": 1}\n', 0, "is damaged"),
        ("[]\n", 0, "is damaged"),
        ('{"round": 1, "clients": [0]}\nx\n{"round": 2, "clients": [0]}\n', 2, "is damaged"),
        ('{"round": "1", "clients": [0]}\n', 0, "must be whole numbers"),
    ],
)
def test_a_run_without_its_account_does_not_go_on(
    text: str | None, done: int, says: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "privacy.jsonl").write_text(text)
    with pytest.raises(InputError, match=says):
        account(tmp_path, done=done)
    assert text is None or (tmp_path / "privacy.jsonl").read_text() == text


def test_a_clip_whose_noise_does_not_fit_64_bits_is_refused() -> None:
    # 2^62 units of 2^-44 are 2^18; with ten times (1 + 9 z), z = 1, that is 26,214.4
    def privacy(clip: float) -> dict[str, Any]:
        return config(federation={"privacy": {"clip": clip, "noise_multiplier": 1.0, "delta": 1e-3}})

    parse_config(privacy(26_214), "c")
    with pytest.raises(InputError, match=r"the clip must be below 2\.621e\+04"):
        parse_config(privacy(26_215), "c")
    fedkseed = {"name": "fedkseed", "rounds": 1, "local_steps": 1, "seeds": 4}
    with pytest.raises(InputError, match="64-bit numbers do not hold"):
        parse_config(privacy(1e12) | {"method": fedkseed}, "c")


# Whole runs


def config(**changes: Any) -> dict[str, Any]:
    federation = {"privacy": {"clip": 0.1, "noise_multiplier": 1.0, "delta": 1e-3}}
    return {
        "data": {"clients": 4, "max_examples": 16, "max_length": 48},
        "method": {
            "name": "fedavg",
            "rounds": 3,
            "local_steps": 1,
            "batch_size": 2,
            "lr": 0.01,
            "lora": {"rank": 1, "targets": ["q_proj"]},
        },
        "evaluation": {"tasks": ["loss"], "max_examples": 2, "every": 0, "bootstrap": 0},
        "federation": federation | changes.pop("federation", {}),
        "checkpoints": {"keep": None},
        **changes,
    }


def epsilons(run: Path) -> list[float]:
    return [entry["privacy"]["epsilon"] for entry in lines(run / "rounds.jsonl") if "privacy" in entry]


def test_epsilon_is_in_every_round_and_goes_on_after_a_kill_and_a_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path / "c.yaml", config(federation={"simulate": {"dropout": 0.2}, "quorum": 1}))
    settings, calls = load_config(tmp_path / "c.yaml"), 0
    handle = ClientRunner.handle

    def killed(self: Any, client: int, frame: bytes) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return handle(self, client, frame)

    monkeypatch.setattr(ClientRunner, "handle", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.run(settings, tmp_path / "run", Silent())
    summary = runs.run(settings, tmp_path / "run", Silent(), resume=True)
    wanted = [epsilon(1.0, rounds, 1e-3) for rounds in (1, 2, 3)]
    assert epsilons(tmp_path / "run") == wanted
    assert summary["privacy"] == {"epsilon": wanted[-1], "delta": 1e-3}
    assert json.loads((tmp_path / "run/summary.json").read_text())["privacy"] == summary["privacy"]
    assert all(entry["train_loss"] is None for entry in lines(tmp_path / "run/rounds.jsonl"))
    assert any(entry.get("left_out") for entry in lines(tmp_path / "run/rounds.jsonl"))
    back = load_config(tmp_path / "c.yaml", ["checkpoints.rollback=1"])
    again = runs.run(back, tmp_path / "run", Silent(), resume=True)
    assert epsilons(tmp_path / "run") == [wanted[0], *(epsilon(1.0, rounds, 1e-3) for rounds in (4, 5))]
    assert again["privacy"]["epsilon"] == epsilon(1.0, 5, 1e-3)  # two rounds were thrown away, not given back


def test_a_round_whose_checkpoint_was_lost_is_spent_twice(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", config())
    settings, run = load_config(tmp_path / "c.yaml"), tmp_path / "run"
    runs.run(settings, run, Silent())
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints/round-0003")
    summary = runs.run(settings, run, Silent(), resume=True)
    assert epsilons(run) == [epsilon(1.0, count, 1e-3) for count in (1, 2, 4)]
    assert summary["privacy"]["epsilon"] == epsilon(1.0, 4, 1e-3)
    (run / "summary.json").unlink()
    (run / "privacy.jsonl").unlink()
    with pytest.raises(InputError, match=r"privacy\.jsonl has no entry of round 1"):
        runs.run(settings, run, Silent(), resume=True)


def test_both_settings_with_sampling_and_drop_out(tmp_path: Path) -> None:
    both = {"secure_aggregation": {}, "clients_per_round": 3, "simulate": {"dropout": 0.1}, "quorum": 1}
    summary = runs.run(parse_config(config(federation=both, seed=1), "test"), tmp_path / "run", Silent())
    entries = [entry for entry in lines(tmp_path / "run/rounds.jsonl") if entry["round"]]
    taken: list[int] = []
    for entry in entries:
        taken += entry["clients"]
        often = max(taken.count(client) for client in taken)
        assert entry["privacy"] == {"epsilon": epsilon(1.0, often, 1e-3), "delta": 1e-3}
    assert summary["privacy"] == entries[-1]["privacy"]
    assert not (tmp_path / "run/sampling.secret").exists()


def test_a_run_whose_chance_asks_few_goes_through(tmp_path: Path) -> None:
    """One of four on average: some rounds ask nobody, and have their noise all the same."""
    document = config(federation={"clients_per_round": 1, "quorum": 1.0})
    summary = runs.run(parse_config(document, "test"), tmp_path / "run", Silent())
    assert summary["status"] == "done"
    assert epsilons(tmp_path / "run") == [epsilon(1.0, rounds, 1e-3, rate=0.25) for rounds in (1, 2, 3)]


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"federation": {"privacy": {"clip": 1.0, "noise_multiplier": 1.0, "delta": 0.25}}}, "below 0.25"),
        (
            {"federation": {"privacy": {"clip": 0.0, "noise_multiplier": 1.0}}},
            "privacy.clip: .*greater than 0",
        ),
        ({"federation": {"privacy": {"clip": 1.0}}}, "privacy.noise_multiplier is missing"),
        (
            {"method": {"name": "fedavg", "control_variates": True, "optimizer": "sgd"}},
            "control_variates are a second update",
        ),
    ],
)
def test_settings_that_make_no_sense(document: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        runs.run(parse_config(config(**document), "test"), tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


def test_a_clip_too_large_for_the_masked_numbers_is_refused_whatever_the_update() -> None:
    """Without noise the largest number is the clip: a quarter of 2^44 units, where 40 bits hold 2^37."""
    bench, _ = federation(SecureAggregation(bits=40), Privacy(clip=1.0, noise_multiplier=0.0, delta=1e-3))
    with pytest.raises(QuorumError, match=r"bits=40 it must be below .*; set more bits"):
        bench.round(1, quorum=0.5)
    bench, _ = federation(SecureAggregation(bits=64), Privacy(clip=1.0, noise_multiplier=0.0, delta=1e-3))
    assert bench.round(1, quorum=0.5).left_out == {}
