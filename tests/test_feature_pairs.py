"""Two settings at once, where each alone may hide what goes wrong, worked out from the replies in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fedcybgd_bench import Spy, bench, part_of
from fedkseed_bench import replies, toy
from model_families import build
from protected import federation
from secure_rounds import SECURE, bits_of
from torch import Tensor
from torch.testing import assert_close
from toy import Bench, Toy, items

from fedtune.core.types import ClientError, Reply
from fedtune.data.encoded import Encoded
from fedtune.methods.fedavg import lora_aggregation as lora
from fedtune.methods.fedavg.method import CONTROL, FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.fedcybgd.settings import Config as CycleConfig
from fedtune.methods.fedcybgd.settings import FedBAvgConfig
from fedtune.methods.fedkseed.method import FedKSeed
from fedtune.methods.fedkseed.settings import Config as KSeedConfig
from fedtune.methods.fedkseed.settings import ProConfig
from fedtune.models.tuning import trainable
from fedtune.zeroth import reference
from fedtune.zeroth.pool import SeedPool

SIZES = {0: 2, 1: 3, 2: 1, 3: 4}


def classes(sizes: dict[int, int] = SIZES) -> dict[int, list[Encoded]]:
    return {
        c: [
            Encoded(tuple(3 + (7 * c + 5 * k + j) % 60 for j in range(4 + k)), ((c + k) % 3,))
            for k in range(n)
        ]
        for c, n in sizes.items()
    }


def lost(bench: Bench, *clients: int) -> None:
    """These clients do not answer."""
    step = bench.method.client_step

    def other(job: Any, env: Any) -> Any:
        if env.client in clients:
            raise ClientError("gone")
        return step(job, env)

    bench.method.client_step = other


def of_lora(**settings: Any) -> Bench:
    """Four clients of a classifier with LoRA; its head trains too."""
    common = {"rounds": 3, "local_epochs": 2, "batch_size": 2, "lr": 0.05, "lora": {"rank": 3, "alpha": 6.0}}
    return Bench(FedAvg(Config(**{**common, **settings}), seed=0), build("roberta"), classes())


def mean_of(kept: list[Reply], name: str) -> Tensor:
    total = sum(reply.examples for reply in kept)
    return sum(r.payload.tensors[name].double() * r.examples / total for r in kept)  # type: ignore[return-value]


@pytest.mark.parametrize("ranks", [None, [1, 3]])
def test_stacking_beside_a_head_while_a_client_is_lost(ranks: list[int] | None) -> None:
    b = of_lora(aggregation="stack", lora={"rank": 3, "alpha": 6.0, "client_ranks": ranks})
    kept = replies(b)
    head = {n: w.double() for n, w in b.state.weights.items() if not lora.is_factor(n)}
    factors = {n: w.clone() for n, w in b.state.weights.items() if lora.is_factor(n)}
    dense = {name: torch.zeros((), dtype=torch.float64) for name in b.state.scaling}
    assert head and set(b.state.scaling.values()) == {2.0}  # alpha / rank, whatever a client's own rank
    lost(b, 1)
    for round in (1, 2, 3):
        kept.clear()
        assert b.round(round, quorum=3).clients == [0, 2, 3]
        total = sum(r.examples for r in kept)
        assert total == 7
        for name in head:
            head[name] = head[name] + mean_of(kept, name)
            assert_close(b.state.weights[name].double(), head[name], rtol=0, atol=1e-6)
        for name in dense:
            for r in kept:
                a, at = (r.payload.tensors[name + end].double() for end in (lora.B, lora.A))
                assert at.shape[0] == a.shape[1] == (ranks[r.client % 2] if ranks else 3)
                dense[name] = dense[name] + 2.0 * r.examples / total * a @ at
            product = b.state.product
            found = (
                product[name + lora.DENSE]
                if name + lora.DENSE in product
                else product[name + lora.B] @ product[name + lora.A]
            )
            assert_close(found.double(), dense[name], rtol=0, atol=1e-6)
    assert all(torch.equal(b.state.weights[n], f) for n, f in factors.items())  # only their product is learnt
    base = {
        n: layer.get_base_layer().weight.detach().double() for n, layer in lora.lora_layers(b.model).items()
    }
    for _, model in b.method.export(b.state, b.model):
        for name, layer in lora.lora_layers(model).items():
            now = layer.get_base_layer().weight.double() + layer.get_delta_weight("default").double()
            assert_close(now - base[name], dense[name], rtol=0, atol=1e-6)
        assert all(
            torch.equal(trainable(model)[n].detach().double(), w.float().double())
            for n, w in b.state.weights.items()
            if n in head
        )


def test_what_a_client_of_a_stack_starts_from_is_the_product_and_factors_of_its_own() -> None:
    b = of_lora(
        aggregation="stack", rounds=2, lr=1e-30
    )  # nothing is learnt: what comes back is what was drawn
    kept = replies(b)
    b.round(1), b.round(2)
    seen = [r.payload.tensors[name + lora.A] for r in kept for name in b.state.scaling]
    assert len(seen) == 8 * len(b.state.scaling)
    assert all(
        not torch.equal(one, other)
        for at, one in enumerate(seen)
        for other in seen[:at]
        if one.shape == other.shape
    )
    for drawn in seen:
        bound = drawn.shape[1] ** -0.5
        assert (
            float(drawn.abs().max()) <= bound
            and float(drawn.min()) < -0.7 * bound
            and float(drawn.max()) > 0.7 * bound
        )


def test_unlike_ranks_with_a_lost_client_and_a_server_optimizer() -> None:
    b = of_lora(
        lora={"rank": 3, "alpha": 6.0, "client_ranks": [1, 3]},
        server_optimizer={"name": "momentum", "lr": 0.5, "momentum": 0.9},
    )
    kept, start = replies(b), {n: w.double() for n, w in b.state.weights.items()}
    lost(b, 1)
    velocity = {n: torch.zeros_like(w) for n, w in start.items()}
    for round in (1, 2):
        kept.clear()
        b.round(round, quorum=3)
        for name, weight in start.items():
            whole = []
            for r in kept:
                update = torch.zeros_like(weight)
                sent = r.payload.tensors[name].double()
                update[tuple(slice(n) for n in sent.shape)] = sent
                whole.append(update * r.examples / 7)
            velocity[name] = 0.9 * velocity[name] + sum(whole)
            start[name] = weight + 0.5 * velocity[name]
            assert_close(b.state.weights[name].double(), start[name], rtol=0, atol=1e-6)


def test_scaffold_with_clients_that_come_and_go_keeps_the_sum_of_the_variates() -> None:
    """c is the mean of all clients' c_i, each of which began at zero: option II, whatever the cohorts."""
    settings = {
        "trainable": "full",
        "rounds": 6,
        "optimizer": "sgd",
        "lr": 0.1,
        "batch_size": 2,
        "control_variates": True,
    }
    b = Bench(FedAvg(Config(**settings), seed=0), Toy(), {0: items(1, 2), 1: items(5), 2: items(7, 9, 4)})
    for round in range(1, 7):
        b.round(round, per_round=2)
        own = [b.runner.states[c].tensors["w"].double() for c in range(3) if c in b.runner.states]
        assert_close(b.state.control["w"].double(), torch.stack(own).sum(0) / 3, rtol=0, atol=1e-6)


