"""Robust means: numbers worked out by hand, and each rule against plain numpy over random updates."""

from __future__ import annotations

from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy import Bench, Toy, items

from fedtune.core import robust as rules
from fedtune.core.cohort import Cohort, QuorumError, weights_of
from fedtune.core.gathered import InMemory, OnDisk
from fedtune.core.robust import RobustMean, Updates
from fedtune.core.types import Payload, Reply
from fedtune.methods.fedavg import lora_aggregation as lora
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.protection.robust import Robust
from fedtune.protection.robust_mean import robust_mean

SGD = {"trainable": "full", "optimizer": "sgd", "lr": 0.5, "lr_schedule": "constant", "batch_size": 8}


def bench(data: dict[int, Any], robust: dict[str, Any], folder: Path | None = None, **of: Any) -> Bench:
    """Clients of the toy model: an update of one step is half of y - 1, y the client's one value."""
    method = FedAvg(Config(**{**SGD, **of}), seed=0)
    return Bench(method, Toy(), data, robust=robust_mean(Robust(**robust), method, folder))


def moved(robust: dict[str, Any], *values: int, folder: Path | None = None, **of: Any) -> float:
    """Where the weight ends that began at 1, when clients with these values train one step."""
    made = bench({client: items(value) for client, value in enumerate(values)}, robust, folder, **of)
    made.round(1, quorum=1)
    return float(made.state.weights["w"])


def test_median_by_hand(tmp_path: Path) -> None:
    # updates (y - 1) / 2: 1, 2, 49.5
    assert moved({"mean": "median"}, 3, 5, 100) == 1 + 2
    # of 1, 2, 3, 49.5 the mean of the middle two
    assert moved({"mean": "median"}, 3, 7, 5, 100) == 1 + 2.5
    assert moved({"mean": "median"}, 5, 5, 5, 100, 100) == 1 + 2  # ties
    assert moved({"mean": "median"}, 7) == 1 + 3  # one client: its own
    assert moved({"mean": "median"}, 3, 5, 100, folder=tmp_path) == 3
    assert list(tmp_path.iterdir()) == []


def test_median_does_not_weigh_and_the_weighted_mean_does() -> None:
    data = {0: items(3), 1: items(5), 2: items(*[101] * 50)}
    median = bench(data, {"mean": "median"})
    median.round(1)
    assert float(median.state.weights["w"]) == 1 + 2
    # bounded to norm 2, updates are 1, 2, 2 with weights 1, 1, 50
    weighted = bench(data, {"max_norm": 2.0})
    weighted.round(1)
    assert float(weighted.state.weights["w"]) == pytest.approx(1 + (1 + 2 + 50 * 2) / 52, abs=1e-5)


def test_trimmed_mean_by_hand() -> None:
    # updates 1, 2, 3, 4, -50, 99.5: one left out at each end
    values = (3, 5, 7, 9, -99, 200)
    assert moved({"mean": "trimmed-mean", "trim": 0.2}, *values) == 1 + (1 + 2 + 3 + 4) / 4
    # ⌊0.34 · 6⌋ = 2 at each end
    assert moved({"mean": "trimmed-mean", "trim": 0.34}, *values) == 1 + (2 + 3) / 2
    # five equal ones, of which two are left out
    assert moved({"mean": "trimmed-mean", "trim": 0.2}, 5, 5, 5, 5, 5) == 1 + 2


def test_krum_by_hand() -> None:
    # updates 0, 1, 1.5, 4, 50; f = 1: each is scored by its 5 - 1 - 2 = 2 nearest
    # 0: 1 + 2.25; 1: 0.25 + 1; 1.5: 0.25 + 2.25; 4: 6.25 + 9; 50: …  → 1
    values = (1, 3, 4, 9, 101)
    assert moved({"mean": "krum"}, *values) == 1 + 1
    assert moved({"mean": "krum", "keep": 3}, *values) == pytest.approx(1 + (1 + 1.5 + 0) / 3, abs=1e-7)
    # f = 0: the 3 nearest. 0: 1 + 2.25 + 16; 1: 0.25 + 1 + 9; 1.5: 0.25 + 2.25 + 6.25  → 1.5
    assert moved({"mean": "krum", "byzantine": 0}, *values) == 1 + 1.5
    # of equal scores the client that comes first: -1, 0 | 0.5, 1.5 is symmetric
    assert moved({"mean": "krum", "byzantine": 0}, -1, 1, 2, 4) == 1 + 0


