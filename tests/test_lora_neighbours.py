"""FlexLoRA, FedEx-LoRA, LoRA-FAIR and RoLoRA: worked out by hand, exact products, whole rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import FORMS, SIZES, Federation, whole
from reproduced import load
from torch import Tensor, nn
from torch.testing import assert_close

from fedtune.core.types import Reply
from fedtune.methods import registry
from fedtune.methods.fedavg import lora_aggregation as lora
from fedtune.methods.fedavg.fedex_lora import averaged
from fedtune.methods.fedavg.flexlora import factored
from fedtune.methods.fedavg.hetlora import SelfPruning, rank_of
from fedtune.methods.fedavg.hetlora import averaged as weighed
from fedtune.methods.fedavg.lora_fair import refined
from fedtune.methods.fedavg.rolora import fixed, moving
from fedtune.methods.fedavg.settings import Config, Prune

plan_measured = load("plan_measured")
A, B = "m" + lora.A, "m" + lora.B


def factors(a: list[list[float]], b: list[list[float]]) -> dict[str, Tensor]:
    return {A: torch.tensor(a), B: torch.tensor(b)}


def drawn(ranks: list[int], seed: int = 0) -> list[lora.Trained]:
    """Clients' factors of a layer of 7 inputs and 6 outputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [({A: normal(rank, 7), B: normal(6, rank)}, client + 1) for client, rank in enumerate(ranks)]


def exact(replies: list[lora.Trained]) -> Tensor:
    """Σ p_i B_i A_i, float64."""
    total = sum(n for _, n in replies)
    return torch.stack([n / total * f[B].double() @ f[A].double() for f, n in replies]).sum(0)


