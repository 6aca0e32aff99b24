"""Every form of FedAvg against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.testing import assert_close
from toy import Bench, Toy, items

from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.server_optimizer import ServerOptimizer
from fedtune.methods.fedavg.settings import Config
from fedtune.transport.in_process import Simulation

SGD = {"trainable": "full", "optimizer": "sgd", "lr": 0.5, "lr_schedule": "constant", "batch_size": 8}
ONE_AND_THREE = {0: items(3), 1: items(5, 5, 5)}


def bench(
    data: dict = ONE_AND_THREE, w: float = 1.0, dtype: torch.dtype = torch.float32, **settings: object
) -> Bench:
    return Bench(FedAvg(Config(**{**SGD, **settings}), seed=0), Toy(w, dtype), data)


def test_weighted_mean_of_two_clients() -> None:
    b = bench()
    outcome = b.round(1)
    # client 0: 1 - 0.5 (1 - 3) = 2; client 1: 1 - 0.5 (1 - 5) = 3; (1·2 + 3·3) / 4
    assert b.state.weights["w"].tolist() == [2.75]
    # losses (1-3)²/2 = 2 and (1-5)²/2 = 8, weighted 1:3
    assert outcome.mean("train_loss") == pytest.approx((2 + 3 * 8) / 4)
    b.round(2)
    # from 2.75: client 0 → 2.875, client 1 → 3.875; mean 2.75 + (0.125 + 3·1.125) / 4
    assert b.state.weights["w"].tolist() == [3.625]


def test_clients_start_from_the_same_weights_and_in_any_order_the_result_is_the_same() -> None:
    forward, backward = bench(), bench({1: ONE_AND_THREE[1], 0: ONE_AND_THREE[0]})
    forward.round(1), backward.round(1)
    assert torch.equal(forward.state.weights["w"], backward.state.weights["w"])
    # three alike clients end where one does: nobody began where another had stopped
    alike = bench({c: items(3) for c in range(3)})
    alike.round(1)
    assert alike.state.weights["w"].tolist() == [2.0]


def test_linear_decay_restarts_every_round() -> None:
    b = bench({0: items(3)}, local_steps=2, lr_schedule="linear")
    b.round(1)
    # rates 0.5, 0.25: 1 → 2 → 2 - 0.25 (2 - 3) = 2.25
    assert b.state.weights["w"].tolist() == [2.25]
    b.round(2)
    # 2.25 → 2.625 → 2.625 + 0.25 · 0.375
    assert b.state.weights["w"].tolist() == [2.71875]


def test_gradient_accumulation_equals_the_larger_batch() -> None:
    data = {0: items(3, 5, 7, 9)}
    whole = bench(data, batch_size=4)
    parts = bench(data, batch_size=2, gradient_accumulation=2)
    whole.round(1), parts.round(1)
    assert whole.state.weights["w"].tolist() == [1 - 0.5 * (1 - 6)]
    assert torch.equal(whole.state.weights["w"], parts.state.weights["w"])


def test_proximal_term() -> None:
    b = bench({0: items(3)}, local_steps=2, proximal=0.5)
    b.round(1)
    # step 1: no pull yet, 1 → 2; step 2: gradient (2 - 3) + 0.5 (2 - 1) = -0.5, → 2.25
    assert b.state.weights["w"].tolist() == [2.25]


def test_clipping() -> None:
    b = bench({0: items(11)}, max_grad_norm=2.0)
    b.round(1)
    assert_close(b.state.weights["w"], torch.tensor([1 + 0.5 * 2.0]))  # gradient -10 is cut to -2


def test_scaffold_two_rounds() -> None:
    b = bench({0: items(3), 1: items(5)}, control_variates=True, lr=0.25)
    b.round(1)
    # c = c_i = 0: client 0: 1 + 0.25·2 = 1.5; client 1: 1 + 0.25·4 = 2; mean 1.75
    assert b.state.weights["w"].tolist() == [1.75]
    # c_i ← (w(t) - w_i)/0.25: -2 and -4; c = mean of the changes = -3
    assert b.runner.states[0].tensors["w"].tolist() == [-2.0]
    assert b.runner.states[1].tensors["w"].tolist() == [-4.0]
    assert b.state.control["w"].tolist() == [-3.0]
    b.round(2)
    # corrections c - c_i = -1 and +1: client 0: gradient -1.25 - 1; client 1: -3.25 + 1: both -2.25
    assert b.state.weights["w"].tolist() == [1.75 + 0.25 * 2.25]
    # c_0 ← c_0 - c - Δ/0.25 = -2 + 3 - 2.25; c_1 ← -4 + 3 - 2.25; c = their mean
    assert b.state.control["w"].tolist() == [(-1.25 - 3.25) / 2]


def test_scaffold_counts_clients_that_were_not_asked() -> None:
    b = bench({0: items(3), 1: items(3), 2: items(3), 3: items(3)}, control_variates=True, lr=0.25)
    b.round(1, per_round=2)
    assert b.state.control["w"].tolist() == [-2.0 * 2 / 4]  # two of four clients changed by -2


def test_server_optimizers_by_hand() -> None:
    w, update = torch.tensor([1.0]), torch.tensor([0.5])
    assert ServerOptimizer(lr=2.0).step(w, update, {})[0].tolist() == [2.0]
    momentum = ServerOptimizer(name="momentum", momentum=0.5)
    w1, m1 = momentum.step(w, update, {})
    w2, m2 = momentum.step(w1, update, m1)
    assert (w1.tolist(), m1["m"].tolist()) == ([1.5], [0.5])
    assert (w2.tolist(), m2["m"].tolist()) == ([2.25], [0.75])  # m = 0.5·0.5 + 0.5
    nesterov = ServerOptimizer(name="nesterov", momentum=0.5)
    w1, m1 = nesterov.step(w, update, {})
    w2, m2 = nesterov.step(w1, update, m1)
    assert (w1.tolist(), m1["m"].tolist()) == ([1.75], [0.5])  # 1 + 0.5·0.5 + 0.5
    assert (w2.tolist(), m2["m"].tolist()) == ([2.625], [0.75])  # 1.75 + 0.5·0.75 + 0.5
    adam = ServerOptimizer(name="adam", lr=0.1, momentum=0.5, beta2=0.75, tau=0.5)
    w1, moments = adam.step(w, update, {})
    # m = 0.25, v = 0.25·0.25 = 0.0625, √v = 0.25: 1 + 0.1·0.25/0.75
    assert_close(w1, torch.tensor([1 + 0.1 * 0.25 / 0.75]))
    w2, moments = adam.step(w1, torch.tensor([1.0]), moments)
    assert moments["m"].tolist() == [0.625] and moments["v"].tolist() == [0.75 * 0.0625 + 0.25]
    assert_close(w2, w1 + 0.1 * 0.625 / (0.296875**0.5 + 0.5))


def test_server_momentum_over_rounds() -> None:
    b = bench({0: items(3)}, server_optimizer=ServerOptimizer(name="momentum", momentum=0.5))
    b.round(1)
    assert b.state.weights["w"].tolist() == [2.0]  # m = 1
    b.round(2)
    assert b.state.weights["w"].tolist() == [3.0]  # Δ = 0.5, m = 0.5·1 + 0.5


def test_asynchronous_is_usable_after_each_arrival_and_ends_at_the_synchronous_bits() -> None:
    data = {0: items(3), 1: items(5, 5, 5), 2: items(9, 9)}
    method = FedAvg(Config(**SGD, rounds=1, arrival="asynchronous"), seed=0)
    b = Bench(method, Toy(), data, Simulation(delay_s=10.0))
    outcome = b.round(1)
    trained = {0: (2.0, 1), 1: (3.0, 3), 2: (5.0, 2)}
    assert outcome.clients != [0, 1, 2]  # they came in another order than they were asked
    for arrived, state in enumerate(b.states_on_the_way, start=1):
        so_far = [trained[client] for client in outcome.clients[:arrived]]
        assert_close(
            state.weights["w"], torch.tensor([sum(w * n for w, n in so_far) / sum(n for _, n in so_far)])
        )
    synchronous = bench(data, rounds=1)
    synchronous.round(1)
    assert torch.equal(b.state.weights["w"], synchronous.state.weights["w"])


def test_lost_and_late_clients_do_not_hold_one_shot_up() -> None:
    data = {c: items(3) for c in range(20)}
    method = FedAvg(Config(**SGD, rounds=1, arrival="asynchronous"), seed=0)
    b = Bench(method, Toy(), data, Simulation(dropout=0.3, delay_s=10.0), deadline_s=15.0)
    outcome = b.round(1, quorum=1)
    reasons = set(outcome.left_out.values())
    assert "it dropped out" in reasons and any("deadline is 15 s" in reason for reason in reasons)
    assert len(outcome.clients) + len(outcome.left_out) == 20
    assert b.state.weights["w"].tolist() == [2.0]


def test_bfloat16_weights_move_at_small_rates() -> None:
    # bfloat16 steps near 1 are 2^-7; 40 steps of lr·gradient = 1e-3·2 would each round to nothing
    b = bench({0: items(3)}, dtype=torch.bfloat16, local_steps=40, lr=1e-3)
    b.round(1)
    exact = 1.0
    for _ in range(40):
        # the forward pass sees the master rounded to bfloat16
        exact -= 1e-3 * (float(torch.tensor(exact).bfloat16()) - 3)
    assert float(b.state.weights["w"]) == pytest.approx(exact, rel=1e-3)
    assert b.wire[0]["payload_bytes"] == b.wire[1]["payload_bytes"] == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"aggregation": "stack"}, "for trainable: lora, got full"),
        ({"arrival": "asynchronous", "rounds": 3}, "set rounds: 1 .got 3"),
        ({"control_variates": True, "optimizer": "adamw"}, "set optimizer: sgd"),
        ({"local_epochs": 1, "local_steps": 5}, "both set"),
        ({"momentum": 0.9, "optimizer": "adamw"}, "momentum belongs to optimizer: sgd"),
        ({"lora": {"rank": 4}}, "`lora` is set but trainable is full"),
        ({"lr": 0.0}, "greater than 0"),
        ({"server_optimizer": {"name": "momentum", "tau": 0.1}}, "tau has no effect with name: momentum"),
        ({"server_optimizer": {"momentum": 0.5}}, "belongs to momentum, nesterov and adam"),
        ({"server_optimizer": {"name": "nesterov", "beta2": 0.5}}, "belongs to adam"),
        ({"keep_optimizer": True}, "plain SGD keeps nothing"),
        (
            {"keep_optimizer": True, "optimizer": "adamw", "trainable": "lora", "aggregation": "svd"},
            "begins with other factors. Take mean or freeze-a",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Config.model_validate({**SGD, **settings})


class Broken(nn.Module):
    """Loses its weights after the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0]))

    def forward(self, input_ids: torch.Tensor, **rest: torch.Tensor) -> object:
        from types import SimpleNamespace

        return SimpleNamespace(loss=(self.w * torch.where(input_ids[:, 0] == 13, float("nan"), 1.0)).sum())