def test_krum_by_inner_products_is_that_by_differences() -> None:
    """Far from the origin a distance is a small difference of large products; 0 is far off."""
    cohort = {k: {"w": torch.tensor([value])} for k, value in enumerate((100.0, 101.0, 101.5, 103.0, 0.0))}
    products = Updates(inner=lambda one, other: float(one["w"] @ other["w"]))
    for updates in (Updates(), products):
        made = RobustMean(updates, InMemory, "krum")(_reply(c, t, 5) for c, t in cohort.items())
        assert {reply.client: reply.examples for reply in made} == {0: 0, 1: 1, 2: 0, 3: 0, 4: 0}


def test_norm_bounds_by_hand() -> None:
    # |updates| 1, 2, 3, 49.5; 0.5 of four: the second, 2
    assert moved({"norm_quantile": 0.5}, 3, 5, -5, 100) == pytest.approx(1 + (1 + 2 - 2 + 2) / 4, abs=1e-5)
    # 0.75: the third
    assert moved({"norm_quantile": 0.75}, 3, 5, -5, 100) == pytest.approx(1 + (1 + 2 - 3 + 3) / 4, abs=1e-5)
    assert moved({"norm_quantile": 1.0}, 3, 5, -5, 100) == 1 + (1 + 2 - 3 + 49.5) / 4
    # the bound is of the whole update, and holds
    update = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    made = RobustMean(Updates(), InMemory, max_norm=1.0).bounded(Payload(update)).tensors
    torch.testing.assert_close(made["a"], torch.tensor([0.6, 0.0]), atol=1e-5, rtol=0)
    assert np.hypot(float(made["a"][0]), float(made["b"])) <= 1.0
    assert RobustMean(Updates(), InMemory, max_norm=5.0).bounded(Payload(update)).tensors == update
    # with a mean on top: bounded to 2 and then the median of 1, 2, 2
    assert moved({"mean": "median", "max_norm": 2.0}, 3, 51, 100) == pytest.approx(1 + 2, abs=1e-5)


def test_a_bound_holds_one_reply_at_a_time_and_the_rest_need_all() -> None:
    assert not robust_mean(Robust(max_norm=1.0), FedAvg(Config(), 0), None).gathers
    pulled: list[int] = []

    def replies() -> Any:
        for client in (0, 1):
            pulled.append(client)
            yield _reply(client, {"w": torch.ones(1)}, 2)

    bounded = iter(RobustMean(Updates(), InMemory, max_norm=0.5)(replies()))
    next(bounded)
    assert pulled == [0]
    next(iter(RobustMean(Updates(), InMemory, norm_quantile=0.5)(replies())))
    assert pulled == [0, 0, 1]


def _reply(client: int, tensors: dict[str, Tensor], clients: int) -> Reply:
    everyone = {c: 2 + c for c in range(clients)}
    return Reply(client, Payload(tensors), {}, Cohort(tuple(everyone), everyone, clients))


def _weighted(replies: Any) -> dict[str, np.ndarray]:
    """What any server's mean makes of replies, in float64."""
    got = list(replies)
    total = sum(reply.examples for reply in got)
    return {
        name: sum(r.payload.tensors[name].double().numpy() * (r.examples / total) for r in got)
        for name in got[0].payload.tensors
    }


@st.composite
def _cohorts(draw: Any) -> dict[int, dict[str, Tensor]]:
    """Updates of some clients: two tensors, some numbers equal, one client far out."""
    n = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rough = draw(st.booleans())
    made = {}
    for client in draw(st.permutations(range(n))):
        scale = 1000.0 if client == n - 1 and draw(st.booleans()) else 1.0
        values = rng.normal(size=13) * scale
        values = np.round(values) if rough else values  # ties
        flat = torch.tensor(values, dtype=torch.float32)
        made[client] = {"b": flat[:10].reshape(2, 5), "a": flat[10:]}
    return made


RULES = st.sampled_from(["weighted", "median", "trimmed-mean", "krum"])
BOUNDS = st.sampled_from([{}, {"max_norm": 2.5}, {"norm_quantile": 0.4}])


