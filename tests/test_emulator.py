"""Which blocks an emulator has, in integers, and models built from blocks for every family of decoders."""

from __future__ import annotations

import copy
import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from model_families import DECODERS, batch, build
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.emulator import (
    ARCHITECTURE,
    EMULATORS,
    Block,
    Cut,
    channel_pruning,
    cut,
    flops_per_token,
    kept_blocks,
    layer_dropout,
    submodel,
    take,
)
from fedtune.models.emulator import build as build_from
from fedtune.models.pruning import find_mlp, kept_channels, largest_channels, pad_mlp

families = pytest.mark.parametrize("family", DECODERS)


@pytest.mark.parametrize(
    ("adapter", "dropout", "kept"), [(2, 0.2, 24), (4, 0.2, 22), (2, 0.5, 15), (4, 0.5, 14)]
)
def test_the_papers_emulators_of_32_layers(adapter: int, dropout: float, kept: int) -> None:
    for both_ends in (False, True):
        places = cut(32, adapter, both_ends=both_ends)
        assert len(places.middle) == 32 - adapter
        assert len(kept_blocks(len(places.middle), dropout)) == kept


def test_24_of_30_blocks() -> None:
    wanted = "0,1,2,3,5,6,7,8,10,11,12,13,15,16,17,18,20,21,22,23,25,26,27,29"
    assert ",".join(map(str, kept_blocks(30, 0.2))) == wanted


def test_adapters() -> None:
    assert cut(6, 2, both_ends=False) == Cut((), (0, 1, 2, 3), (4, 5))
    assert cut(6, 2, both_ends=True) == Cut((0,), (1, 2, 3, 4), (5,))
    assert cut(32, 4, both_ends=True).adapter == (0, 1, 30, 31)
    assert cut(32, 4, both_ends=False).adapter == (28, 29, 30, 31)


@given(blocks=st.integers(2, 400), hundredths=st.integers(0, 999))
@example(blocks=100, hundredths=710)  # (1 − 0.71) · 100 is 29.000000000000004 in floats
@example(blocks=10, hundredths=700)  # and (1 − 0.7) · 10 is 3.0000000000000004, (1 − 0.9) · 10 0.99999…
@example(blocks=20, hundredths=900)
@example(blocks=50, hundredths=180)
def test_kept_blocks_are_exact(blocks: int, hundredths: int) -> None:
    dropout = hundredths / 1000
    exact = (1000 - hundredths) * blocks // 1000
    if exact < 2:
        with pytest.raises(InputError, match=f"leaves {exact}; an emulator needs at least 2"):
            kept_blocks(blocks, dropout)
        return
    kept = kept_blocks(blocks, dropout)
    assert len(kept) == exact and (kept[0], kept[-1]) == (0, blocks - 1)
    assert list(kept) == sorted(set(kept))
    steps = {b - a for a, b in itertools.pairwise(kept)}
    assert max(steps) - min(steps) <= 1  # evenly spaced
    assert kept == tuple(math.floor(Fraction(j * (blocks - 1), exact - 1)) for j in range(exact))
    if not hundredths:
        assert kept == tuple(range(blocks))


@pytest.mark.parametrize(
    ("layers", "adapter", "both_ends", "says"),
    [
        (4, 3, False, "3 of the model's 4 blocks leave 1 for the emulator; it needs at least 2"),
        (4, 4, True, "leave 0 for the emulator"),
        (4, 9, False, "leave 0 for the emulator"),
        (8, 3, True, "both ends get half of it; got 3, not even"),
    ],
)
def test_adapters_that_leave_nothing_to_emulate(
    layers: int, adapter: int, both_ends: bool, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        cut(layers, adapter, both_ends=both_ends)


def logits(model: nn.Module, **changes: Tensor) -> Tensor:
    with torch.no_grad():
        inputs = {k: v for k, v in batch("llama").items() if k != "labels"} | changes
        result: Tensor = model(**inputs).logits
    return result


def storages(model: nn.Module) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]]


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_built_from_all_its_blocks_a_model_is_itself(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype, blocks=3)
    described = submodel(model, take(model, range(3)))
    again = build_from(described)
    assert type(again) is type(model) and not again.training
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
    # on the same memory: an emulator on the server costs nothing, and tied tensors came once
    assert set(storages(again)) <= set(storages(model))
    sent = sum(t.numel() for name, t in described.items() if name != ARCHITECTURE and t.is_floating_point())
    assert sent == sum(
        t.numel() for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    )