def test_a_client_whose_loss_is_nan_is_left_out_and_named() -> None:
    b = Bench(FedAvg(Config(**SGD), seed=0), Broken(), {0: items(3), 1: items(13), 2: items(3)})
    outcome = b.round(1, quorum=2)
    assert outcome.clients == [0, 2]
    assert "the loss became nan at step 1; lower method.lr" in outcome.left_out[1]
    assert b.state.weights["w"].tolist() == [0.5]


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_an_epoch_is_every_example_once_and_its_last_step_may_be_short(epochs: int) -> None:
    b = bench({0: items(3, 4, 5, 6, 7)}, local_epochs=epochs, batch_size=2, gradient_accumulation=2)
    kept: list[list[int]] = []
    forward = b.model.forward
    b.model.forward = lambda **batch: (kept.append(batch["input_ids"][:, 0].tolist()), forward(**batch))[1]
    (entry,) = [b.round(1).metrics[0]]
    assert entry["steps"] == 2 * epochs  # 3 batches: a step of two and one of one
    assert [len(batch) for batch in kept] == [2, 2, 1] * epochs
    seen = [[y for batch in kept[at : at + 3] for y in batch] for at in range(0, 3 * epochs, 3)]
    assert all(sorted(epoch) == [3, 4, 5, 6, 7] for epoch in seen)
    assert len({tuple(epoch) for epoch in seen}) == epochs  # in an order of its own


