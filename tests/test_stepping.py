"""Steps inside the backward pass, and without float32 masters: by hand, bit for bit, and within bounds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from fedcybgd_bench import bench, examples
from model_families import FAMILIES, GROUPED, build
from threads_of import threads
from torch import Tensor, nn
from toy import Bench

import fedtune
from fedtune.config.file import parse_config
from fedtune.core.rounding import stochastically
from fedtune.errors import InputError
from fedtune.federation.compare import Candidate, reference_candidates
from fedtune.measure.memory import MemoryMeter
from fedtune.methods import registry
from fedtune.methods.local_training import train
from fedtune.methods.settings import Training
from fedtune.methods.stepping import Stepper

SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1}
OTHERS = {
    "mixtral": transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=1),
    "tied": transformers.LlamaConfig(**{**GROUPED, "tie_word_embeddings": True}),
}


def trained(
    family: str, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[dict[str, Tensor], list[int]]:
    """The result of one round on three clients, and each client's measured bytes."""
    if family in OTHERS:
        monkeypatch.setitem(FAMILIES, family, OTHERS[family])
    form = {} if method in ("badam", "fedcybgd") else {"trainable": "full"}
    given = {"local_epochs": 2, "batch_size": 2, "lr": 1e-2, **form, **settings}
    config = registry.config_class(method).model_validate(given)
    data = {client: examples(2 + client, client, family) for client in range(1 if method == "badam" else 3)}
    federation = Bench(registry.build(config, 0), build(family, dtype, 3), data)
    federation.round(1)
    _, model = next(iter(federation.method.export(federation.state, federation.model)))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, [entry["peak_bytes"] for entry in federation.memory if entry["where"] == "client"]