@families
@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_stay_tied(family: str, tied: bool) -> None:
    config = copy.deepcopy(DECODERS[family])
    config.tie_word_embeddings = tied
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    described = submodel(model, take(model, [1]))
    again = build_from({name: tensor.clone() for name, tensor in described.items()})

    def is_tied(model: PreTrainedModel) -> bool:
        return model.get_input_embeddings().weight is model.get_output_embeddings().weight

    assert is_tied(model) == is_tied(again) == tied
    with torch.no_grad():
        again.get_input_embeddings().weight[5] += 1
    assert torch.equal(again.get_output_embeddings().weight, again.get_input_embeddings().weight) == tied


def uncached(model: PreTrainedModel, ids: Tensor, tokens: int) -> Tensor:
    """Greedy decoding from scratch for every token."""
    with torch.no_grad():
        for _ in range(tokens):
            step = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
            ids = torch.cat([ids, step.argmax(-1, keepdim=True)], 1)
    return ids


@families
@pytest.mark.parametrize("emulator", EMULATORS)
@pytest.mark.parametrize("both_ends", [False, True])
def test_cached_generation_is_uncached_generation(family: str, emulator: str, both_ends: bool) -> None:
    model = build(family, blocks=7)
    places = cut(7, 2, both_ends=both_ends)
    blocks = [
        *take(model, places.front),
        *EMULATORS[emulator](model, places.middle, 0.4),
        *take(model, places.back),
    ]
    small = build_from(submodel(model, blocks))
    count = 2 + (3 if emulator == "layer-dropout" else 5)
    assert len(find_blocks(small).modules) == small.config.num_hidden_layers == count
    indices = [m.layer_idx for m in small.modules() if getattr(m, "layer_idx", None) is not None]
    assert sorted(set(indices)) in (list(range(count)), [])
    ids = torch.tensor([[1, 9, 33], [1, 41, 12]])
    with torch.no_grad():
        cached = small.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6,
            do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    assert torch.equal(cached, uncached(small, ids, 6))
    assert not torch.equal(logits(small), logits(model))


def one_by_one(model: PreTrainedModel, keep: list[int]) -> PreTrainedModel:
    """The plain way: the model without the other blocks."""
    small = copy.deepcopy(model)
    blocks = find_blocks(small).modules
    for index in reversed(range(len(blocks))):
        if index not in keep:
            del blocks[index]
    small.config.num_hidden_layers = len(keep)
    return small


@families
def test_layer_dropout_computes_what_the_model_without_those_blocks_does(family: str) -> None:
    model = build(family, blocks=6)
    blocks = layer_dropout(model, range(1, 5), 0.5)
    assert [block.origin for block in blocks] == [1, 4]
    ends = [*take(model, [0]), *blocks, *take(model, [5])]
    plain = one_by_one(model, [0, 1, 4, 5])
    with torch.no_grad():
        wanted = plain(**{k: v for k, v in batch("llama").items() if k != "labels"}, use_cache=False).logits
    assert torch.equal(logits(build_from(submodel(model, ends))), wanted)