def test_two_epochs_decay_the_rate_over_both() -> None:
    b = bench({0: items(3)}, local_epochs=2, lr_schedule="linear")
    b.round(1)
    assert b.state.weights["w"].tolist() == [2.25]  # as two steps do, above


def test_counted_steps_go_on_into_the_next_epoch() -> None:
    b = bench({0: items(3, 5, 7)}, local_steps=4, batch_size=2)
    kept: list[list[int]] = []
    forward = b.model.forward
    b.model.forward = lambda **batch: (kept.append(batch["input_ids"][:, 0].tolist()), forward(**batch))[1]
    b.round(1)
    assert [len(batch) for batch in kept] == [2, 1, 2, 1]
    assert sorted(kept[0] + kept[1]) == sorted(kept[2] + kept[3]) == [3, 5, 7]


def test_in_bfloat16_each_term_of_a_step_works_on_the_master() -> None:
    """A weight of 1 has bfloat16 neighbours 1/128 apart; moves of less are kept until they add up."""
    pulled = bench({0: items(3)}, dtype=torch.bfloat16, lr=2.0**-10, local_steps=2, proximal=512.0)
    pulled.round(1)
    # step 1: 1 + 2/1024; step 2: gradient (as bfloat16) -2 + 512 · 2/1024 = -1, → 1 + 3/1024
    assert pulled.state.weights["w"].tolist() == [1 + 3 * 2.0**-10]
    settings = {"control_variates": True, "local_steps": 2, "lr": 2.0**-10}
    corrected = bench({0: items(3), 1: items(1)}, dtype=torch.bfloat16, **settings)
    corrected.round(1)
    # client 0: 1 + 4/1024 (its weight stays 1 in bfloat16); client 1: 1; the mean is halved
    assert corrected.state.weights["w"].tolist() == [1 + 2 * 2.0**-10]
    # c_i = −Δ_i / Σ rates: −2 and 0
    assert [corrected.runner.states[c].tensors["w"].tolist() for c in (0, 1)] == [[-2.0], [0.0]]
    assert corrected.state.control["w"].tolist() == [-1.0]
    clipped = bench({0: items(3)}, dtype=torch.bfloat16, lr=2.0**-10, max_grad_norm=0.5, local_steps=2)
    clipped.round(1)
    assert clipped.state.weights["w"].tolist() == [pytest.approx(1 + 2.0**-10, abs=1e-7)]