def test_flexlora_by_hand() -> None:
    # ¼ · [[8, 0], [0, 0]] + ¾ · [[0, 0], [0, 4]] = diag(2, 3): the larger part comes first
    replies = [
        (factors([[2.0, 0.0]], [[4.0], [0.0]]), 1),
        (factors([[0.0, 1.0]], [[0.0], [4.0]]), 3),
    ]
    new = factored(replies, factors([[9.0, 9.0]] * 2, [[0.0, 0.0]] * 2), {"m": 0.5})
    assert_close(new[A].abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert_close(new[B] @ new[A], torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    cut = lora.cut(new, 1)
    assert_close(cut[B] @ cut[A], torch.tensor([[0.0, 0.0], [0.0, 3.0]]))


@pytest.mark.parametrize("ranks", [[2, 2, 2], [1, 2, 3], [1], [6, 6]])
def test_flexlora_is_the_best_of_each_rank(ranks: list[int]) -> None:
    replies, wanted = drawn(ranks), exact(drawn(ranks))
    before = {A: torch.ones(4, 7), B: torch.zeros(6, 4)}
    new = factored(replies, before, {"m": 2.0})
    u, s, vh = torch.linalg.svd(wanted)
    for rank in range(1, 5):
        cut = lora.cut(new, rank)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert_close((cut[B] @ cut[A]).double(), best, rtol=1e-5, atol=1e-5)
    if sum(ranks) < 4:  # what the product does not have can still be trained
        assert torch.equal(new[A][sum(ranks) :], before[A][sum(ranks) :])
        assert not new[B][:, sum(ranks) :].any() and new[A].all(dim=1).any()


def test_fedex_by_hand() -> None:
    replies = [
        (factors([[1.0, 0.0]], [[4.0], [0.0]]), 2),
        (factors([[1.0, 1.0]], [[0.0], [2.0]]), 2),
    ]
    means, product = averaged(replies, {}, {"m": 3.0})
    assert means[A].tolist() == [[1.0, 0.5]] and means[B].tolist() == [[2.0], [1.0]]
    # ½ ([[4, 0], [0, 0]] + [[0, 0], [2, 2]]) − [[2, 1], [1, 0.5]] = [[0, −1], [0, 0.5]], times 3
    assert product["m.dense"].tolist() == [[0.0, -3.0], [0.0, 1.5]]
    _, twice = averaged(replies, product, {"m": 3.0})
    assert twice["m.dense"].tolist() == [[0.0, -6.0], [0.0, 3.0]]


def test_fedex_is_exact_where_plain_averaging_is_not() -> None:
    replies = drawn([2, 2, 2])
    means, product = averaged(replies, {}, {"m": 2.0})
    residual = product["m.dense"].double()
    assert_close(2.0 * (means[B] @ means[A]).double() + residual, 2.0 * exact(replies), rtol=1e-5, atol=1e-5)
    assert residual.norm() > 0.5 * (2.0 * exact(replies)).norm()


def test_lora_fair_by_hand() -> None:
    replies = [
        (factors([[1.0, 0.0]], [[4.0], [0.0]]), 2),
        (factors([[1.0, 1.0]], [[0.0], [2.0]]), 2),
    ]
    # A Aᵀ = 1.25; M Aᵀ = [[2, 0], [1, 1]] · [1, 0.5] = [2, 1.5]
    # (M − B A) Aᵀ = [2 − 2.5, 1.5 − 1.25] = [−0.5, 0.25]
    new = refined(replies, {"m": 1.0}, 0.25)
    assert_close(new[B], torch.tensor([[2.0 - 0.5 / 1.5], [1.0 + 0.25 / 1.5]]))
    assert new[A].tolist() == [[1.0, 0.5]]


def test_lora_fair_is_never_further_from_the_exact_product_than_the_means() -> None:
    for seed in range(20):
        replies = drawn([2, 2, 2], seed)
        means, wanted = lora.mean(replies), exact(replies)
        plain = (means[B].double() @ means[A].double() - wanted).norm()
        distances = [plain]
        for ridge in (10.0, 1.0, 0.1, 1e-9):
            new = refined(replies, {"m": 1.0}, ridge)
            distances.append((new[B].double() @ new[A].double() - wanted).norm())
        assert distances == sorted(distances, reverse=True)
        # with λ to 0 it is the projection on A's rows
        onto = torch.linalg.pinv(means[A].double()) @ means[A].double()
        assert_close(new[B].double() @ new[A].double(), wanted @ onto, rtol=1e-4, atol=1e-4)


def test_equal_clients_stay_as_they_are() -> None:
    one = drawn([2])[0][0]
    replies = [(one, 1), (one, 3)]
    assert_close(lora.mean(replies), one)
    assert_close(refined(replies, {"m": 1.0}, 0.5), one)
    assert not averaged(replies, {}, {"m": 1.0})[1]["m.dense"].abs().gt(1e-6).any()
    new = factored(replies, one, {"m": 1.0})
    assert_close(new[B] @ new[A], one[B] @ one[A])


def test_rolora_takes_turns_and_its_mean_is_exact() -> None:
    assert [fixed("x" + lora.A, r) for r in (1, 2, 3)] == [True, False, True]
    assert [fixed("x" + lora.B, r) for r in (1, 2, 3)] == [False, True, False]
    assert moving({"x" + lora.A: 1, "x" + lora.B: 2, "head": 3}, 2) == {"x" + lora.A: 1, "head": 3}
    federation = whole("fedavg", "alternate")
    start, first, second = (saved.state.tensors for saved in federation.saved[:3])
    for name in federation.state.weights:
        changed = [
            not torch.equal(one[f"weights/{name}"], other[f"weights/{name}"])
            for one, other in ((start, first), (first, second))
        ]
        assert changed == ([False, True] if name.endswith(lora.A) else [True, False]), name
    assert all(p.requires_grad for n, p in federation.model.named_parameters() if ".lora_" in n)


@pytest.mark.parametrize("label", ["residual", "svd"])
def test_the_server_holds_the_exact_mean_of_the_clients_models(label: str) -> None:
    """With a rank that holds any product, FlexLoRA too."""
    changes = {"lora": {"rank": 32, "alpha": 4.0}} if label == "svd" else {}
    federation = Federation("fedavg", label, **changes)
    seen: list[tuple[dict[str, Tensor], int]] = []
    step = federation.method.server_step

    def noting(state: Any, replies: Any) -> Any:
        def each() -> Any:
            for reply in replies:
                assert isinstance(reply, Reply)
                trained = {n: state.weights[n] + t for n, t in reply.payload.tensors.items()}
                seen.append((trained, reply.examples))
                yield reply

        return step(state, each())

    federation.method.server_step = noting
    for round in (1, 2):
        seen.clear()
        before = federation.state
        federation.round(round)
        for module, scale in federation.state.scaling.items():
            a, b = module + lora.A, module + lora.B
            wanted = torch.stack([scale * n / 6 * (t[b].double() @ t[a].double()) for t, n in seen]).sum(0)
            wanted = wanted + added(before.product, module)
            state = federation.state
            own = scale * (state.weights[b].double() @ state.weights[a].double())
            assert_close(own + added(state.product, module), wanted, rtol=1e-4, atol=1e-6)
    assert sum(SIZES.values()) == 6 and bool(federation.state.product) == (label == "residual")


def added(product: dict[str, Tensor], module: str) -> Tensor | float:
    if module + lora.DENSE in product:
        return product[module + lora.DENSE].double()
    if module + lora.A in product:
        return product[module + lora.B].double() @ product[module + lora.A].double()
    return 0.0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"aggregation": "svd", "arrival": "asynchronous", "rounds": 1}, "svd makes factors of all clients'"),
        ({"aggregation": "refine", "server_optimizer": {"name": "adam"}}, "server_optimizer mean"),
        ({"aggregation": "refine", "server_optimizer": {"lr": 0.5}}, "takes no server_optimizer.lr"),
        ({"aggregation": "residual", "lora": {"use_dora": True}}, "a row's length is no part of the product"),
        ({"aggregation": "residual", "lora": {"client_ranks": [1, 2]}}, "averages factors of one rank"),
        ({"aggregation": "mean", "ridge": 0.5}, "ridge has no effect with aggregation: mean"),
        ({"aggregation": "alternate", "rounds": 1, "arrival": "asynchronous"}, "trains B in odd rounds"),
        ({"aggregation": "svd", "trainable": "full"}, "is for trainable: lora"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        registry.config_class("fedavg").model_validate(settings)


def test_what_needs_each_clients_factors_is_not_summed() -> None:
    for aggregation in ("svd", "residual", "refine", "alternate"):
        config = registry.config_class("fedavg").model_validate({"aggregation": aggregation})
        method = registry.build(config, 0)
        assert aggregation in method.sum_refusal(privacy=False)
        assert (method.mean_refusal("median") is None) == (aggregation == "alternate")
        assert method.mean_refusal("krum") is None and method.bound_refusal(quantile=False) is None


@pytest.mark.parametrize("aggregation", ["svd", "residual", "refine", "alternate"])
def test_a_plan_is_what_a_run_measures(aggregation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = {"name": "fedavg", "rounds": 2, "batch_size": 4, "aggregation": aggregation}
    monkeypatch.setitem(plan_measured.FORMS, aggregation, form)
    row = plan_measured.compare("bundled", aggregation)
    assert (row["planned_down"], row["planned_up"]) == (row["down"], row["up"])
    assert row["planned_memory"] == pytest.approx(row["memory"], rel=0.02)
    assert row["planned_server_memory"] == pytest.approx(row["server_memory"], rel=0.02)
    assert {"svd", "residual", "refine", "alternate"} <= FORMS["fedavg"].keys()


def test_hetlora_by_hand() -> None:
    # products [[8, 0], [0, 0]] and [[0, 0], [0, 24]]: norms 8 and 24, so shares 1/4 and 3/4
    replies = [
        (factors([[2.0, 0.0]], [[4.0], [0.0]]), 7),
        (factors([[0.0, 3.0], [4.0, 0.0]], [[0.0, 0.0], [8.0, 0.0]]), 1),
    ]
    new = weighed(replies, factors([[9.0, 9.0]] * 2, [[9.0, 9.0]] * 2), {"m": 0.5})
    assert new[A].tolist() == [[0.5, 2.25], [3.0, 0.0]]
    assert new[B].tolist() == [[1.0, 0.0], [6.0, 0.0]]
    nothing = [(factors([[1.0, 3.0]], [[0.0], [0.0]]), 1), (factors([[3.0, 1.0]], [[0.0], [0.0]]), 9)]
    assert weighed(nothing, factors([[9.0, 9.0]], [[9.0], [9.0]]), {"m": 1.0})[A].tolist() == [[2.0, 2.0]]


def test_a_client_gives_up_the_ranks_that_became_smaller() -> None:
    start = factors([[1.0, 0.0], [0.0, 2.0]], [[1.0, 3.0], [0.0, 4.0]])
    parameters = {
        name: nn.Parameter(
            nn.functional.pad(t, (0, 0, 0, 1) if name == A else (0, 1))
        )  # of the adapter's rank
        for name, t in start.items()
    }
    pruning = SelfPruning(Prune(decay=0.5, penalty=0.1), start, parameters)
    assert pruning.kept == 1
    penalty = pruning.penalty()
    assert penalty.item() == pytest.approx(0.1 * 5 * 2)  # of the second rank: columns (3, 4), row (0, 2)
    penalty.backward()
    grown, grads = {n: p.detach().clone() for n, p in parameters.items()}, parameters[B].grad
    assert grads is not None and grads[:, 1].tolist() == pytest.approx([0.1 * 2 * 0.6, 0.1 * 2 * 0.8])
    assert grads[:, [0, 2]].abs().max() == 0  # neither what stays nor what the client does not have
    assert pruning.settled(grown) is grown  # as large as before
    smaller = grown | {A: grown[A] * 0.5}
    kept = pruning.settled(smaller)
    assert kept[A].tolist() == [[0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert kept[B].tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert smaller[A][1].tolist() == [0.0, 1.0]  # what was trained is left alone
    assert (rank_of(kept), rank_of(grown), rank_of(factors([[0.0, 0.0]], [[0.0]]))) == (1, 2, 1)


def test_ranks_that_went_are_sent_no_more() -> None:
    federation = whole("fedavg", "prune")
    sizes = {client: 0 for client in SIZES}
    fewer = set()
    for entry in federation.wire:
        if entry["direction"] == "down":
            before, now = sizes[entry["client"]], entry["payload_bytes"]
            assert not before or now <= before
            fewer |= {entry["client"]} if now < before else set()
            sizes[entry["client"]] = now
    assert fewer and federation.state.ranks.keys() == {str(client) for client in SIZES}
    began = {0: 2, 1: 4, 2: 2}
    assert {c for c, rank in began.items() if federation.state.ranks[str(c)] < rank} >= fewer


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prune": {}}, "prune belongs to aggregation: sparsity, got mean"),
        ({"prune": {}, "aggregation": "sparsity", "optimizer_in_backward": True}, "steps before"),
        ({"aggregation": "sparsity", "server_optimizer": {"name": "adam"}}, "makes factors of all clients'"),
        ({"aggregation": "sparsity", "own": ["lora_B"]}, "take mean or freeze-a"),
    ],
)
def test_what_hetlora_does_not_go_with(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Config.model_validate(settings)