def mixed_gemma3(blocks: int = 6) -> PreTrainedModel:
    config = copy.deepcopy(DECODERS["gemma3"])
    config.num_hidden_layers, config.sliding_window = blocks, 2
    config.layer_types = ["sliding_attention", "full_attention"] * (blocks // 2)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model


def test_unlike_blocks_keep_their_kind() -> None:
    model = mixed_gemma3()
    small = build_from(submodel(model, take(model, [0, 3, 5])))
    assert small.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert [m.is_sliding for m in small.modules() if hasattr(m, "is_sliding")] == [True, False, False]
    swapped = build_from(submodel(model, [Block(1, take(model, [0])[0].tensors), *take(model, [3, 5])]))
    assert not torch.equal(logits(small), logits(swapped))  # the kind matters here


def test_a_list_that_is_only_by_chance_as_long_as_the_model_is_deep_stays() -> None:
    model = build("llama", blocks=3)
    model.config.eos_token_id = [2, 3, 4]
    small = build_from(submodel(model, take(model, [0, 2])))
    assert small.config.eos_token_id == [2, 3, 4] and small.config.architectures == model.config.architectures


def test_a_model_whose_blocks_know_their_index_is_refused_unless_whole() -> None:
    config = copy.deepcopy(DECODERS["gpt2"])
    config.scale_attn_by_inverse_layer_idx, config.n_layer = True, 3
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert torch.equal(logits(build_from(submodel(model, take(model, range(3))))), logits(model))
    with pytest.raises(InputError, match="scale_attn_by_inverse_layer_idx"):
        submodel(model, take(model, [0, 2]))


@families
@pytest.mark.parametrize("dropout", [0.0, 0.3, 0.9])
def test_channels_pruned_and_padded_compute_the_same(family: str, dropout: float) -> None:
    model = build(family, blocks=3)
    whole = find_blocks(model).modules
    pruned = channel_pruning(model, [0, 1], dropout)
    width = find_mlp(whole[0]).width
    for block in pruned:
        channels = largest_channels(whole[block.origin], take(model, [block.origin])[0].tensors, dropout)
        assert (
            len(channels)
            == kept_channels(width, dropout)
            == max(1, math.floor(round((1 - dropout) * 100) * width / 100))
        )
        assert channels.tolist() == sorted(set(channels.tolist()))
    last = take(model, [2])
    small = build_from(submodel(model, [*pruned, *last]))
    mlp = find_mlp(find_blocks(small).modules[0])
    assert mlp.width == kept_channels(width, dropout)
    padded = [Block(b.origin, pad_mlp(whole[b.origin], b.tensors)) for b in pruned]
    shapes = {n: t.shape for n, t in take(model, [0])[0].tensors.items()}
    assert {n: t.shape for n, t in padded[0].tensors.items()} == shapes
    large = build_from(submodel(model, [*padded, *last]))
    assert_close(logits(small), logits(large), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(small), logits(model)) == (dropout == 0)


def test_the_largest_channels_are_kept() -> None:
    model = build("llama", blocks=2)
    block = find_blocks(model).modules[0]
    with torch.no_grad():
        for path in find_mlp(block).ups:
            block.get_parameter(f"{path}.weight").fill_(0.1)
        down = block.get_parameter(f"{find_mlp(block).down}.weight")
        down.fill_(0.1)
        down[:, [3, 40]] = 5.0  # down's columns
        block.get_parameter(f"{find_mlp(block).ups[0]}.weight")[17] = 4.0  # a row into the MLP
    tensors = take(model, [0])[0].tensors
    assert largest_channels(block, tensors, 0.93).tolist() == [3, 17, 40]  # ⌊0.07 · 48⌋ = 3


def test_of_equal_channels_the_first_are_kept() -> None:
    model = build("llama", blocks=2)
    block = find_blocks(model).modules[0]
    tensors = {name: torch.ones_like(t) for name, t in take(model, [0])[0].tensors.items()}
    for dropout, kept in ((0.5, 24), (0.93, 3), (0.99, 1), (0.0, 48)):
        assert largest_channels(block, tensors, dropout).tolist() == list(range(kept))
    tensors[f"{find_mlp(block).down}.weight"][:, 40] = 2.0
    assert largest_channels(block, tensors, 0.93).tolist() == [0, 1, 40]


@pytest.mark.parametrize("what", ["missing", "foreign", "class"])
def test_a_description_that_does_not_hold_is_refused(what: str) -> None:
    model = build("llama", blocks=2)
    described: dict[str, Any] = submodel(model, take(model, [0, 1]))
    if what == "missing":
        described.pop("model.layers.1.mlp.up_proj.weight")
    elif what == "foreign":
        described["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    else:
        text = bytes(described[ARCHITECTURE].numpy()).replace(b"LlamaForCausalLM", b"LlamaConfig", 1)
        described[ARCHITECTURE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    says = {
        "missing": "layers.1.mlp.up_proj",
        "foreign": "layers.7.mlp.up_proj",
        "class": "class is 'LlamaConfig'",
    }
    with pytest.raises(InputError, match=says[what]):
        build_from(described)


def test_flops_by_hand() -> None:
    # 10 a block; 3 blocks forward, the last one backward: 3 + 1 - 1; with both ends all three: 3 + 3 - 1
    assert flops_per_token(10, Cut((), (0, 1), (2,))) == 30
    assert flops_per_token(10, Cut((0,), (1,), (2,))) == 50
