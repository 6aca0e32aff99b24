"""The one-shot theory's quantities: by hand, against a reference that keeps everything, and against runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import build
from theory_reference import Plain
from torch import Tensor, nn
from toy import Bench, Toy

from fedtune.data.encoded import Encoded
from fedtune.errors import InputError
from fedtune.measure.memory import MemoryMeter
from fedtune.methods import registry
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.models.tuning import trainable
from fedtune.theory.one_shot import measure
from fedtune.theory.quantities import Measured, schemes

CPU = torch.device("cpu")
SGD = {"trainable": "full", "optimizer": "sgd", "lr": 0.5, "lr_schedule": "constant", "batch_size": 8}


class Quadratic(nn.Module):
    """loss = mean over examples of h (w - y)²/2; y and h are the example's two tokens."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w]))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(input_ids[:, 1] * (self.w - input_ids[:, 0]).square()).mean() / 2)


def client(y: int, h: int, examples: int = 1) -> list[Encoded]:
    return [Encoded((y, h), (y, h))] * examples


def measured(config: Config, model: nn.Module, data: Any, **more: Any) -> Measured:
    return measure(config, model, data, pad_id=0, seed=0, device=CPU, **more)


def watch(model: nn.Module) -> tuple[float, ...]:
    return tuple(float(x) for p in trainable(model).values() for x in p.detach().flatten())


def tokens(clients: int, seed: int = 0) -> dict[int, list[Encoded]]:
    generator = torch.Generator().manual_seed(seed)
    data = {}
    for number in range(clients):
        rows = torch.randint(4, 60, (3 + 2 * number, 6), generator=generator).tolist()
        data[number] = [Encoded(tuple(row), tuple(row)) for row in rows]
    return data


def test_two_rounds_of_one_step_by_hand() -> None:
    # rate 1/2 from w = 4. Client 0 has h = 1 and halves w, client 1 has h = 2 and goes to 0.
    # Multi-round: 4 → (2 + 0)/2 = 1 → (1/2 + 0)/2 = 1/4. One-shot: 4 → 2 → 1 and 4 → 0 → 0, mean 1/2.
    m = measured(
        Config(**SGD, rounds=2, local_steps=1),
        Quadratic(4.0),
        {0: client(0, 1), 1: client(0, 2)},
        watch=watch,
        smoothness_batches=2,
    )
    assert m.start == (4.0,)
    assert [(e.round, e.multi_round, e.one_shot) for e in m.ends] == [
        (1, (1.0,), (1.0,)),
        (2, (0.25,), (0.5,)),
    ]
    assert [(e.distance, e.moved) for e in m.ends] == [(0.0, 3.0), (0.25, 3.75)]
    # step 2: gradients at one-shot and multi-round weights 2, 1 (client 0) and 0, 1 (client 1) times h
    assert m.local_errors_without_rates == (1.0, 2.0)
    assert m.local_errors == (0.5, 1.0)
    assert m.error_without_rates == 0.5  # |(1 - 2)/2|
    assert m.error == 0.25  # and with plain SGD it is the distance of the two models
    assert (m.gradient_differences, m.distances) == (3.0, 2.0)
    assert m.largest_smoothness == 2.0
    assert m.smoothnesses == (1.0, 2.0)
    assert (m.smoothness, m.norm, m.moved, m.largest_move) == (1.5, 4.0, 3.75, 4.0)
    assert (m.clients, m.rounds, m.steps, m.trainable) == (2, 2, 2.0, 1)
    assert m.relative_update == 3.75 / 4
    assert m.gamma == 1.5 * (3.75 / 4) * 2
    assert (m.bound, m.bound_of_clients) == (1.5 * 2 * 3.75, 1.5 * 2 * 3.75 * 2)


def test_clients_of_one_curvature_have_local_errors_that_cancel() -> None:
    # h = 1 for both: the mean of the clients is gradient descent on their mean, however many rounds
    m = measured(
        Config(**SGD, rounds=3, local_steps=2), Quadratic(1.0), {0: client(0, 1), 1: client(8, 1, 3)}
    )
    assert m.error == pytest.approx(0.0, abs=1e-6)
    assert m.ends[-1].distance == pytest.approx(0.0, abs=1e-6)
    assert min(m.local_errors) > 0.5
    assert m.smoothness == pytest.approx(1.0)


curved = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 4))


