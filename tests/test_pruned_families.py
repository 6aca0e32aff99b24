"""Channels taken out of joined layers and of experts: against whole models in which they give nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from per_layer_models import BASE, LATENT, LLAMA4, MOE, logits, made
from torch import Tensor

from fedtune.errors import InputError
from fedtune.methods import registry
from fedtune.models.blocks import find_blocks
from fedtune.models.emulator import Block, channel_pruning, cut, layer_dropout, submodel, take
from fedtune.models.emulator import build as build_from
from fedtune.models.pruning import find_mlp, largest_channels, pad_mlp

TWO = {"num_hidden_layers": 2}
# Kind, settings, and where in a block the weights out of the channels lie, which dimension is theirs.
FAMILIES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "gate and up in one": ("phi3", BASE | TWO, "mlp.down_proj.weight", 1),
    "the same, norms behind": ("glm4", BASE | TWO, "mlp.down_proj.weight", 1),
    "without a gate": ("starcoder2", BASE | TWO, "mlp.c_proj.weight", 1),
    "experts": ("mixtral", MOE | TWO, "mlp.experts.down_proj", 2),
    "experts beside a shared one": ("qwen2_moe", MOE | TWO, "mlp.experts.down_proj", 2),
    "experts of latent attention": (
        "deepseek_v3",
        LATENT | TWO | {"first_k_dense_replace": 0},
        "mlp.experts.down_proj",
        2,
    ),
    "gate and up in turn, with biases": ("gpt_oss", MOE | TWO, "mlp.experts.down_proj", 1),
    "linear attention": (
        "qwen3_next",
        MOE
        | TWO
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "mlp.experts.down_proj",
        2,
    ),
}


def silenced(weight: Tensor, dim: int, kept: Tensor) -> None:
    """Sets what comes out of all other channels to 0; of experts each has its own."""
    rows = kept if kept.ndim == 2 else kept[None]
    for expert, channels in enumerate(rows):
        own, along = (weight[expert], dim - 1) if kept.ndim == 2 else (weight, dim)
        others = [c for c in range(own.shape[along]) if c not in channels.tolist()]
        own.index_fill_(along, torch.tensor(others), 0.0)


@pytest.mark.parametrize("label", FAMILIES)
def test_what_is_left_computes_what_the_whole_does_without_the_others(label: str) -> None:
    kind, settings, out, dim = FAMILIES[label]
    model = made(kind, settings)
    pruned = channel_pruning(model, [0, 1], 0.5)
    small = build_from(submodel(model, pruned))
    silent = copy.deepcopy(model)
    for index, block in enumerate(find_blocks(silent).modules):
        kept = largest_channels(block, take(silent, [index])[0].tensors, 0.5)
        parameter = block.get_parameter(out)
        assert kept.shape[-1] == parameter.shape[dim] // 2
        with torch.no_grad():
            silenced(parameter, dim, kept)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(logits(small), logits(silent), rtol=1e-4, atol=1e-4)
    assert (logits(small) - logits(model)).abs().max() > 0.01
    blocks = find_blocks(model).modules
    padded = build_from(
        submodel(model, [Block(b.origin, pad_mlp(blocks[b.origin], b.tensors)) for b in pruned])
    )
    assert {n: p.shape for n, p in padded.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    torch.testing.assert_close(logits(padded), logits(small), rtol=1e-4, atol=1e-4)


def test_of_each_expert_the_largest_are_kept() -> None:
    block = find_blocks(made("gpt_oss", MOE | TWO)).modules[0]
    mlp = find_mlp(block, experts=True)
    assert (mlp.experts, mlp.width) == (4, 48)
    tensors = {place.name: torch.zeros_like(block.get_parameter(place.name)) for place in mlp.places}
    tensors["mlp.experts.down_proj"][0, 7] = 1.0  # (experts, channels, out)
    tensors["mlp.experts.gate_up_proj"][1, :, 2 * 9 + 1] = 1.0  # (experts, in, gate and up in turn): up of 9
    tensors["mlp.experts.gate_up_proj"][2, :, 2 * 30] = 1.0  # gate of 30
    found = largest_channels(block, tensors, 0.97)
    assert found.tolist() == [[7], [9], [30], [0]]


def test_a_layer_of_gate_and_up_by_hand() -> None:
    block = find_blocks(made("phi3", BASE | TWO)).modules[0]
    mlp = find_mlp(block)
    assert (mlp.ups, mlp.down, mlp.width) == (("mlp.gate_up_proj",), "mlp.down_proj", 48)
    tensors = {place.name: torch.zeros_like(block.get_parameter(place.name)) for place in mlp.places}
    tensors["mlp.gate_up_proj.weight"][5] = 2.0  # the gate of channel 5
    tensors["mlp.gate_up_proj.weight"][48 + 11] = 1.0  # the up of channel 11
    assert largest_channels(block, tensors, 0.95).tolist() == [5, 11]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama4_text", LLAMA4 | TWO),
        ("mamba", {"vocab_size": 64, "hidden_size": 32, "state_size": 4} | TWO),
    ],
)
def test_what_has_no_known_channels_is_refused_before_any_round(kind: str, settings: dict[str, Any]) -> None:
    model = made(kind, settings)
    with pytest.raises(InputError, match=r"channels can be taken out|cannot tell which module .* is its MLP"):
        channel_pruning(model, [0, 1], 0.5)
    with pytest.raises(InputError, match="has none that is known"):
        find_mlp(find_blocks(made("mixtral", MOE | TWO)).modules[0])  # hybrid downloads take no experts


def test_lora_on_pruned_layers_is_refused_by_name() -> None:
    config = registry.config_class("fedbiot").model_validate(
        {"emulator": "channel-pruning", "adapter_layers": 1, "lora": {"targets": "all-linear"}}
    )
    method = registry.build(config, 0)
    with pytest.raises(InputError, match=r"leave mlp.gate_up_proj, mlp.down_proj out of method.lora.targets"):
        method.client_model(lambda: made("phi3", BASE | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("blocks", "adapter", "ends", "says"),
    [
        (4, 3, False, "needs at least 2. Set method.adapter_layers=2 or less"),
        (3, 2, False, "needs at least 2. Set method.adapter_layers=1$"),
        (
            2,
            1,
            False,
            "needs at least 2. A model of 2 blocks is too small for this method; take a deeper one",
        ),
        (5, 4, True, "needs at least 2. Set method.adapter_layers=2$"),
        (3, 2, True, "A model of 3 blocks is too small"),
    ],
)
def test_a_small_model_is_told_what_helps(blocks: int, adapter: int, ends: bool, says: str) -> None:
    with pytest.raises(InputError, match=says):
        cut(blocks, adapter, both_ends=ends)


def test_so_is_one_of_which_too_much_is_left_out() -> None:
    model = made("llama", BASE | {"num_hidden_layers": 5})
    with pytest.raises(
        InputError,
        match=r"0.2 of 2 blocks leaves 1; .* Set method.adapter_layers=2 or less, or method.layer_drop",
    ):
        layer_dropout(model, [0, 1], 0.2)
    with pytest.raises(
        InputError, match=r"0.9 of 3 blocks leaves 0; .* 5 blocks is too small for this method"
    ):
        layer_dropout(model, [0, 1, 2], 0.9)
    assert [block.origin for block in layer_dropout(model, [0, 1, 2], 0.2)] == [0, 2]