# --- FedKSeed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("perturbations", [1, 2])
def test_clipping_cuts_single_scalars_where_the_dense_sums_would_be_smaller(
    clip: float | None, perturbations: int
) -> None:
    data = {0: items(1, 4), 1: items(6, 2, 9)}
    b = toy(data, seeds=4, local_steps=8, lr=1e-3, clip=clip, perturbations=perturbations)
    kept = replies(b)
    singles: dict[int, list[tuple[int, float]]] = {}
    reply = b.method.reply

    def noted(draws: list[int], scalars: list[float]) -> Any:
        singles[len(singles)] = list(zip(draws, scalars, strict=True))
        return reply(draws, scalars)

    b.method.reply = noted
    b.round(1)
    assert [set(r.payload.tensors) for r in kept] == [{"sums"} if clip is None else {"seeds", "scalars"}] * 2
    expected = torch.zeros(4, dtype=torch.float64)
    for (_, drawn), share in zip(sorted(singles.items()), (2 / 5, 3 / 5), strict=True):
        assert len(drawn) == 8 * perturbations
        for j, g in drawn:
            expected[j] += share * (g if clip is None else max(-clip, min(clip, g))) / perturbations
    assert any(abs(g) > 1.5 for drawn in singles.values() for _, g in drawn)
    assert_close(b.state.accumulator.double(), expected, rtol=0, atol=1e-5)


