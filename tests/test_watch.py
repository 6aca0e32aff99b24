"""Norms and cosines of a round's updates, worked out by hand, and who stands out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy import Bench, Toy, items

from fedtune.core.watch import WIDTH, Sketch, sketch, standings
from fedtune.methods import registry
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config


def seen(vectors: Mapping[int, list[float]]) -> dict[int, dict[str, Sketch]]:
    return {client: {"weights": sketch([torch.tensor(v)])} for client, v in vectors.items()}


def test_norms_and_cosines_are_those_worked_out_by_hand() -> None:
    found = standings(seen({0: [3.0, 4.0], 1: [2.0, 0.0], 2: [0.0, 5.0]}), {0: 1, 1: 1, 2: 1})
    assert [found[client].entry["norm"] for client in range(3)] == [5.0, 2.0, 5.0]
    # the others' directions: (1, 0) + (0, 1); (0.6, 0.8) + (0, 1); (0.6, 0.8) + (1, 0)
    wanted = [1.4 / math.sqrt(2), 0.6 / math.hypot(0.6, 1.8), 0.8 / math.hypot(1.6, 0.8)]
    for client, cosine in enumerate(wanted):
        assert found[client].cosine["weights"] == pytest.approx(cosine, abs=1e-6)
        assert found[client].entry["cosine"] == round(cosine, 3)
    assert found[1].times == pytest.approx(2 / 5)


def test_a_round_of_the_loop_records_what_its_clients_sent() -> None:
    federation = Bench(
        FedAvg(Config(trainable="full", lr=0.5, optimizer="sgd", batch_size=4), 0),
        Toy(1.0),
        {0: items(3), 1: items(5), 2: items(-1)},
    )
    outcome = federation.round(1)  # w ← w − 0.5 (w − y): from 1 by 1, 2 and −1
    found = standings(outcome.seen, outcome.examples)
    assert [found[client].norm["weights"] for client in range(3)] == [1.0, 2.0, 1.0]
    cosines = [found[client].cosine["weights"] for client in range(3)]
    assert cosines == [None, None, pytest.approx(-1.0)]  # +1 and −1 have no mean direction


@settings(max_examples=20)
@given(st.lists(st.integers(1, 3 * WIDTH), min_size=1, max_size=4), st.integers(0, 2**31))
def test_a_sketch_is_off_by_little_wherever_the_tensors_are_cut(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one = [torch.randn(size, generator=generator) for size in sizes]
    other = [0.5 * tensor + torch.randn(len(tensor), generator=generator) for tensor in one]
    a, b = torch.cat(one).double(), torch.cat(other).double()
    mine, theirs = sketch(one), sketch(other)
    assert mine.norm == pytest.approx(float(a.norm()), rel=1e-12)
    lengths = float(mine.direction.norm() * theirs.direction.norm())
    cosine = float(mine.direction.double() @ theirs.direction.double()) / lengths
    wanted = float(a @ b / (a.norm() * b.norm()))
    assert cosine == pytest.approx(wanted, abs=1e-5 if len(a) <= WIDTH else 6 / 64)
    assert torch.equal(sketch([a.float()]).direction, mine.direction)  # as one vector, however it is cut


@pytest.mark.parametrize("columns", [64, 512, 4096])
def test_an_update_of_one_column_is_no_worse(columns: int) -> None:
    generator, errors = torch.Generator().manual_seed(columns), []
    for column in range(8):
        one, other = torch.zeros(2, 1000, columns)
        one[:, column] = torch.randn(1000, generator=generator)
        other[:, column] = torch.randn(1000, generator=generator)
        a, b = one[:, column].double(), other[:, column].double()
        mine, theirs = (sketch([t]).direction.double() for t in (one, other))
        errors.append(float(mine @ theirs / (mine.norm() * theirs.norm()) - a @ b / (a.norm() * b.norm())))
    assert max(map(abs, errors)) < 5 / 64


def test_zeros_and_single_clients_have_no_cosine() -> None:
    alone = standings(seen({4: [3.0, 4.0]}), {4: 10})[4]
    assert (alone.entry, alone.times, alone.why) == ({"norm": 5.0}, None, "")
    found = standings(seen({0: [0.0], 1: [0.0], 2: [9.0]}), dict.fromkeys(range(3), 1))
    assert [one.entry for one in found.values()] == [{"norm": 0.0}, {"norm": 0.0}, {"norm": 9.0}]
    assert not any(one.why for one in found.values())
    assert standings({}, {}) == {}


@pytest.mark.parametrize(
    ("times", "examples", "out"),
    [(7.9, 1, False), (8.1, 1, True), (79.0, 10, False), (79.0, 10**9, False), (81.0, 10**9, True)],
)
def test_who_sends_more_than_eight_times_the_others_stands_out(
    times: float, examples: int, out: bool
) -> None:
    vectors = {client: [1.0, float(client)] for client in range(3)}
    vectors[3] = [times * math.sqrt(2), 0.0]  # the median of the others' norms is √2
    why = standings(seen(vectors), {0: 1, 1: 1, 2: 1, 3: examples})[3].why
    assert bool(why) == out
    if out:
        assert f"is {times:.4g} times the median" in why


def test_two_clients_are_compared_with_each_other_and_the_longer_is_named() -> None:
    found = standings(seen({0: [1.0], 1: [1000.0]}), {0: 5, 1: 5})
    assert "1,000 times" in found[1].why and not found[0].why


def test_who_points_against_the_others_stands_out_of_four() -> None:
    vectors = {client: [1.0, 0.1 * client] for client in range(3)} | {3: [-1.0, 0.0]}
    whys = {c: s.why for c, s in standings(seen(vectors), dict.fromkeys(range(4), 1)).items()}
    assert "the cosine to their mean is -1.00" in whys.pop(3) and not any(whys.values())
    del vectors[0]  # of three, nobody says who is right
    assert not any(s.why for s in standings(seen(vectors), dict.fromkeys(vectors, 1)).values())


def test_one_long_update_does_not_turn_the_others() -> None:
    vectors = {client: [1.0, 0.1 * client] for client in range(4)} | {4: [-1e6, 0.0]}
    found = standings(seen(vectors), dict.fromkeys(vectors, 1))
    assert all(found[client].cosine["weights"] > 0.9 for client in range(4))
    assert [client for client in found if found[client].why] == [4]


def method(settings: dict[str, Any]) -> Any:
    return registry.build(registry.config_class(settings["name"])(**settings), 0)


def of(settings: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, float]:
    vectors = method(settings).updates().vectors(tensors)
    return {part: sketch(vector).norm for part, vector in vectors.items()}


A, B = "q.lora_A.weight", "q.lora_B.weight"


def test_what_an_update_is_depends_on_the_method() -> None:
    fedavg = {"name": "fedavg", "trainable": "lora", "lora": {"rank": 2, "alpha": 2.0}}
    factors = {A: torch.tensor([[3.0, 0.0]]), B: torch.tensor([[0.0], [4.0]])}
    assert of(fedavg, factors) == {"weights": 5.0}  # √(3² + 4²)
    stacked = of({**fedavg, "aggregation": "stack"}, {**factors, "head": torch.tensor([5.0])})
    assert stacked == {"update": 13.0}  # B·A has one number, 12, and alpha / rank is 1
    scaffold = of({"name": "fedavg"}, {"w": torch.tensor([3.0]), "control:w": torch.tensor([-70.0])})
    assert scaffold == {"weights": 3.0, "control": 70.0}
    drawn = {"seeds": torch.tensor([1, 7, 1]), "scalars": torch.tensor([1.0, 4.0, 2.0])}
    assert of({"name": "fedkseed", "seeds": 8}, drawn) == {"update": 5.0}  # 1 + 2 of seed 1, 4 of seed 7
    assert of({"name": "infinite-pool"}, drawn) == {"update": 5.0}
    block = {
        "0:w": torch.tensor([3.0, 4.0]),
        "heads:0": torch.tensor([1e9]),
        "channels:0": torch.tensor([1e9]),
    }
    assert of({"name": "fedbavg"}, block) == {"update": 5.0}


def test_clients_of_different_ranks_are_compared_place_by_place() -> None:
    lora = method({"name": "fedavg", "trainable": "lora", "lora": {"rank": 2}})
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, generator=generator), torch.randn(4, 2, generator=generator)
    whole = {A: torch.cat([a[:1], torch.zeros(1, 3)]), B: torch.cat([b[:, :1], torch.zeros(4, 1)], 1)}
    cut = {A: a[:1], B: b[:, :1]}
    vectors = [lora.updates().vectors(sent)["weights"] for sent in (whole, cut)]
    found = {client: {"weights": sketch(vector)} for client, vector in enumerate(vectors)}
    assert standings(found, {0: 1, 1: 1})[0].cosine["weights"] == pytest.approx(1.0, abs=1e-6)


def test_scaffolds_control_variates_stand_out_on_their_own() -> None:
    parts = {c: {"weights": sketch([torch.ones(1)]), "control": sketch([torch.ones(1)])} for c in range(3)}
    parts[2]["control"] = sketch([torch.tensor([1000.0])])
    found = standings(parts, dict.fromkeys(range(3), 1))
    assert "the norm of its update of the control, 1000" in found[2].why
    assert found[2].entry == {"norm": 1.0, "cosine": 1.0, "control_norm": 1000.0, "control_cosine": 1.0}


@pytest.mark.parametrize(("times", "out"), [(31.0, False), (33.0, True)])
def test_control_variates_may_differ_more(times: float, out: bool) -> None:
    parts = {c: {"weights": sketch([torch.ones(1)]), "control": sketch([torch.ones(1)])} for c in range(3)}
    parts[1]["control"] = sketch([torch.tensor([times])])
    assert bool(standings(parts, dict.fromkeys(range(3), 1))[1].why) == out
