"""Where an adapter sits, in families of every kind: against models with rewritten feed-forward networks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import edit_json, tokenizer
from per_layer_models import BASE, KINDS, LATENT, LLAMA4, MOE, logits, made
from torch import Tensor, nn

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.bottleneck import find_bottlenecks, remove_bottlenecks, sits_as_before
from fedtune.models.load import load_model
from fedtune.models.save import load_result, save_result
from fedtune.models.tuning import attach_adapter

TWO = {"num_hidden_layers": 2}
PLAIN = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "head_dim")}
SMALL = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
# Kind, settings, and the module that the family's own code adds to the residual.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": ("mixtral", MOE | TWO, "mlp"),
    "experts, dense blocks between": ("qwen3_moe", MOE | {"decoder_sparse_step": 2} | TWO, "mlp"),
    "a shared expert, gated": ("qwen2_moe", MOE | TWO, "mlp"),
    "shared experts": ("deepseek_v3", LATENT | {"first_k_dense_replace": 1} | TWO, "mlp"),
    "a router's scores beside": ("gpt_oss", MOE | TWO, "mlp"),
    "tokens without a batch": ("llama4_text", LLAMA4 | TWO, "feed_forward"),
    "experts before attention": ("jetmoe", MOE | {"kv_channels": 8} | TWO, "mlp"),
    "experts by another name": ("granitemoe", MOE | TWO, "block_sparse_moe"),
    "an MLP before its mixer": (
        "bamba",
        BASE | SSM | TWO | {"attn_layer_indices": [1]},
        "feed_forward",
    ),
    "parallel to attention": ("gpt_neox", PLAIN | TWO, "mlp"),
    "parallel, without a norm between": ("gptj", SMALL, "mlp"),
    "norms behind": ("olmo3", BASE | TWO | {"layer_types": KINDS}, "mlp"),
    "no module of its own": (
        "opt",
        {k: v for k, v in PLAIN.items() if k != "intermediate_size"}
        | TWO
        | {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "fc2",
    ),
}


def rewrite(module: nn.Module, down: nn.Linear, up: nn.Linear) -> None:
    """Makes a feed-forward network give h + up(gelu(down(h))) of its h, with an adapter's weights."""
    old = module.forward
    d, b, u, c = (p.detach().clone() for p in (down.weight, down.bias, up.weight, up.bias))

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = old(*args, **kwargs)
        hidden: Tensor = given[0] if isinstance(given, tuple) else given
        inner = hidden @ d.T + b
        hidden = hidden + (inner * (1 + torch.erf(inner / 2**0.5)) / 2) @ u.T + c
        return (hidden, *given[1:]) if isinstance(given, tuple) else hidden

    module.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_changes_what_the_feed_forward_network_gives_and_nothing_else(name: str) -> None:
    kind, settings, path = FAMILIES[name]
    model = made(kind, settings)
    plain = logits(model)
    attach_adapter(model, size=3, seed=0)
    adapters = list(find_bottlenecks(model).values())
    assert len(adapters) == 2
    assert torch.equal(logits(model), plain)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters:
            for parameter in adapter.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    got = logits(model)
    remove_bottlenecks(model)
    assert torch.equal(logits(model), plain)
    for block, adapter in zip(find_blocks(model).modules, adapters, strict=True):
        rewrite(block.get_submodule(path), adapter.down, adapter.up)
    torch.testing.assert_close(got, logits(model), rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("mamba", {"vocab_size": 64, "hidden_size": 32, "state_size": 4} | TWO, "consists of mixer"),
        (
            "granitemoeshared",
            MOE | TWO | {"shared_intermediate_size": 16},
            "consists of self_attn, block_sparse_moe, shared_mlp",
        ),
    ],
)
def test_where_there_is_no_one_feed_forward_network_an_adapter_is_refused(
    kind: str, settings: dict[str, Any], says: str
) -> None:
    model = made(kind, settings)
    with pytest.raises(InputError, match=rf"method.trainable adapter: .*{says}\. Use lora"):
        attach_adapter(model, size=3, seed=0)
    assert not find_bottlenecks(model)


def test_an_adapter_of_before_is_read_where_it_sits_the_same(tmp_path: Path) -> None:
    """Version 0.1.0 put it after a block's last linear layer: in Mixtral the attention's."""
    assert sits_as_before(made("gpt2", {k: v for k, v in SMALL.items() if k != "rotary_dim"}))
    assert not sits_as_before(made("deepseek_v3", LATENT | {"first_k_dense_replace": 1} | TWO))
    for kind, settings in (("llama", BASE | TWO), ("mixtral", MOE | TWO)):
        base, result = tmp_path / kind, tmp_path / f"{kind}-result"
        made(kind, settings).save_pretrained(base)
        tokenizer().save_pretrained(base)
        load = partial(load_model, dtype="float32", initial="pretrained", seed=0, base=tmp_path)
        loaded = load(kind)
        save_result(attach_adapter(loaded.model, size=2, seed=0), loaded.tokenizer, result)
        edit_json(result / "adapter.json", placement="after the last linear layer of each block")
        if kind == "llama":
            assert find_bottlenecks(load_result(result, load).model)
        else:
            with pytest.raises(InputError, match=r"put adapters elsewhere in MixtralForCausalLM"):
                load_result(result, load)