@settings(max_examples=25)
@given(
    clients=st.lists(curved, min_size=1, max_size=4),
    rounds=st.integers(2, 4),
    steps=st.integers(1, 3),
    rate=st.floats(0.01, 0.1),
    w=st.floats(-5, 5),
)
def test_quadratics_have_the_closed_form(
    clients: list[tuple[int, int, int]], rounds: int, steps: int, rate: float, w: float
) -> None:
    if all(h == 0 or abs(y - w) < 1e-2 for y, h, _ in clients):
        return  # nobody has a gradient
    data = {number: client(*one) for number, one in enumerate(clients)}
    config = Config(**{**SGD, "lr": rate}, rounds=rounds, local_steps=steps)
    try:
        m = measured(config, Quadratic(w), data, watch=watch)
    except InputError as error:  # the clients' gradients may cancel
        assert "does not move" in str(error)
        return
    total = sum(n for _, _, n in clients)

    def mean_after(start: float, count: int) -> float:
        return sum(n * (y + (1 - rate * h) ** count * (start - y)) for y, h, n in clients) / total

    multi = float(torch.tensor(w))
    for end in m.ends:
        multi = mean_after(multi, steps)
        one = mean_after(float(torch.tensor(w)), steps * end.round)
        assert end.multi_round[0] == pytest.approx(multi, abs=1e-4)
        assert end.one_shot[0] == pytest.approx(one, abs=1e-4)
    assert m.error == pytest.approx(abs(multi - one), abs=1e-4)
    assert m.error == pytest.approx(m.ends[-1].distance, abs=1e-4)
    assert m.relative_update is None or m.relative_update * m.norm == pytest.approx(m.moved)