def test_dense_sums_with_a_lost_client_and_clients_that_hold_different_rounds() -> None:
    data = {0: items(1, 4), 1: items(6, 2, 9), 2: items(3)}
    b = toy(data, seeds=4, local_steps=8, lr=1e-3, rounds=4)
    kept, total = replies(b), torch.zeros(4, dtype=torch.float64)
    asked = []
    for round in range(1, 5):
        kept.clear()
        asked.append(b.round(round, per_round=2).clients)
        examples = sum(r.examples for r in kept)
        for r in kept:
            total += r.payload.tensors["sums"].double() * r.examples / examples
        assert_close(b.state.accumulator.double(), total, rtol=0, atol=1e-5)
        assert set(b.state.holders) == {str(c) for c in asked[-1]}
    assert len(set(map(tuple, asked))) > 1


def test_pro_with_clipping_counts_what_was_cut() -> None:
    config = ProConfig(seeds=4, local_steps=8, lr=1e-3, clip=1.5, epsilon=2.0**-6, rounds=2)
    b = Bench(FedKSeed(config, seed=0), Toy(), {0: items(1, 4), 1: items(6, 2)})
    kept = replies(b)
    magnitude, draws = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    for round in (1, 2):
        b.round(round)
    for r in kept:
        for j, g in zip(
            r.payload.tensors["seeds"].tolist(), r.payload.tensors["scalars"].tolist(), strict=True
        ):
            magnitude[j] += min(abs(g), 1.5)
            draws[j] += 1
    assert torch.equal(b.state.draws, draws) and int(draws.sum()) == 32
    assert_close(b.state.magnitude, magnitude, rtol=0, atol=1e-6)


# --- FedCyBGD -----------------------------------------------------------------------------------------------


def parts_sent(spy: Spy) -> Iterator[tuple[int, dict[str, str], set[str]]]:
    """Of each order: its client, the form in which it needs each part, and the parts that came along."""
    for client, order in spy.orders:
        forms = json.loads(str(order.scalars["forms"]))
        yield client, forms, {part_of(name) for name in order.tensors if ":" in name}


@pytest.mark.parametrize("compression", ["layer-drop", "hybrid"])
def test_over_a_long_run_a_client_is_sent_a_part_only_in_a_form_that_it_never_had(compression: str) -> None:
    b = bench(3, blocks=5, rounds=8, local_epochs=1, compression=compression, drop_ratio=0.5)
    spy = Spy(b)
    for round in range(1, 9):
        b.round(round)
    has: dict[int, dict[str, str]] = {client: {} for client in range(3)}
    saved = 0
    for client, forms, came in parts_sent(spy):
        needed = {part for part, form in forms.items() if has[client].get(part) != form}
        assert came == needed
        left_out = set(has[client]) - set(forms)  # what this turn's model does not have is not thrown away
        has[client] |= forms
        saved += len(left_out)
    assert saved > 10
    for client, own in has.items():
        assert json.loads(b.state.held[str(client)]) == own


def test_of_fedbavg_who_did_not_answer_gets_everything_again_and_the_others_do_not() -> None:
    b = bench(3, blocks=3, config=FedBAvgConfig, rounds=4, local_epochs=1)
    spy = Spy(b)
    has: dict[int, dict[str, str]] = {}
    for round, gone in ((1, set()), (2, {1}), (3, set()), (4, set())):
        spy.orders.clear()
        spy.fail = gone
        b.round(round, quorum=2)
        for client, forms, came in parts_sent(spy):
            assert came == {part for part, form in forms.items() if has.get(client, {}).get(part) != form}
            has[client] = {} if client in gone else has.get(client, {}) | forms
        assert (len(spy.orders[1][1].tensors) > len(spy.orders[0][1].tensors)) == (round == 3)


def test_two_blocks_a_client_and_a_head_that_trains_with_both() -> None:
    b = bench(
        2, family="roberta", blocks=4, blocks_per_client=2, block_order="ascending", rounds=2, local_epochs=1
    )
    start = {n: w.clone() for n, w in b.state.weights.items()}
    spy = Spy(b)
    b.round(1)
    assert [order.scalars["own"] for _, order in spy.orders] == ["0,1", "2,3"]
    for name, weight in b.state.weights.items():
        change = sum(r.tensors[name].double() for r in spy.replies if name in r.tensors)
        assert_close(weight.double(), start[name].double() + change, rtol=0, atol=1e-6)
        assert sum(name in r.tensors for r in spy.replies) == (2 if part_of(name) == "classifier" else 1)
        assert not torch.equal(weight, start[name])