@pytest.mark.parametrize(
    ("family", "method", "dtype", "settings"),
    [
        ("llama", "fedavg", torch.float32, {}),
        ("llama", "fedavg", torch.bfloat16, {"weight_decay": 0.1, "gradient_checkpointing": "full"}),
        ("gpt2", "fedavg", torch.float32, {"proximal": 0.5, "gradient_checkpointing": 2}),  # with dropout
        ("tied", "fedavg", torch.bfloat16, {"proximal": 0.5}),
        ("mixtral", "fedavg", torch.float32, {}),  # experts that no token of a batch reaches
        ("llama", "fedavg", torch.bfloat16, {**SGD, "control_variates": True}),
        ("llama", "fedavg", torch.float32, {"optimizer": "adamw-8bit"}),
        ("llama", "fedavg", torch.bfloat16, {"masters": "kahan"}),
        ("llama", "fedavg", torch.bfloat16, {"masters": "stochastic", "optimizer": "adamw-8bit"}),
        ("llama", "fedcybgd", torch.bfloat16, {}),
        ("llama", "fedcybgd", torch.bfloat16, {"masters": "stochastic"}),
        ("llama", "badam", torch.bfloat16, {"masters": "kahan", "switch_interval": 1}),
        ("llama", "centralized", torch.float32, {**SGD, "momentum": 0.9}),
    ],
)
def test_a_step_inside_the_backward_pass_has_the_bits_of_one_behind_it(
    family: str, method: str, dtype: torch.dtype, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    behind, more = trained(family, method, dtype, monkeypatch, **settings)
    inside, less = trained(family, method, dtype, monkeypatch, optimizer_in_backward=True, **settings)
    assert all(torch.equal(inside[name], weight) for name, weight in behind.items())
    assert all(a < b for a, b in zip(less, more, strict=True))
    start = build(family, dtype, 3)
    assert sum(not torch.equal(p.detach(), inside[n]) for n, p in start.named_parameters()) > 5


def test_factors_too_have_the_bits_of_a_step_behind_the_backward_pass() -> None:
    results = []
    for inside in (False, True):
        config = registry.config_class("fedavg").model_validate(
            {"lora": {"rank": 2}, "local_steps": 3, "batch_size": 2, "optimizer_in_backward": inside}
        )
        federation = Bench(registry.build(config, 0), build("llama", torch.bfloat16), {0: examples(4, 0)})
        federation.round(1)
        results.append(federation.state.weights)
    assert all(torch.equal(results[0][name], weight) for name, weight in results[1].items())


def steps(weights: Tensor, gradients: list[Tensor], **settings: Any) -> Tensor:
    """What plain steps with these gradients make of weights, float32."""
    parameter = nn.Parameter(weights.clone())
    stepper = Stepper({"w": parameter}, Training.model_validate({**SGD, **settings}), seed=3)
    for gradient in gradients:
        with stepper.arriving(settings.get("lr", SGD["lr"])):
            parameter.grad = gradient.to(parameter.dtype)
        stepper.step()
        assert parameter.grad is None
    if settings.get("masters") != "kahan":  # its remainder, rounded, may be half a step
        assert torch.equal(parameter.detach(), stepper.weights["w"].to(parameter.dtype))
    return stepper.weights["w"]


def test_kahan_by_hand() -> None:
    """Steps of −2⁻¹⁰ from 1, below which bfloat16 numbers are 2⁻⁸ apart: alone each would be lost."""
    parameter, lost = nn.Parameter(torch.ones(1, dtype=torch.bfloat16)), torch.ones(1, dtype=torch.bfloat16)
    stepper = Stepper({"w": parameter}, Training.model_validate({**SGD, "masters": "kahan"}))
    (remainders,) = [r["optimizer"] for r in stepper.resident() if isinstance(r, dict) and "optimizer" in r]
    seen = []
    for _ in range(4):
        with stepper.arriving(2.0**-10):
            parameter.grad = torch.ones_like(parameter)
        stepper.step()
        lost -= 2.0**-10
        seen.append((float(parameter.detach()) * 1024 - 1024, float(remainders["w"]) * 1024))
        assert float(stepper.weights["w"]) == 1 - len(seen) / 1024
    assert seen == [(0, -1), (0, -2), (-4, 1), (-4, 0)]  # halfway it is the even one of two, which is 1
    assert float(lost) == 1
    assert remainders["w"].dtype == torch.bfloat16


def test_kahan_stays_within_its_bound_of_float32_masters() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(500, generator=generator).bfloat16()
    gradients = [torch.randn(500, generator=generator).bfloat16() for _ in range(200)]
    masters = steps(start, gradients, lr=1e-4)
    kahan = steps(start, gradients, lr=1e-4, masters="kahan")
    largest = torch.maximum(start.float().abs(), masters.abs()) + 200 * 1e-4 * 4
    assert bool(((kahan - masters).abs() <= 200 * 2.0**-16 * largest).all())
    assert float((kahan - masters).abs().max()) < 1e-3 < float((masters - start.float()).abs().max())
    alone = start.clone()  # what is lost without either
    for gradient in gradients:
        alone.sub_(gradient, alpha=1e-4)
    assert float((kahan - masters).norm()) < 0.05 * float((alone.float() - masters).norm())


def test_random_rounding_by_hand_and_in_the_mean() -> None:
    """A quarter of the way from 1 to the next number, 1 + 2⁻⁷, a quarter of 40,000 draws goes up."""
    generator = torch.Generator().manual_seed(0)
    for sign in (1.0, -1.0):
        wide = torch.full((40_000,), sign * (1 + 2.0**-9))
        found = stochastically(wide, torch.bfloat16, generator).float() * sign
        assert set(found.tolist()) == {1.0, 1 + 2.0**-7}
        share = float((found > 1).float().mean())
        assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 40_000) ** 0.5
    numbers = torch.randn(64, generator=generator) * 10 ** torch.linspace(-6, 6, 64)
    draws = torch.stack([stochastically(numbers, torch.bfloat16, generator).double() for _ in range(4000)])
    spacing = 2.0 ** (numbers.abs().log2().floor() - 7)
    assert bool(((draws.mean(0) - numbers).abs() < 5 * 0.5 * spacing / 4000**0.5).all())
    assert bool(((draws - numbers).abs() < spacing).all())
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, float("inf"), -float("inf")])
    assert torch.equal(stochastically(exact, torch.bfloat16, generator).float(), exact)
    assert bool(
        stochastically(torch.tensor([float("nan"), -float("nan")]), torch.bfloat16, generator).isnan().all()
    )
    largest = torch.full((100,), torch.finfo(torch.float32).max)
    assert set(stochastically(largest, torch.bfloat16, generator).tolist()) <= {
        torch.finfo(torch.bfloat16).max,
        float("inf"),
    }


