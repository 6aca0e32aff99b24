"""Compressed downloads: which blocks come, that pruning takes out what it says, and the bytes of it all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fedcybgd_bench import Spy, bench, part_of
from hypothesis import given
from hypothesis import strategies as st
from model_families import FAMILIES, batch, build
from torch import Tensor
from torch.testing import assert_close

from fedtune.core.seeds import derive_seed, torch_generator
from fedtune.core.types import Payload
from fedtune.data.batches import collate
from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.compression import architecture, assemble, check_drop, choose_blocks, kept_of
from fedtune.models.emulator import ARCHITECTURE
from fedtune.models.parts import find_parts
from fedtune.models.pruning import best, find_attention, find_mlp, group_scores, prune_groups

PRUNABLE = [family for family in FAMILIES if family not in ("bloom", "gpt_neox")]


@given(
    blocks=st.integers(1, 12), compression=st.sampled_from(["none", "layer-drop", "hybrid"]), data=st.data()
)
def test_own_blocks_always_come_whole_and_updated_ones_pruned(
    blocks: int, compression: Any, data: st.DataObject
) -> None:
    own = data.draw(st.sets(st.integers(0, blocks - 1), max_size=2))
    updated = data.draw(st.sets(st.integers(0, blocks - 1)))
    ratio = data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.9]))
    chosen = choose_blocks(blocks, own, updated, compression, ratio, torch_generator(3))
    assert list(chosen) == sorted(chosen) and own <= chosen.keys()
    pruned = {block for block, flag in chosen.items() if flag}
    if compression == "none":
        assert list(chosen) == list(range(blocks)) and not pruned
        return
    assert pruned == (updated - own if compression == "hybrid" else set())
    others = blocks - len(own) - len(pruned)
    assert len(chosen) == len(own) + len(pruned) + kept_of(others, ratio)


def test_dropping_is_drawn_at_random_and_half_of_32_blocks_stay() -> None:
    draws = [choose_blocks(32, {5}, set(), "layer-drop", 0.5, torch_generator(s)) for s in range(40)]
    assert {len(draw) for draw in draws} == {16}  # 15 of 31, and its own
    seen = {block for draw in draws for block in draw}
    assert seen == set(range(32)) and len({tuple(draw) for draw in draws}) == 40
    assert kept_of(10, 0.9) == 1 and kept_of(10, 0.7) == 3  # a float would say 0 and 3
    check_drop(10, 0.9)
    with pytest.raises(InputError, match=r"leaves none of them; at most 0.9 leaves one"):
        check_drop(10, 0.91)


@pytest.mark.parametrize("family", PRUNABLE)
def test_a_pruned_block_computes_what_the_whole_one_does_without_those_groups(family: str) -> None:
    model = build(family, blocks=3).eval()
    parts = find_parts(model)
    block = find_blocks(model).modules[1]
    groups = find_attention(block).groups
    assert groups == (2 if family in ("llama", "qwen2", "qwen3", "gemma", "gemma3", "mistral") else 4)
    heads = torch.tensor([0] if groups == 2 else [0, 3], dtype=torch.int32)
    channels = torch.arange(1, find_mlp(block).width, 3, dtype=torch.int32)
    whole = parts.tensors("1")
    pruned = prune_groups(block, whole, heads, channels)
    tensors = {p: pruned if p == "1" else parts.tensors(p) for p in ("0", "1", "2")}
    tensors |= {p: parts.tensors(p) for p in parts.parameters if not p.isdigit()}
    small = assemble(architecture(model, [0, 1, 2]), parts.path, tensors)
    zeroed = {n: t.clone() for n, t in whole.items()}
    attention, mlp = find_attention(block), find_mlp(block)
    path, width = attention.out
    gone = [c for g in range(groups) if g not in heads.tolist() for c in range(g * width, (g + 1) * width)]
    rest = [c for c in range(mlp.width) if c not in channels.tolist()]
    for layer, columns in ((path, gone), (mlp.down, rest)):  # GPT-2's weights lie the other way
        weight = zeroed[f"{layer}.weight"]
        (weight if family == "gpt2" else weight.T)[columns] = 0
    reference = assemble(architecture(model, [0, 1, 2]), parts.path, {**tensors, "1": zeroed})
    with torch.no_grad():
        got, wanted = small(**batch(family)).logits, reference(**batch(family)).logits
        assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, model(**batch(family)).logits, atol=1e-2)
    size = sum(t.nbytes for n, t in pruned.items() if n.endswith(".weight") and t.ndim == 2)
    full = sum(t.nbytes for n, t in whole.items() if n.endswith(".weight") and t.ndim == 2)
    # half of attention stays, and a third of the MLP
    linears = dict(block.named_modules())
    mlp_bytes = sum(linears[p].weight.nbytes for p in (*mlp.ups, mlp.down))
    assert size == (full - mlp_bytes) // 2 + mlp_bytes * len(channels) // mlp.width


@pytest.mark.parametrize("family", ["bloom", "gpt_neox"])
def test_attention_of_another_kind_is_refused(family: str) -> None:
    with pytest.raises(InputError, match="cannot take heads out of"):
        find_attention(find_blocks(build(family)).modules[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_importance_is_the_sum_of_weight_times_gradient(family: str) -> None:
    model = build(family).eval()
    block = find_blocks(model).modules[0]
    model(**batch(family)).loss.backward()
    weights = {n: p.detach() for n, p in block.named_parameters()}
    gradients = {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
    heads, channels = group_scores(block, weights, gradients)
    product = {n: (weights[n] * gradients[n]).abs() for n in weights}
    if family == "llama":  # head 1: its keys and values, and the two heads of queries that share them
        wanted: Tensor = product["self_attn.q_proj.weight"][16:32].sum()
        wanted += (
            product["self_attn.k_proj.weight"][8:16].sum() + product["self_attn.v_proj.weight"][8:16].sum()
        )
        wanted += product["self_attn.o_proj.weight"][:, 16:32].sum()
        channel = product["mlp.gate_proj.weight"][7].sum() + product["mlp.up_proj.weight"][7].sum()
        channel += product["mlp.down_proj.weight"][:, 7].sum()
    elif family == "gpt2":
        columns = [c + offset for offset in (0, 32, 64) for c in range(8, 16)]
        wanted = product["attn.c_attn.weight"][:, columns].sum() + product["attn.c_attn.bias"][columns].sum()
        wanted += product["attn.c_proj.weight"][8:16].sum()
        channel = product["mlp.c_fc.weight"][:, 7].sum() + product["mlp.c_fc.bias"][7]
        channel += product["mlp.c_proj.weight"][7].sum()
    else:
        wanted = sum(  # type: ignore[assignment]
            product[f"attention.self.{n}.weight"][8:16].sum()
            + product[f"attention.self.{n}.bias"][8:16].sum()
            for n in ("query", "key", "value")
        )
        wanted += product["attention.output.dense.weight"][:, 8:16].sum()
        channel = product["intermediate.dense.weight"][7].sum() + product["intermediate.dense.bias"][7]
        channel += product["output.dense.weight"][:, 7].sum()
    assert_close(heads[1], wanted, rtol=1e-5, atol=1e-6)
    assert_close(channels[7], channel, rtol=1e-5, atol=1e-6)


def test_the_best_groups_are_the_largest_and_of_equals_the_first() -> None:
    assert best(torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0]), 0.5).tolist() == [1, 3]
    assert best(torch.ones(5), 0.4).tolist() == [0, 1, 2]
    assert best(torch.ones(5), 0.99).tolist() == [0]


def sizes(payload: Payload) -> int:
    """Bytes of an order beside the blocks and what stands around them."""
    scalars = sum(len(str(value).encode()) for value in payload.scalars.values())
    return payload.tensors["architecture"].nbytes + scalars


def test_layer_drop_halves_the_blocks_to_the_byte() -> None:
    federation = bench(5, blocks=5, compression="layer-drop", drop_ratio=0.5)
    spy = Spy(federation)
    federation.round(1)
    # q and o 32×32, k and v 16×32, three of the MLP 48×32, two norms of 32; float32
    block = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32)
    around = 4 * (64 * 32 + 32 + 64 * 32) + 2 * 4 * 4  # embeddings, norm, head, two tables of 4 frequencies
    down = [e["payload_bytes"] for e in federation.wire if e["direction"] == "down"]
    up = [e["payload_bytes"] for e in federation.wire if e["direction"] == "up"]
    for size, (_, payload) in zip(down, spy.orders, strict=True):
        assert size == 3 * block + around + sizes(payload)  # its own and ⌊4 / 2⌋ others, of five
    assert up == [block] * 5


def test_hybrid_prunes_what_the_cycle_updated_to_the_byte() -> None:
    settings: dict[str, Any] = {"drop_ratio": 0.5, "prune_ratio": 0.5}
    federation = bench(5, blocks=5, compression="hybrid", **settings)
    spy = Spy(federation)
    federation.round(1)
    block = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32)
    pruned = 4 * ((2 * 32 * 32 + 2 * 16 * 32) // 2 + 3 * 24 * 32 + 2 * 32)  # 1 of 2 groups, 24 of 48 channels
    around = 4 * (64 * 32 + 32 + 64 * 32) + 2 * 4 * 4
    down = [e["payload_bytes"] for e in federation.wire if e["direction"] == "down"]
    for turn, (size, (_, payload)) in enumerate(zip(down, spy.orders, strict=True)):
        kept = (4 - turn) // 2  # of the blocks that are still to be updated
        assert size == (1 + kept) * block + turn * pruned + around + sizes(payload)
        assert {part_of(n) for n in payload.tensors} >= {str(b) for b in range(turn + 1)}
    up = [e["payload_bytes"] for e in federation.wire if e["direction"] == "up"]
    assert up == [block + 4 * (2 + 48)] * 5  # with one number a group and a channel
    whole = bench(5, blocks=5)
    whole.round(1)
    ledger, full = (sum(e["payload_bytes"] for e in f.wire) for f in (federation, whole))
    assert ledger < full
    # what was pruned in one cycle is whole, or dropped, in the next until it is updated again
    federation.round(2)
    first = spy.orders[5][1].tensors
    assert all(
        t.shape == federation.state.weights[n].shape
        for n, t in first.items()
        if n in federation.state.weights
    )


def test_a_pruned_block_is_the_updated_one_in_its_best_groups() -> None:
    federation = bench(3, compression="hybrid")
    spy = Spy(federation)
    federation.round(1)
    second = spy.orders[1][1]
    state = federation.states_on_the_way[0]
    scores = spy.replies[0].tensors
    assert torch.equal(state.heads["0"], best(scores["heads:0"], 0.5))
    assert torch.equal(state.channels["0"], best(scores["channels:0"], 0.5))
    kept = state.channels["0"].long()
    assert torch.equal(second.tensors["0:mlp.up_proj.weight"], state.weights["0:mlp.up_proj.weight"][kept])
    assert float(scores["channels:0"].min()) >= 0 and float(scores["channels:0"].max()) > 0


def test_a_score_that_is_negative_is_refused() -> None:
    federation = bench(3, compression="hybrid")
    spy = Spy(federation)
    spy.change[1] = lambda reply: Payload(
        {n: -t if n.startswith("heads:") else t for n, t in reply.tensors.items()}
    )
    assert "below 0" in federation.round(1, quorum=0.5).left_out[1]


def test_a_clients_model_keeps_no_keys_and_values() -> None:
    federation = bench(2, blocks=3, compression="layer-drop")
    spy = Spy(federation)
    federation.round(1)
    _, order = spy.orders[0]
    path = str(order.scalars["path"])
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in order.tensors.items():
        part, colon, inner = name.partition(":")
        if colon:
            parts.setdefault(part, {})[inner] = tensor
    model = assemble(order.tensors[ARCHITECTURE], path, parts)
    assert model.config.use_cache is False and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("wanted", "of_each"), [(1, [1, 1, 1]), (3, [2, 3, 3]), (10, [2, 3, 4])])
def test_importance_comes_from_some_own_examples_one_by_one(
    wanted: int, of_each: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []

    def noted(items: Any, pad_id: int) -> Any:
        looked.append(list(items))
        return collate(items, pad_id)

    monkeypatch.setattr("fedtune.methods.fedcybgd.client.collate", noted)
    federation = bench(3, compression="hybrid", importance_examples=wanted, local_epochs=1)
    spy = Spy(federation)
    federation.round(1)
    for client, _ in spy.orders:
        mine, looked = looked[: of_each[client]], looked[of_each[client] :]
        own = federation.data[client]
        drawn = torch_generator(derive_seed(0, "client", client, 1), "importance")
        order = torch.randperm(len(own), generator=drawn).tolist()[: of_each[client]]
        assert mine == [[own[at]] for at in order]
    assert looked == []