@given(_cohorts(), RULES, BOUNDS, st.floats(0.05, 0.45), st.booleans())
@settings(max_examples=150)
def test_each_rule_is_what_numpy_makes_of_the_same_updates(
    cohort: dict[int, dict[str, Tensor]], mean: Any, bound: Any, trim: float, on_disk: bool
) -> None:
    n = len(cohort)
    keep = 1 + n // 4
    made = RobustMean(
        Updates(),
        (lambda: OnDisk(Path(gettempdir()))) if on_disk else InMemory,
        mean,
        trim=trim,
        keep=keep,
        **bound,
    )
    found = _weighted(made(_reply(client, tensors, n) for client, tensors in cohort.items()))
    rows = np.stack([_flat(cohort[client]) for client in range(n)]).astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    limit = bound.get("max_norm", np.inf)
    if "norm_quantile" in bound:
        limit = np.quantile(norms, 0.4, method="inverted_cdf")
    rows *= np.minimum(1, limit / np.maximum(norms, 1e-30))[:, None]
    if mean == "weighted":
        wanted = np.average(rows, axis=0, weights=2 + np.arange(n))
    elif mean == "median":
        wanted = np.median(rows, axis=0)
    elif mean == "trimmed-mean":
        cut = int(trim * n)
        wanted = np.sort(rows, axis=0)[cut : n - cut].mean(axis=0)
    else:
        f = max(0, (n - 3) // 2)
        distance = ((rows[:, None] - rows[None]) ** 2).sum(-1)
        scores = [np.sort(np.delete(row, i))[: max(0, n - f - 2)].sum() for i, row in enumerate(distance)]
        order = np.argsort(scores, kind="stable")
        close = np.diff(np.sort(scores))
        if len(close) and (close < 1e-3 * (1 + max(scores))).any():
            return  # the order of nearly equal scores hangs on rounding
        wanted = rows[order[:keep]].mean(axis=0)
    scale = 1 + np.abs(rows).max()
    np.testing.assert_allclose(_flat(found), wanted, atol=4e-6 * scale, rtol=0)


def _flat(tensors: Any) -> np.ndarray:
    return np.concatenate([np.asarray(tensors[name]).reshape(-1) for name in sorted(tensors)])


@given(_cohorts(), RULES, BOUNDS, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_the_order_of_arrival_changes_no_bit(
    cohort: dict[int, dict[str, Tensor]], mean: Any, bound: Any, random: Any
) -> None:
    arrived = list(cohort)
    random.shuffle(arrived)
    made = RobustMean(Updates(), InMemory, mean, trim=0.3, **bound)
    first, second = (
        {r.client: (r.payload.tensors, r.examples) for r in made(_reply(c, cohort[c], 9) for c in order)}
        for order in (cohort, arrived)
    )
    for client, (tensors, weight) in first.items():
        assert weight == second[client][1]
        assert all(torch.equal(tensors[name], second[client][0][name]) for name in tensors)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    cohort = {c: {"w": torch.randn(7, 11, generator=generator)} for c in range(6)}
    for mean in ("median", "trimmed-mean", "krum"):
        made = RobustMean(Updates(), lambda: OnDisk(tmp_path), mean, trim=0.2)
        whole = _weighted(made(_reply(c, t, 6) for c, t in cohort.items()))
        monkeypatch.setattr(rules, "PIECE", 6 * 10)
        pieces = _weighted(made(_reply(c, t, 6) for c, t in cohort.items()))
        monkeypatch.undo()
        assert np.array_equal(whole["w"], pieces["w"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_gathered_on_disk_is_what_came(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "b": torch.randn(3, 4).to(dtype),
        "a": torch.zeros(0, 5, dtype=dtype),
        "c": torch.tensor(2.5, dtype=dtype),
        "d": torch.randn(4, 6).to(dtype).T,  # not contiguous
    }
    with OnDisk(tmp_path) as disk:
        for client in (1, 0):
            disk.put(_reply(client, tensors, 2))
        assert list(disk.replies()) == [0, 1]
        for client in (0, 1):
            whole = disk.whole(client)
            assert {n: (t.dtype, t.shape) for n, t in whole.items()} == {
                n: (t.dtype, t.shape) for n, t in tensors.items()
            }
            assert all(torch.equal(whole[name], tensors[name]) for name in tensors)
            assert torch.equal(disk.read(client, "b", 5, 9), tensors["b"].reshape(-1)[5:9])
        assert disk.whole(0, without=["a", "b", "c"]).keys() == {"d"}
    assert list(tmp_path.iterdir()) == []


def test_clients_that_are_absent_or_nan_have_no_voice() -> None:
    class Nan(Toy):
        def forward(self, input_ids: Tensor, **rest: Tensor) -> Any:
            out = super().forward(input_ids, **rest)
            out.loss = out.loss * torch.where(input_ids[:, 0] == 13, float("nan"), 1.0).sum()
            return out

    method = FedAvg(Config(**SGD), seed=0)
    median = robust_mean(Robust(mean="median"), method, None)
    made = Bench(method, Nan(), {0: items(3), 1: items(13), 2: items(7), 3: items(9)}, robust=median)
    outcome = made.round(1, quorum=3)
    assert sorted(outcome.clients) == [0, 2, 3] and list(outcome.left_out) == [1]
    assert float(made.state.weights["w"]) == 1 + 3  # of 1, 3, 4
    before = made.state
    with pytest.raises(QuorumError, match="the quorum is 4"):
        made.round(2, quorum=4)
    assert made.state is before


def test_momentum_and_scaffold_take_the_robust_mean() -> None:
    of = {"server_optimizer": {"name": "momentum", "momentum": 0.5}}
    made = bench({0: items(3), 1: items(3), 2: items(99)}, {"mean": "median"}, **of)
    made.round(1)
    assert float(made.state.weights["w"]) == 2.0
    made.round(2)
    assert float(made.state.weights["w"]) == 3.0  # Δ = 0.5, m = 0.5 · 1 + 0.5
    values = {0: items(3), 1: items(5), 2: items(99)}
    scaffold = bench(values, {"mean": "median"}, control_variates=True, lr=0.25)
    scaffold.round(1)
    # Δ: 0.5, 1, 24.5; c_i: -2, -4, -98: the medians, each of its own
    assert float(scaffold.state.weights["w"]) == 2.0
    assert float(scaffold.state.control["w"]) == pytest.approx(-4.0, abs=1e-9)
    few = bench({**values, 3: items(7)}, {"mean": "median"}, control_variates=True, lr=0.25)
    few.round(1, per_round=3)
    asked = sorted((-2.0, -4.0, -98.0, -6.0)[c] for c in few.runner.states)
    assert float(few.state.control["w"]) == pytest.approx(asked[1] * 3 / 4, abs=1e-9)  # three of four moved c
    bounded = bench(values, {"norm_quantile": 0.5}, control_variates=True, lr=0.25)
    bounded.round(1)
    assert float(bounded.state.weights["w"]) == pytest.approx(1 + (0.5 + 1 + 1) / 3, abs=1e-5)
    assert float(bounded.state.control["w"]) == pytest.approx(-(2 + 4 + 4) / 3, abs=1e-4)


def _factors(generator: torch.Generator, rank: int) -> dict[str, Tensor]:
    return {
        "q" + lora.A: torch.randn(rank, 5, generator=generator),
        "q" + lora.B: torch.randn(4, rank, generator=generator),
        "score.weight": torch.randn(2, 3, generator=generator),
    }


def test_stacked_factors_are_measured_and_bounded_by_their_product() -> None:
    generator = torch.Generator().manual_seed(1)
    method = FedAvg(Config(aggregation="stack", lora={"rank": 2, "alpha": 6.0}), 0)
    cohort = {c: _factors(generator, rank) for c, rank in enumerate([2, 2, 1, 2, 2])}
    scale = 6.0 / 2

    def dense(t: dict[str, Tensor]) -> np.ndarray:
        product = scale * t["q" + lora.B].double().numpy() @ t["q" + lora.A].double().numpy()
        return np.concatenate([product.reshape(-1), t["score.weight"].double().numpy().reshape(-1)])

    for tensors in cohort.values():
        assert method.updates().norms(tensors)["update"] == pytest.approx(np.linalg.norm(dense(tensors)))
        bounded = RobustMean(method.updates(), InMemory, max_norm=0.5).bounded(Payload(tensors)).tensors
        assert torch.equal(bounded["q" + lora.A], tensors["q" + lora.A])
        np.testing.assert_allclose(
            dense(bounded), dense(tensors) * 0.5 / np.linalg.norm(dense(tensors)), atol=1e-5
        )
    rows = np.stack([dense(cohort[c]) for c in range(5)])
    distance = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    best = int(np.argmin([np.sort(np.delete(row, i))[:2].sum() for i, row in enumerate(distance)]))
    chosen = {
        r.client: r.examples
        for r in RobustMean(method.updates(), InMemory, "krum")(_reply(c, t, 5) for c, t in cohort.items())
    }
    assert chosen == {c: int(c == best) for c in range(5)}


def test_weights_of_clients_by_hand() -> None:
    registered = {0: 24, 1: 30, 2: 10**9, 3: 0}
    assert weights_of(registered, "examples", None) == registered
    assert weights_of(registered, "examples", 50) == {0: 24, 1: 30, 2: 50, 3: 0}
    assert weights_of(registered, "equal", None) == {0: 1, 1: 1, 2: 1, 3: 0}
    # 0, 24, 30, 10⁹: of an even count the lower middle one
    assert weights_of(registered, "capped", None) == {0: 24, 1: 24, 2: 24, 3: 0}
    assert weights_of({0: 24, 1: 30, 2: 10**9}, "capped", None) == {0: 24, 1: 30, 2: 30}
    assert weights_of({0: 24, 1: 30, 2: 10**9}, "capped", 25) == {0: 24, 1: 25, 2: 25}
    assert weights_of({}, "capped", None) == {}