def test_randomly_rounded_steps_are_right_in_the_mean_and_the_same_again() -> None:
    start = torch.ones(20_000, dtype=torch.bfloat16)
    gradients = [torch.ones(20_000) for _ in range(16)]
    found = steps(start, gradients, lr=2.0**-11, masters="stochastic")
    assert float(found.mean()) == pytest.approx(1 - 16 * 2.0**-11, abs=5 * 16**0.5 * 2.0**-9 / 20_000**0.5)
    assert torch.equal(found, steps(start, gradients, lr=2.0**-11, masters="stochastic"))
    parts = [steps(start[:100], [g[:100] for g in gradients], lr=2.0**-11, masters="stochastic")]
    assert torch.equal(parts[0], found[:100])  # a generator's numbers are in their order


@pytest.mark.parametrize("settings", [{}, {"masters": "kahan"}])
def test_clipping_is_of_all_gradients_with_their_terms(settings: dict[str, Any]) -> None:
    """Gradients 3 and 4, with μ (w − start) = 0 and a correction of 0 and 8: norm √(9 + 144), cut to 1."""
    parameters = {n: nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)) for n in ("a", "b")}
    stepper = Stepper(
        parameters,
        Training.model_validate({**SGD, "max_grad_norm": 1.0, **settings}),
        proximal=0.5,
        start={n: torch.zeros(1) for n in parameters},
        correction={"b": torch.full((1,), 8.0)},
    )
    with stepper.arriving(1.0):
        parameters["a"].grad = torch.full((1,), 3.0, dtype=torch.bfloat16)
        parameters["b"].grad = torch.full((1,), 4.0, dtype=torch.bfloat16)
    stepper.step()
    found = [float(stepper.weights[n]) for n in parameters]
    assert found == pytest.approx([-3 / 153**0.5, -12 / 153**0.5], rel=1e-4)


