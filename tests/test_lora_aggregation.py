"""Stacked, averaged and frozen LoRA factors on small matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close
from toy import Bench
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedtune.data.encoded import Encoded
from fedtune.methods.fedavg import lora_aggregation as lora
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config


def test_stack_by_hand() -> None:
    factors = [
        ({"m.lora_A.weight": torch.tensor([[1.0, 0.0]]), "m.lora_B.weight": torch.tensor([[2.0], [0.0]])}, 1),
        ({"m.lora_A.weight": torch.tensor([[0.0, 1.0]]), "m.lora_B.weight": torch.tensor([[0.0], [4.0]])}, 3),
    ]
    product = lora.stack({}, factors, {"m": 0.5})
    # ¼·½·[[2,0],[0,0]] + ¾·½·[[0,0],[0,4]]; the stack would hold 8 numbers, the product holds 4
    assert set(product) == {"m.dense"}
    assert product["m.dense"].tolist() == [[0.25, 0.0], [0.0, 1.5]]
    assert lora.stack(product, factors, {"m": 0.5})["m.dense"].tolist() == [[0.5, 0.0], [0.0, 3.0]]


def test_a_small_stack_stays_stacked_and_means_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [
        (
            {
                "m.lora_A.weight": torch.randn(rank, 30, generator=generator),
                "m.lora_B.weight": torch.randn(20, rank, generator=generator),
            },
            n,
        )
        for rank, n in ((2, 1), (3, 5))
    ]
    product = lora.stack({}, factors, {"m": 2.0})
    assert product["m.lora_A.weight"].shape == (5, 30) and product["m.lora_B.weight"].shape == (20, 5)
    exact = sum(2.0 * n / 6 * f["m.lora_B.weight"] @ f["m.lora_A.weight"] for f, n in factors)
    assert_close(product["m.lora_B.weight"] @ product["m.lora_A.weight"], exact)
    again = lora.stack(product, factors, {"m": 2.0})
    assert_close(again["m.lora_B.weight"] @ again["m.lora_A.weight"], 2 * exact)
    third = lora.stack(again, factors, {"m": 2.0})  # rank 15 > 20·30/50 = 12
    assert set(third) == {"m.dense"}
    assert_close(third["m.dense"], 3 * exact)


def test_cut_and_pad() -> None:
    whole = {
        "m.lora_A.weight": torch.arange(6.0).reshape(3, 2),
        "m.lora_B.weight": torch.arange(6.0).reshape(2, 3),
    }
    cut = lora.cut(whole, 1)
    assert cut["m.lora_A.weight"].tolist() == [[0, 1]] and cut["m.lora_B.weight"].tolist() == [[0], [3]]
    padded = lora.pad(cut, whole)
    assert padded["m.lora_A.weight"].tolist() == [[0, 1], [0, 0], [0, 0]]
    assert padded["m.lora_B.weight"].tolist() == [[0, 0, 0], [3, 0, 0]]


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape, max_position_embeddings=32)).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shape)
    ).eval()


def data(clients: int = 3) -> dict[int, list[Encoded]]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(3, 32, (clients * 4, 6), generator=generator).tolist()
    return {
        c: [Encoded(tuple(r), tuple(r)) for r in rows[4 * c : 4 * c + 3 + (c == 1)]] for c in range(clients)
    }


def settings(**changes: object) -> Config:
    return Config(
        **{"rounds": 2, "local_epochs": 2, "batch_size": 2, "lr": 0.05, "lora": {"rank": 4}, **changes}
    )


def effective(b: Bench) -> dict[str, torch.Tensor]:
    """The weights that the exported model computes with, base and update together."""
    for _, model in b.method.export(b.state, b.model):
        return {
            name: (layer.get_base_layer().weight + layer.get_delta_weight("default")).detach().clone()
            for name, layer in lora.lora_layers(model).items()
        }
    raise AssertionError


@pytest.mark.parametrize("make", [tiny, tiny_gpt2])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_stacking_gives_the_mean_product_where_averaging_factors_does_not(
    make: Callable[[], PreTrainedModel],
) -> None:
    one = Bench(FedAvg(settings(rounds=1, aggregation="stack"), seed=0), make(), data())
    replies: list = []
    step = one.method.server_step
    one.method.server_step = lambda state, incoming: step(state, replies.extend(incoming) or replies)
    before = effective(one)
    one.round(1)
    after = effective(one)
    total = sum(r.examples for r in replies)
    assert len(replies) == 3 and [r.examples for r in replies] == [3, 4, 3]
    for name, scale in one.state.scaling.items():
        assert scale == 32 / 4
        exact = sum(
            scale * r.examples / total * r.payload.tensors[name + lora.B] @ r.payload.tensors[name + lora.A]
            for r in replies
        )
        moved = after[name] - before[name]
        moved = moved.T if make is tiny_gpt2 else moved  # GPT-2 keeps its weights (in x out)
        assert_close(moved, exact, rtol=1e-4, atol=1e-6)
        mean_b = sum(r.examples / total * r.payload.tensors[name + lora.B] for r in replies)
        mean_a = sum(r.examples / total * r.payload.tensors[name + lora.A] for r in replies)
        assert not torch.allclose(moved, scale * mean_b @ mean_a, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("aggregation", ["mean", "stack", "freeze-a"])
def test_the_base_model_keeps_its_bits(aggregation: str) -> None:
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    b = Bench(FedAvg(settings(aggregation=aggregation), seed=0), model, data())
    b.round(1), b.round(2)
    effective(b)
    after = {n.replace(".base_layer", ""): p for n, p in b.model.get_base_model().named_parameters()}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_frozen_a_is_not_sent_and_does_not_move() -> None:
    b = Bench(FedAvg(settings(aggregation="freeze-a"), seed=0), tiny(), data())
    a_before = {n: p.clone() for n, p in b.model.named_parameters() if "lora_A" in n}
    b.round(1), b.round(2)
    assert all(name.endswith(lora.B) for name in b.state.weights)
    assert all(torch.equal(p, a_before[n]) for n, p in b.model.named_parameters() if "lora_A" in n)
    # 2 layers x (q, v) x B of 16x4 in float32, to and from 3 clients in 2 rounds
    assert sum(entry["payload_bytes"] for entry in b.wire) == 2 * 2 * 16 * 4 * 4 * 2 * 3 * 2


@pytest.mark.parametrize("aggregation", ["mean", "stack"])
def test_clients_of_unlike_rank_send_their_own_rank(aggregation: str) -> None:
    ranks = {"rank": 4, "client_ranks": [1, 4, 2]}
    b = Bench(FedAvg(settings(aggregation=aggregation, lora=ranks), seed=0), tiny(), data())
    b.round(1)
    up = {e["client"]: e["payload_bytes"] for e in b.wire if e["direction"] == "up"}
    assert up == {c: 2 * 2 * r * (16 + 16) * 4 for c, r in ((0, 1), (1, 4), (2, 2))}


def test_a_client_of_lower_rank_trains_as_a_model_of_that_rank() -> None:
    # rank 2 with alpha 16 has the scale of rank 4 with alpha 32; its A is cut from the larger one
    wide = Bench(
        FedAvg(settings(lora={"rank": 4, "alpha": 32.0, "client_ranks": [2]}), seed=0), tiny(), {0: data()[0]}
    )
    narrow = Bench(FedAvg(settings(lora={"rank": 2, "alpha": 16.0}), seed=0), tiny(), {0: data()[0]})
    start = {n: t[:2] if n.endswith(lora.A) else t[:, :2] for n, t in wide.state.weights.items()}
    narrow.state = type(narrow.state)(start, narrow.state.dtypes, narrow.state.scaling)
    wide.round(1), narrow.round(1)
    for name, tensor in narrow.state.weights.items():
        mine = wide.state.weights[name]
        assert_close(mine[:2] if name.endswith(lora.A) else mine[:, :2], tensor, rtol=1e-5, atol=1e-7)