ADAMW = {"batch_size": 2, "lr": 0.01, "local_epochs": 1, "rounds": 3}
CASES: dict[str, dict[str, Any]] = {
    "full, sgd": {**SGD, "lr": 0.05, "batch_size": 2, "rounds": 3, "local_epochs": 1},
    "full, momentum, clipped": {
        **SGD,
        "lr": 0.05,
        "batch_size": 2,
        "rounds": 2,
        "local_steps": 3,
        "momentum": 0.9,
        "max_grad_norm": 0.5,
    },
    "full, adamw": {**ADAMW, "trainable": "full", "weight_decay": 0.1},
    "lora": {**ADAMW, "lora": {"rank": 2}},
    "lora, proximal, accumulated": {**ADAMW, "proximal": 0.3, "gradient_accumulation": 2},
    "A frozen": {**ADAMW, "aggregation": "freeze-a"},
    "adapter": {**ADAMW, "trainable": "adapter", "adapter": {"size": 3}},
    "prompt": {**ADAMW, "trainable": "prompt", "prompt": {"tokens": 3}},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_that_keeps_every_step(case: str) -> None:
    config, data = Config(**CASES[case]), tokens(3)
    plain = Plain(config, build("llama"), data, seed=0).measure()
    found: list[tuple[float, ...]] = []
    m = measured(config, build("llama"), data, watch=lambda model: found.append(watch(model)) or ())
    close = {"rel": 2e-4, "abs": 1e-5}
    for name in ("norm", "moved", "largest_move", "error", "error_without_rates"):
        assert getattr(m, name) == pytest.approx(plain[name], **close), name
    for name in ("gradient_differences", "distances"):
        assert getattr(m, name) == pytest.approx(plain[name], **close), name
    for name in ("local_errors", "local_errors_without_rates"):
        assert list(getattr(m, name)) == pytest.approx(plain[name], **close), name
    assert m.largest_smoothness == pytest.approx(plain["largest_smoothness"], rel=1e-2)  # apart by rounding
    assert [(e.distance, e.moved) for e in m.ends] == [pytest.approx(end, **close) for end in plain["ends"]]
    away = (
        torch.tensor(found[-2]) - plain["multi_round"]
    )  # AdamW turns rounding into whole steps here and there
    assert float(away.norm()) < 1e-3 * m.moved
    assert min(m.local_errors) > 1e-4  # the comparison was not one of zeros


SCHEMES: dict[str, dict[str, Any]] = {
    "adamw": {**ADAMW},
    "steps": {"batch_size": 2, "local_steps": 2, "rounds": 3, "lr": 0.01, "weight_decay": 0.1},
    "sgd, momentum": {**SGD, "lr": 0.05, "momentum": 0.5, "batch_size": 2, "rounds": 2},
    "dropout": {**ADAMW, "lora": {"rank": 2, "dropout": 0.3}},
    "ranks": {**ADAMW, "lora": {"rank": 3, "client_ranks": [3, 1]}},
    "server": {**ADAMW, "server_optimizer": {"name": "momentum"}},
    "proximal": {**ADAMW, "trainable": "full", "proximal": 0.5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SCHEMES)
def test_the_multi_round_model_has_the_bits_of_the_run(case: str, dtype: torch.dtype) -> None:
    config, data, seen = Config(**SCHEMES[case]), tokens(3), []
    measured(config, build("llama", dtype), data, watch=lambda model: seen.append(weights(model)) or ())
    run = Bench(FedAvg(config, seed=0), build("llama", dtype), data)
    for round in range(1, config.rounds + 1):
        run.round(round)
        for name, value in run.state.weights.items():
            assert torch.equal(seen[2 * round - 1][name], value.to(seen[0][name].dtype)), (round, name)


@pytest.mark.parametrize("case", ["adamw", "steps", "sgd, momentum", "ranks", "proximal"])
def test_the_one_shot_model_has_the_bits_of_the_run_on_the_same_batches(case: str) -> None:
    # with one example a client every mini-batch is the same one, in both schemes and in the run
    config = Config(**SCHEMES[case])
    data = {c: items[:1] for c, items in tokens(3).items()}
    seen: list[dict[str, Tensor]] = []
    measured(config, build("llama"), data, watch=lambda model: seen.append(weights(model)) or ())
    run = Bench(FedAvg(schemes(config)[1], seed=0), build("llama"), data)
    run.round(1)
    for name, value in run.state.weights.items():
        assert torch.equal(seen[-1][name], value), name


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable(model).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_ends_as_it_began(dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    measured(Config(**CASES["full, adamw"]), model, tokens(2))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert (p.data_ptr(), p.grad) == (places[name], None)


def test_dropout_drops_the_same_in_both() -> None:
    # one client, plain SGD of constant rate: both schemes are the same, unless dropout parts them
    lora = {"lora": {"rank": 2, "dropout": 0.5}}
    config = Config(**{**SGD, "trainable": "lora", "lr": 0.02}, **lora, rounds=2, local_steps=3)
    m = measured(config, build("llama"), tokens(1))
    assert m.moved > 0.01
    assert m.error < 1e-4 * m.moved
    assert m.largest_smoothness is None


def test_memory_does_not_grow_with_steps_rounds_or_clients() -> None:
    def peak(rounds: int, clients: int, steps: int) -> tuple[int, int]:
        model = build("llama")
        data = {c: [Encoded((5, 6 + c), (5, 6 + c))] for c in range(clients)}
        meter = MemoryMeter(CPU)
        with meter.whole([model]):
            measured(Config(**{**SGD, "lr": 0.01}, rounds=rounds, local_steps=steps), model, data)
        return meter.peak_bytes, sum(p.nbytes for p in model.parameters())

    small, size = peak(2, 2, 1)
    assert peak(4, 4, 3)[0] <= small + size / 50
    # the model, the server's weights before and after, both trajectories, two gradients, two sums, the int64
    # sum of the mean (two), an update on its way, what is read from disk, and what a step computes with
    assert small <= 14 * size


def test_weights_that_begin_at_zero_have_no_relative_update() -> None:
    m = measured(Config(**{**ADAMW, "aggregation": "freeze-a"}), build("llama"), tokens(2))
    assert (m.norm, m.relative_update, m.gamma) == (0.0, None, None)
    assert m.bound == pytest.approx(m.smoothness * m.steps * m.moved)


def test_one_round_of_epochs_is_set_against_rounds_of_one() -> None:
    multi, one = schemes(Config(rounds=1, local_epochs=4, arrival="asynchronous"))
    assert (multi.rounds, multi.local_epochs, multi.arrival) == (4, 1, "synchronous")
    assert (one.rounds, one.local_epochs, one.local_steps) == (1, 4, None)
    multi, one = schemes(Config(rounds=3, local_steps=5))
    assert (one.rounds, one.local_epochs, one.local_steps) == (1, None, 15)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"rounds": 1}, "nothing to compare one-shot with"),
        ({"rounds": 1, "local_steps": 5}, "local_steps: 5"),
        ({"rounds": 2, "aggregation": "stack"}, "stack"),
        ({"rounds": 2, "trainable": "full", "masters": "kahan"}, "masters: kahan keeps none"),
        ({"rounds": 2, "buffer": {"size": 2}}, "steps after a few of them"),
        (
            {"rounds": 2, "control_variates": True, "optimizer": "sgd", "trainable": "full"},
            "control_variates: false",
        ),
    ],
)
def test_what_the_theory_does_not_cover_is_refused(values: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError, match=part):
        schemes(Config(**values))


@pytest.mark.parametrize("name", [name for name in registry.METHODS if name != "fedavg"])
def test_other_methods_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"fedavg, .* got {name}"):
        schemes(registry.config_class(name).model_construct(name=name))


@pytest.mark.parametrize("lr", [3.0, 1e30])
def test_training_that_diverges_is_an_error(lr: float) -> None:
    config = Config(**{**SGD, "lr": lr}, rounds=2, local_steps=40)
    with pytest.raises(InputError, match=r"diverged: .* \(client 0, round 1 of 2\); lower method.lr"):
        measured(config, Quadratic(4.0), {0: client(0, 9)})


def test_training_that_does_not_move_is_an_error() -> None:
    with pytest.raises(InputError, match="does not move the weights"):
        measured(Config(**SGD, rounds=2, local_steps=1), Toy(3.0), {0: [Encoded((3,), (3,))]})
