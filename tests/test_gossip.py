"""FedKSeed without a server: graphs, weights by hand, and the central run's bits where all are neighbours."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch
from fedkseed_bench import text, tiny, toy
from pydantic import ValidationError
from toy import Bench, items

from fedtune.config.file import parse_config
from fedtune.errors import InputError
from fedtune.methods.fedkseed.gossip import Graph, Message, mixed, neighbours, shares
from fedtune.methods.fedkseed.method import FedKSeed
from fedtune.methods.fedkseed.settings import Config, ProConfig
from fedtune.models.tuning import trainable

DATA = {0: items(3), 1: items(5, 6, 7), 2: items(1, 2)}


def test_graphs_by_hand() -> None:
    assert neighbours("ring", [7, 2, 5, 4], 2, 0, 1) == {2: [4, 7], 4: [2, 5], 5: [4, 7], 7: [2, 5]}
    assert neighbours("ring", [3, 1], 2, 0, 1) == {1: [3], 3: [1]}
    assert neighbours("full", [0, 1, 2], 2, 0, 1) == {0: [1, 2], 1: [0, 2], 2: [0, 1]}
    for graph in ("ring", "full", "random"):
        assert neighbours(graph, [4], 2, 0, 1) == {4: []}
    drawn = [neighbours("random", range(9), 2, 0, round) for round in (1, 2)]
    assert drawn[0] != drawn[1] and drawn[0] == neighbours("random", range(9), 2, 0, 1)
    for graph_ in drawn:
        assert all(len(others) >= 2 and client not in others for client, others in graph_.items())
        assert all(client in graph_[other] for client, others in graph_.items() for other in others)
    assert neighbours("random", range(3), 9, 0, 1) == neighbours("full", range(3), 9, 0, 1)


@pytest.mark.parametrize("graph", ["ring", "full", "random"])
@pytest.mark.parametrize(("often", "clients"), [(0.3, 4), (1, 10), (None, 1)])
def test_a_round_of_one_client_is_refused(graph: Graph, often: float | int | None, clients: int) -> None:
    """A third of four clients is one: nobody else is there to pass sums on to."""
    document = {
        "data": {"clients": clients},
        "method": {"name": "fedkseed", "graph": graph},
        "federation": {"clients_per_round": often},
    }
    with pytest.raises(InputError, match=f"graph: {graph} has each client .* nobody would hear of anybody"):
        parse_config(document, "test")
    parse_config({**document, "method": {"name": "fedkseed"}}, "test")
    two = {"data": {"clients": 10}, "federation": {"clients_per_round": 2}}
    parse_config({**document, **two}, "test")


def test_weights_by_hand() -> None:
    # a path of 1, 2 and 5 examples: S is 3, 8, 7
    found = shares({0: [1], 1: [0, 2], 2: [1]}, {0: 1, 1: 2, 2: 5})
    assert found == {0: [1 - 2 / 8, 2 / 8], 1: [1 - 1 / 8 - 5 / 8, 1 / 8, 5 / 8], 2: [1 - 2 / 8, 2 / 8]}
    assert shares({0: []}, {0: 3}) == {0: [1.0]}


@pytest.mark.parametrize("graph", ["ring", "full", "random"])
def test_the_mean_by_examples_is_that_of_one_accumulator(graph: Graph) -> None:
    draw = random.Random(graph)
    for round in range(20):
        examples = {client: draw.randint(1, 40) for client in range(draw.randint(1, 9))}
        graph_ = neighbours(graph, list(examples), 2, 5, round)
        weights = shares(graph_, examples)
        for client in examples:
            assert min(weights[client]) > 0 and sum(weights[client]) == pytest.approx(1)
            got = sum(
                examples[i] * (weights[i][0] if i == client else weights[i][1 + graph_[i].index(client)])
                for i in examples
                if i == client or client in graph_[i]
            )
            assert got == pytest.approx(examples[client])
        if graph == "full":
            total = sum(examples.values())
            assert all(weights[i][0] == float(Fraction(examples[i], total)) for i in examples)


def test_mixing_by_hand() -> None:
    own = Message(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 0]), torch.tensor([4.0, 2.0]).double())
    other = Message(torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1]), torch.tensor([8.0]).double())
    # own b is (7, 0, 2), the other's (3, 8, 0)
    assert mixed(own, [other], [0.75, 0.25]).tolist() == [6.0, 2.0, 1.5]
    assert mixed(own, [], [1.0]).tolist() == [7.0, 0.0, 2.0]


def ran(rounds: int, **settings: object) -> Bench:
    fixed = {"seeds": 16, "local_steps": 3, "lr": 1e-2, "epsilon": 1e-3, "rounds": rounds}
    b = Bench(FedKSeed(Config.model_validate({**fixed, **settings}), seed=0), tiny(), text())
    for round in range(1, rounds + 1):
        b.round(round)
    return b


@pytest.mark.parametrize("more", [{}, {"seeds": 4}, {"perturbations": 2, "noise": "rademacher"}])
def test_a_full_graph_has_the_central_runs_bits(more: dict[str, object]) -> None:
    central, peers = ran(3, **more), ran(3, graph="full", **more)
    assert sorted(peers.state.peers) == ["0", "1", "2"]
    for accumulator in peers.state.peers.values():
        assert torch.equal(accumulator, central.state.accumulator)
    wanted, names = dict[str, torch.Tensor](), list[str]()
    for _, model in central.method.export(central.state, central.model):
        wanted = {name: p.detach().clone() for name, p in trainable(model).items()}
    for name, model in peers.method.export(peers.state, peers.model):
        names.append(name)
        assert all(torch.equal(p, wanted[n]) for n, p in trainable(model).items())
    assert names == ["client-0000", "client-0001", "client-0002"]


def test_on_a_ring_of_five_peers_differ_and_come_closer() -> None:
    data = {client: items(client + 1) for client in range(5)}
    b = toy(data, graph="ring", lr=0.01)
    b.round(1)
    b.round(2)
    apart = torch.stack(list(b.state.peers.values()))
    assert not torch.equal(apart[0], apart[2])
    graph = neighbours("ring", range(5), 2, 0, 1)
    weights = shares(graph, dict.fromkeys(range(5), 1))
    each = list(apart)
    for _ in range(200):  # rounds in which nobody takes a step
        silent = [Message(a, torch.zeros(0, dtype=torch.int64), torch.zeros(0).double()) for a in each]
        each = [mixed(silent[i], [silent[j] for j in graph[i]], weights[i]) for i in range(5)]
    together = torch.stack(each)
    torch.testing.assert_close(together, apart.mean(0).expand(5, -1), rtol=1e-4, atol=1e-5)


def test_bytes_are_those_of_the_neighbours_messages() -> None:
    """K = 16 and 3 steps: a message is 64 bytes of a and 6 of each step."""
    b = ran(2, graph="ring")
    sent = {
        way: {e["payload_bytes"] for e in b.wire if e["direction"] == way and e["round"] == 2}
        for way in ("down", "up")
    }
    about = {e["payload_bytes"] for e in b.wire if e["direction"] == "down" and e["round"] == 1}
    assert sent["up"] == {64 + 3 * 6}
    fixed = about.pop() - 64  # what it belongs to, and the checksum
    assert sent["down"] == {fixed + 2 * (64 + 3 * 6) + 3 * 8} and not about


def test_who_was_away_goes_on_with_its_own() -> None:
    b = toy(DATA, graph="full", local_steps=2)
    b.round(1)
    first = dict(b.state.peers)
    b.round(2, per_round=2)
    (away,) = {"0", "1", "2"} - set(b.state.examples)
    assert torch.equal(b.state.peers[away], first[away])
    assert all(not torch.equal(b.state.peers[c], first[c]) for c in b.state.examples)
    b.round(3)
    assert len(b.state.examples) == 3


def test_a_peer_that_lost_what_it_held_is_left_out_and_comes_back() -> None:
    b = toy(DATA, graph="ring", local_steps=2)
    b.round(1)
    del b.runner.states[1]
    outcome = b.round(2, quorum=2)
    assert "holds no accumulator any more" in outcome.left_out[1]
    assert sorted(b.round(3).clients) == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"degree": 3}, "degree has no effect with graph: None; it belongs to random"),
        ({"graph": "ring", "degree": 3}, "it belongs to random"),
        ({"graph": "full", "clip": 1.0}, "graph: full has no server, and clip is what one does"),
        ({"graph": "full", "aggregation": "trimmed-mean"}, "and aggregation is what one does"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config.model_validate(settings)
    with pytest.raises(ValidationError, match="fedkseed-pro needs one"):
        ProConfig.model_validate({"graph": "ring"})


def test_a_server_that_would_have_to_be_there_is_refused() -> None:
    method = FedKSeed(Config(graph="ring"), seed=0)
    for said in (
        method.sum_refusal(privacy=False),
        method.mean_refusal("median"),
        method.bound_refusal(quantile=False),
    ):
        assert said and said.startswith("graph: ring has no server")
    assert not isinstance(said, InputError)
