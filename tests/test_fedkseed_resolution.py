"""FedKSeed's ε: slopes of rounded losses, what is said about them, `epsilon: auto`, and float16."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fedkseed_bench import NOISES, altered, replies, text, tiny, toy
from model_families import build
from toy import Bench, Toy, items

from fedtune.config.file import parse_config
from fedtune.core.state import from_payload, to_payload
from fedtune.data.batches import collate
from fedtune.data.encode import encode_causal
from fedtune.data.sources import bundled_examples
from fedtune.errors import FederationError, InputError
from fedtune.methods.fedkseed.infinite_pool import InfinitePool
from fedtune.methods.fedkseed.method import FedKSeed
from fedtune.methods.fedkseed.resolution import correlation, doubt, find, scale_of
from fedtune.methods.fedkseed.settings import Config, ProConfig
from fedtune.methods.fedkseed.settings import InfinitePoolConfig as PoolConfig
from fedtune.methods.fedkseed.state import State
from fedtune.methods.fedkseed.step import step_weights
from fedtune.models.load import load_model
from fedtune.models.tuning import train_all
from fedtune.planning.plan import plan
from fedtune.zeroth import SeedPool

MODELS = Path(__file__).resolve().parents[2] / "shared/models"
SMALL: dict[str, Any] = {"seeds": 16, "local_steps": 3, "lr": 1e-3}


def test_doubt_by_hand() -> None:
    fine, coarse = torch.tensor([1.5, -1.5]).double(), torch.tensor([1.0, -1.0]).double()
    # ν² = 0.25 / 1.25 = 0.2; slopes² = 1 − 0.2 / 4
    assert doubt(fine, coarse) == pytest.approx(math.sqrt(0.2 / 0.95))
    assert doubt(coarse, coarse) == 0.0 and correlation(0.0) == 1.0
    assert correlation(0.75) == pytest.approx(0.8)  # 1 / 1.25
    zeros = torch.zeros(2).double()
    assert doubt(zeros, zeros) == doubt(fine, zeros) == doubt(fine * math.nan, coarse) == math.inf


def rounded(resolution: float, cubic: float = 0.0, draws: int = 4000) -> Any:
    """Slopes g of losses 3 + gε + cubic · ε³ that are rounded to multiples of `resolution`; and g."""
    generator = torch.Generator().manual_seed(0)
    g, offset = (torch.randn(draws, generator=generator).double() for _ in range(2))

    def loss(epsilon: float) -> torch.Tensor:
        exact = 3 + offset + g * epsilon + cubic * epsilon**3
        return (exact / resolution).round() * resolution

    return lambda epsilon: (loss(epsilon) - loss(-epsilon)) / (2 * epsilon), g


@pytest.mark.parametrize("epsilon", [1e-3, 2e-3, 5e-3, 2e-2])
def test_the_correlation_with_exact_slopes_is_foretold(epsilon: float) -> None:
    slopes, g = rounded(2e-3)
    foretold = correlation(doubt(slopes(epsilon), slopes(2 * epsilon)))
    actual = float(torch.corrcoef(torch.stack([slopes(epsilon), g]))[0, 1])
    assert foretold == pytest.approx(actual, abs=0.03)


def test_what_is_found_lies_between_rounding_and_truncation() -> None:
    slopes, g = rounded(2e-3, cubic=50.0)
    found = find(slopes, 1.0)

    def error(epsilon: float) -> float:
        return float((slopes(epsilon) - g).square().mean())

    assert error(found.epsilon) < 0.03 < min(error(found.epsilon / 8), error(found.epsilon * 8))
    assert found.epsilon == float(f"{found.epsilon:.0e}")
    fine, _ = rounded(1e-12, cubic=50.0)  # without rounding the smallest is best
    assert find(fine, 1.0).epsilon < found.epsilon / 4


def measured(path: str, dtype: str, epsilons: list[float], draws: int) -> dict[float, torch.Tensor]:
    """Slopes of a real model on real examples."""
    loaded = load_model(path, dtype=dtype, initial="pretrained", seed=0, base=Path("."))
    model, pool = train_all(loaded.model).eval(), SeedPool(7, 64)
    rows = bundled_examples("train")[:draws]
    encoded = encode_causal(rows, loaded.tokenizer, template="plain", loss_on="response", max_length=32)
    found = {}
    with step_weights(model, pool, torch.zeros(64), 0.0) as weights:
        for e in epsilons:
            pairs = [
                (weights.loss(batch, j, e), weights.loss(batch, j, -e))
                for j, batch in enumerate(collate([item], 0) for item in encoded.items)
            ]
            found[e] = torch.tensor([(a - b) / (2 * e) for a, b in pairs], dtype=torch.float64)
    return found


@pytest.mark.parametrize("name", ["bundled", pytest.param("instruct-7m", marks=pytest.mark.slow)])
def test_on_real_models_too(name: str) -> None:
    path = name if name == "bundled" else str(MODELS / name)
    if name != "bundled" and not Path(path).exists():
        pytest.skip(f"{path} is not there")
    exact = measured(path, "float32", [1e-4], 16)
    got = measured(path, "bfloat16", [5e-4, 1e-3, 2e-3, 4e-3], 16)
    for epsilon in (5e-4, 2e-3):
        actual = float(torch.corrcoef(torch.stack([got[epsilon], exact[1e-4]]))[0, 1])
        assert correlation(doubt(got[epsilon], got[2 * epsilon])) == pytest.approx(actual, abs=0.15)
    assert doubt(got[5e-4], got[1e-3]) > 0.3 > doubt(got[2e-3], got[4e-3])


def bench(dtype: torch.dtype = torch.float32, cls: Any = Config, clients: int = 3, **settings: Any) -> Bench:
    return Bench(FedKSeed(cls(**{**SMALL, **settings}), seed=0), tiny(dtype), text(clients))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_too_small_an_epsilon_is_said_once_with_the_one_to_take(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(dtype, epsilon=1e-5)
    b.round(1)
    b.round(2)
    (warning,) = said(caplog)
    name = str(dtype).removeprefix("torch.")
    assert f"with epsilon 1e-05 and {name} weights" in warning and ", or auto" in warning
    better = float(warning.partition("take method.epsilon=")[2].split()[0])
    assert better > 1e-4
    caplog.clear()
    bench(dtype, epsilon=better).round(1)
    assert said(caplog) == []


def test_the_baselines_say_it_once_too(caplog: pytest.LogCaptureFixture) -> None:
    config = PoolConfig(local_steps=3, epsilon=1e-30)
    b = Bench(InfinitePool(config, seed=0), tiny(), text())
    b.round(1)
    b.round(2)
    (warning,) = said(caplog)
    assert "with epsilon 1e-30 and float32 weights" in warning


def test_in_float32_nothing_is_said_of_the_papers_epsilon(caplog: pytest.LogCaptureFixture) -> None:
    for noise in NOISES:
        bench(noise=noise, epsilon=5e-4).round(1)
    Bench(InfinitePool(PoolConfig(local_steps=3), seed=0), tiny(), text()).round(1)
    assert said(caplog) == []


def test_losses_that_are_equal_and_an_epsilon_that_is_too_large(caplog: pytest.LogCaptureFixture) -> None:
    toy({0: items(3)}, epsilon=1e-30, local_steps=3).round(1)
    (warning,) = said(caplog)
    assert "with epsilon 1e-30 and float32 weights the two losses of a step are equal; take" in warning
    caplog.clear()
    bench(epsilon=0.5).round(1)
    (warning,) = said(caplog)
    assert float(warning.partition("take method.epsilon=")[2].split()[0]) < 0.1


@pytest.mark.parametrize("noise", NOISES)
def test_looking_changes_nothing(noise: str) -> None:
    """A client of a process that has looked sends the bits of one that has not."""
    b = bench(noise=noise, epsilon=1e-9, clients=1)
    start, kept = b.state, replies(b)
    before = {name: p.detach().clone() for name, p in b.model.named_parameters()}
    b.round(1)
    b.state = start
    b.runner.states.clear()
    b.round(1)
    one, two = (reply.payload.tensors for reply in kept)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(p, before[name]) for name, p in b.model.named_parameters())


@pytest.mark.parametrize("cls", [Config, ProConfig])
def test_auto_is_measured_once_and_travels(cls: Any) -> None:
    b, other = bench(cls=cls, epsilon="auto"), bench(cls=cls, epsilon="auto")
    epsilon = b.state.epsilon
    assert 1e-6 < epsilon < 0.1 and other.state.epsilon == epsilon
    plain = bench(cls=cls, epsilon=epsilon)
    for round in (1, 2):
        b.round(round)
        plain.round(round)
    assert torch.equal(b.state.accumulator, plain.state.accumulator)
    assert b.state.epsilon == from_payload(State, to_payload(b.state)).epsilon == epsilon
    down = [
        [entry["payload_bytes"] for entry in each.wire if entry["direction"] == "down"] for each in (b, plain)
    ]
    assert [4 + size for size in down[1]] == down[0]


def test_auto_is_larger_where_less_is_resolved() -> None:
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = train_all(tiny(dtype)).eval()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        found[dtype] = scale_of("auto", model, SeedPool(1, 64))
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert found[torch.float32] < found[torch.float16] <= found[torch.bfloat16]
    assert scale_of(0.125, Toy(), SeedPool(1, 64)) == 0.125


def test_auto_for_a_classifier_and_without_end() -> None:
    method = FedKSeed(Config(**SMALL, epsilon="auto"), seed=0)
    assert 0 < method.init(method.client_model(lambda: build("roberta"))).epsilon < 0.1
    for download in ("steps", "model"):
        settings = {"local_steps": 3, "lr": 1e-3, "download": download}
        b = Bench(InfinitePool(PoolConfig(**settings, epsilon="auto"), seed=0), tiny(), text())
        plain = Bench(InfinitePool(PoolConfig(**settings, epsilon=b.state.epsilon), seed=0), tiny(), text())
        for each in (b, plain):
            each.round(1)
            each.round(2)
        assert b.state.epsilon == plain.state.epsilon
        assert torch.equal(b.state.scalars, plain.state.scalars)
        assert all(torch.equal(w, plain.state.weights[name]) for name, w in b.state.weights.items())


def test_auto_without_a_scale_or_an_order_that_says_it() -> None:
    with pytest.raises(InputError, match=r"method\.epsilon: auto needs a language model; set a number"):
        toy({0: items(3)}, epsilon="auto")
    flat = tiny()
    for parameter in flat.parameters():
        parameter.data.zero_()
    with pytest.raises(InputError, match=r"no scale at which the model, held as float32, has slopes"):
        Bench(FedKSeed(Config(**SMALL, epsilon="auto"), seed=0), flat, text())
    b = bench(epsilon="auto")
    altered(b, 1, lambda order: order.scalars.pop("epsilon"), order=True)
    outcome = b.round(1, quorum=1)
    assert "epsilon is auto here and the order says None" in outcome.left_out[1]


@pytest.mark.parametrize("noise", NOISES)
def test_float16_runs(noise: str) -> None:
    b = bench(torch.float16, noise=noise, epsilon="auto", clip=100.0)
    kept = replies(b)
    outcome = b.round(1)
    assert outcome.clients == [0, 1, 2] and math.isfinite(outcome.mean("train_loss"))
    exact = bench(noise=noise, epsilon=b.state.epsilon)
    wanted = replies(exact)
    exact.round(1)
    one, two = (
        torch.cat([r.payload.tensors["scalars"] for r in sorted(each, key=lambda r: r.client)])
        for each in (kept, wanted)
    )
    assert float(torch.corrcoef(torch.stack([one, two]))[0, 1]) > 0.9


def test_a_plan_has_the_four_bytes_of_an_epsilon_that_travels() -> None:
    def down(name: str, **settings: Any) -> int:
        method = {"name": name, "rounds": 1, "local_steps": 2, **settings}
        dtype = "float32" if name == "infinite-pool" else "float16"
        data = {"clients": 2, "max_examples": 20}
        config = parse_config({"model": {"dtype": dtype}, "data": data, "method": method}, "test")
        return int(plan(config, steps=False).document["payload_bytes"]["down_per_client_round"])

    for name in ("fedkseed", "fedkseed-pro", "infinite-pool"):
        assert down(name, epsilon="auto") == down(name) + 4


def test_float16_that_overflows_is_an_error_of_its_client() -> None:
    method = FedKSeed(Config(**SMALL, epsilon=0.01), seed=0)
    b = Bench(method, Toy(w=300.0, dtype=torch.float16), {0: items(3)})  # (300 − 3)² is over 65,504
    says = r"became inf and inf at step 1; lower method\.lr, or set model\.dtype=bfloat16: float16 ends"
    with pytest.raises(FederationError, match=says):
        b.round(1)


def test_float16_is_for_forward_passes_alone() -> None:
    for name in ("fedkseed", "fedkseed-pro", "zero-shot"):
        document = {"model": {"dtype": "float16"}, "method": {"name": name}}
        assert parse_config(document, "test").model.dtype == "float16"
    for name in ("fedavg", "fedbiot", "fedcybgd", "badam", "standalone", "centralized", "infinite-pool"):
        with pytest.raises(InputError, match=rf"float16 is for .* {name} would lose small gradients"):
            parse_config({"model": {"dtype": "float16"}, "method": {"name": name}}, "test")
    loaded = load_model("bundled", dtype="float16", initial="pretrained", seed=0, base=Path("."))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float16}