# --- sums that the server does not see through --------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"server_optimizer": {"name": "adam", "lr": 0.1}}, {"control_variates": True}]
)
def test_masks_with_unlike_sizes_and_a_lost_client_give_the_weighted_mean(settings: dict[str, Any]) -> None:
    plain, _ = federation(**settings)
    masked, _ = federation(SECURE, **settings)
    for b in (plain, masked):
        lost(b, 2)
        for round in (1, 2, 3):
            assert b.round(round, quorum=3).clients == [0, 1, 3]
    mine, theirs = bits_of(plain), bits_of(masked)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_masks_with_clients_of_unlike_rank() -> None:
    def run(secure: Any) -> Bench:
        config = Config(rounds=2, batch_size=2, lr=0.05, lora={"rank": 3, "client_ranks": [1, 3]})
        method = FedAvg(config, seed=0)
        b, _ = federation(secure, method=method, data=classes(), model=build("roberta"))
        b.round(1), b.round(2)
        return b

    one, other = bits_of(run(None)), bits_of(run(SECURE))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_control_prefixes_never_reach_the_weights() -> None:
    b, _ = federation(control_variates=True)
    b.round(1)
    assert (
        not any(name.startswith(CONTROL) for name in b.state.weights)
        and b.state.control.keys() == b.state.weights.keys()
    )


def direction(b: Bench, j: int) -> float:
    pool = SeedPool(b.method.pool_key, b.method.config.seeds, b.method.config.noise)
    return float(reference.z(pool, "w", 1, j)[0])


def test_two_perturbations_of_a_step_are_taken_at_the_same_weights() -> None:
    config = KSeedConfig(seeds=8, local_steps=1, perturbations=2, lr=0.25, epsilon=2.0**-6)
    b = Bench(FedKSeed(config, seed=0), Toy(), {0: items(3)})
    kept = replies(b)
    b.round(1)
    (reply,) = kept
    for j, g in zip(
        reply.payload.tensors["seeds"].tolist(), reply.payload.tensors["scalars"].tolist(), strict=True
    ):
        assert g == pytest.approx((1.0 - 3.0) * direction(b, j), rel=1e-4)  # both from the same weights
    moved = sum(
        g / 2 * direction(b, j)
        for j, g in zip(
            reply.payload.tensors["seeds"].tolist(), reply.payload.tensors["scalars"].tolist(), strict=True
        )
    )
    for _, model in b.method.export(b.state, b.model):
        assert float(model.w.detach()) == pytest.approx(1.0 - 0.25 * moved, rel=1e-5)


@pytest.mark.parametrize("together", [False, True])
def test_in_bfloat16_a_block_that_is_visited_again_goes_on_from_its_float32_value(together: bool) -> None:
    """Changes of a rate so small that a bfloat16 weight alone would lose most of them."""
    kind = FedBAvgConfig if together else CycleConfig
    rounds = 4 if together else 2
    b = bench(2, blocks=2, dtype=torch.bfloat16, config=kind, rounds=rounds, local_epochs=1, lr=2e-4)
    spy = Spy(b)
    exact = {name: weight.double() for name, weight in b.state.weights.items()}
    start = {name: weight.clone() for name, weight in b.state.weights.items()}
    for round in range(1, rounds + 1):
        before = len(spy.replies)
        b.round(round)
        came = list(zip((c for c, _ in spy.orders[before:]), spy.replies[before:], strict=True))
        for client, reply in came:
            for name, change in reply.tensors.items():
                share = (2 + client) / 5 if together else 1.0
                exact[name] = exact[name] + share * change.double()
    lost = 0
    for name, weight in b.state.weights.items():
        assert weight.dtype == torch.float32
        assert_close(weight.double(), exact[name], rtol=0, atol=1e-6)
        lost += int(((weight != start[name].float()) & (weight.to(torch.bfloat16) == start[name])).sum())
    assert lost > 100


def test_of_clients_in_turn_each_turn_is_told_with_the_state_after_it() -> None:
    b = bench(3, blocks=3)
    spy = Spy(b)
    spy.fail = {1}
    outcome = b.round(1, quorum=2)
    assert sorted(outcome.clients) == [0, 2] and [state.turns for state in b.states_on_the_way] == [1, 2, 3]
    assert b.states_on_the_way[-1] is b.state