def test_without_masters_clipping_takes_the_steps_of_float32_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step from the same weights only rounding tells them apart."""
    settings: dict[str, Any] = {"local_epochs": None, "local_steps": 1, "max_grad_norm": 0.01, **SGD}
    masters, _ = trained("llama", "fedavg", torch.bfloat16, monkeypatch, **settings)
    kahan, _ = trained("llama", "fedavg", torch.bfloat16, monkeypatch, masters="kahan", **settings)
    for name, weight in masters.items():
        torch.testing.assert_close(kahan[name], weight, rtol=2.0**-7, atol=1e-6)


def test_two_threads_take_the_steps_of_one() -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(100_000, generator=generator).bfloat16()
    gradients = [torch.randn(100_000, generator=generator) for _ in range(3)]
    found = []
    for count in (1, 2):
        with threads(count):
            found.append(
                [
                    steps(start, gradients, optimizer=optimizer, masters=masters)
                    for masters in ("float32", "kahan", "stochastic")
                    for optimizer in ("adamw", "adamw-8bit", "sgd")
                ]
            )
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


ALL = {"optimizer_in_backward": True, "masters": "stochastic", "optimizer": "adamw-8bit"}


def document(name: str, dtype: str, **settings: Any) -> dict[str, Any]:
    return {
        "model": {"dtype": dtype},
        "data": {"max_examples": 8, "max_length": 48, "clients": 2},
        "method": {"name": name, "batch_size": 4, "local_epochs": 2, **settings},
        "evaluation": {"tasks": ["loss"], "every": 0, "max_examples": 2, "bootstrap": 0},
    }


@pytest.mark.parametrize(
    ("name", "dtype", "settings"),
    [
        ("fedavg", "float32", {"trainable": "full", "optimizer_in_backward": True}),
        ("fedavg", "bfloat16", {"trainable": "full", "optimizer_in_backward": True}),
        ("fedavg", "bfloat16", {"trainable": "full", "masters": "kahan"}),
        ("fedavg", "bfloat16", {"trainable": "full", "proximal": 0.1, "optimizer": "adamw-8bit"}),
        ("fedavg", "bfloat16", {"trainable": "full", **ALL}),
        ("fedcybgd", "bfloat16", ALL),
        ("badam", "bfloat16", {**ALL, "switch_interval": 1}),
    ],
)
def test_a_plan_is_what_a_run_measures(
    name: str, dtype: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    rounds = {} if name == "badam" else {"rounds": 1}
    config = document(name, dtype, **settings, **rounds)
    planned = fedtune.plan(config)["client_peak_memory_bytes"]["total"]
    measured = fedtune.run(config, out=tmp_path / "run", progress=False).summary["peak_memory_bytes"]
    assert planned == pytest.approx(measured["client"], rel=0.01)


def test_bytes_a_weight_worked_out_by_hand() -> None:
    """Of 40 x 500 weights in bfloat16 between two steps; moments of 8 bits have 79 scales."""
    known = {}
    for masters in ("float32", "kahan", "stochastic"):
        for optimizer in ("adamw", "adamw-8bit"):
            parameter = nn.Parameter(torch.ones(40, 500, dtype=torch.bfloat16))
            settings = Training.model_validate({"masters": masters, "optimizer": optimizer})
            stepper = Stepper({"w": parameter}, settings)
            with stepper.arriving(1e-3):
                parameter.grad = torch.ones_like(parameter)
            stepper.step()
            meter = MemoryMeter("cpu")
            with meter.whole([{"w": parameter}, *stepper.resident()]):
                pass
            known[masters, optimizer] = meter.peak_bytes
    whole, narrow = 2 * 4 * 20_000 + 4, 2 * (20_000 + 4 * 79) + 4  # two moments, and the count of steps
    own = {"float32": 2 + 4, "kahan": 2 + 2, "stochastic": 2}
    assert known == {
        (masters, optimizer): each * 20_000 + (whole if optimizer == "adamw" else narrow)
        for masters, each in own.items()
        for optimizer in ("adamw", "adamw-8bit")
    }


def test_an_interrupted_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    config = document("fedavg", "bfloat16", trainable="full", rounds=2, local_steps=2, **ALL)
    del config["method"]["local_epochs"]

    def final(folder: Path) -> list[bytes]:
        return [file.read_bytes() for file in sorted((folder / "final").rglob("*.safetensors"))]

    class Interrupts(fedtune.Callback):
        def on_client(self, round: int, client: int, report: Any) -> None:
            if round == 2:
                raise KeyboardInterrupt

    fedtune.run(config, out=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        fedtune.run(config, out=tmp_path / "cut", progress=False, callbacks=[Interrupts()])
    assert final(tmp_path / "cut") == []
    fedtune.open(tmp_path / "cut").resume(progress=False)
    assert final(tmp_path / "whole") == final(tmp_path / "cut") != []


@pytest.mark.parametrize(
    ("name", "model", "settings"),
    [
        ("fedavg", {"dtype": "float32"}, {"trainable": "full"}),
        ("fedavg", {"dtype": "bfloat16"}, {"trainable": "lora"}),
        ("fedcybgd", {"dtype": "bfloat16"}, {"trainable": "adapter"}),
        ("badam", {"dtype": "float32"}, {}),
    ],
)
def test_masters_are_refused_where_there_is_nothing_narrow_to_train(
    name: str, model: dict[str, Any], settings: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=r"method\.masters: kahan is for bfloat16 weights that are trained"):
        parse_config({"model": model, "method": {"name": name, "masters": "kahan", **settings}}, "test")


@pytest.mark.parametrize(("name", "kept"), [("fedcybgd", "float32"), ("fedavg", "kahan")])
def test_references_of_a_comparison_have_masters_where_they_train_lora(name: str, kept: str) -> None:
    form = {"trainable": "full"} if name == "fedavg" else {}
    document = {"model": {"dtype": "bfloat16"}, "method": {"name": name, "masters": "kahan", **form}}
    added = reference_candidates([Candidate("own", parse_config(document, "test"))])
    assert [(c.config.method_name, c.config.method.model_dump()["masters"]) for c in added] == [
        ("standalone", kept),
        ("centralized", kept),
    ]


def test_a_penalty_of_a_method_of_ones_own_is_refused() -> None:
    """Its gradient comes behind that of the loss, when weights have moved."""
    federation = bench()
    env: Any = SimpleNamespace(model=federation.model)
    settings = Training.model_validate({"optimizer_in_backward": True})
    with pytest.raises(InputError, match="adds a penalty to it"):
        train(env, {}, settings, penalty=lambda: torch.zeros(()))


def test_fedcybgd_trains_without_masters_and_close_to_them() -> None:
    ends = []
    for masters in ("float32", "kahan"):
        federation = bench(dtype=torch.bfloat16, masters=masters)
        start = {name: w.float() for name, w in federation.state.weights.items()}
        federation.round(1)
        ends.append({name: w.float() for name, w in federation.state.weights.items()})

    def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return sum(float((one[n] - other[n]).square().sum()) for n in start) ** 0.5

    assert 0 < apart(*ends) < 0.2 * apart(start, ends[0])
