"""What a configuration says of single blocks stays with them where others are left out, or is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_families import build as family
from model_families import save_folder, tokenizer
from per_layer_models import BASE, KINDS, LATENT, LLAMA4, MOE, NEO, logits, made, without
from toy import Bench

from fedtune.config.file import parse_config
from fedtune.data.encoded import Encoded
from fedtune.errors import InputError
from fedtune.methods import registry
from fedtune.methods.fedbiot.settings import Config as FedBiOTConfig
from fedtune.methods.fedcybgd.settings import Config
from fedtune.models.blocks import find_blocks
from fedtune.models.compression import check_blocks_go
from fedtune.models.emulator import build, submodel, take
from fedtune.models.per_layer import with_blocks
from fedtune.planning.plan import plan

WINDOW = BASE | {"sliding_window": 2}
KEPT = ([1, 2, 3, 4, 5], [0, 3, 5], [1, 4], [2])
GO: dict[str, tuple[str, dict[str, Any]]] = {
    "one entry a block": ("gemma3_text", WINDOW | {"layer_types": KINDS * 3}),
    "derived from a pattern": ("gemma2", WINDOW),
    "max_window_layers": ("qwen2", WINDOW | {"use_sliding_window": True, "max_window_layers": 3}),
    "mlp_only_layers": ("qwen2_moe", MOE | {"mlp_only_layers": [0, 3]}),
    "mlp_only_layers, all": ("qwen2_moe", MOE | {"mlp_only_layers": [0, 1, 2, 3, 4, 5]}),
    "decoder_sparse_step": ("qwen3_moe", MOE | {"decoder_sparse_step": 3}),
    "both": ("qwen2_moe", MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    "first_k_dense_replace": ("deepseek_v3", LATENT | {"first_k_dense_replace": 3}),
    "interleave_moe_layer_step": ("llama4_text", LLAMA4 | {"interleave_moe_layer_step": 2}),
    "moe_layers": ("llama4_text", LLAMA4 | {"moe_layers": [1, 4]}),
    "moe_layers, all": ("llama4_text", LLAMA4 | {"moe_layers": [0, 1, 2, 3, 4, 5]}),
    "no_rope_layers": ("llama4_text", LLAMA4 | {"no_rope_layers": [1, 0, 1, 1, 0, 1]}),
    "no_rope_layer_interval": ("smollm3", BASE | {"no_rope_layer_interval": 2}),
    "attention_types": ("gpt_neo", NEO | {"attention_types": [[["global"], 2], [["local"], 4]]}),
    "num_dense_layers": ("lfm2_moe", MOE | {"num_dense_layers": 2, "layer_types": ["conv", KINDS[1]] * 3}),
}
STAY: dict[str, tuple[str, dict[str, Any], str]] = {
    "step": (
        "ernie4_5_moe",
        MOE | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 4},
        "moe_layer_end_index, moe_layer_interval, moe_layer_start_index",
    ),
    "scale": (
        "gpt2",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 6, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
        r"attn\.scaling.*scale_attn_by_inverse_layer_idx",
    ),
    "depth": ("diffllama", BASE, r"lambda_init: 0\.355.*which block it is"),
    "first": (
        "modernbert-decoder",
        {k: v for k, v in BASE.items() if k != "head_dim"} | {"local_attention": 4},
        "block 1 of ModernBertDecoderForCausalLM .*attn_norm: LayerNorm, then Identity",
    ),
}


@pytest.mark.parametrize("name", GO)
def test_a_smaller_model_is_the_whole_one_in_which_the_other_blocks_do_nothing(name: str) -> None:
    kind, settings = GO[name]
    model = made(kind, settings)
    check_blocks_go(model)
    for keep in KEPT:
        small = build(submodel(model, take(model, keep)))
        assert len(find_blocks(small).modules) == len(keep)
        assert torch.equal(logits(small), logits(without(model, keep))), keep
        assert not torch.equal(logits(small), logits(model)), keep


@pytest.mark.parametrize("name", STAY)
def test_blocks_that_would_change_are_refused_with_the_setting(name: str) -> None:
    kind, settings, says = STAY[name]
    model = made(kind, settings)
    with pytest.raises(InputError, match=says):
        check_blocks_go(model)
    whole = build(submodel(model, take(model, range(6))))
    assert torch.equal(logits(whole), logits(model))


def test_kinds_of_attention_that_are_counted_in_runs() -> None:
    """GPT-Neo's global, global, local, local, local, local without the second and the third block."""
    kind, settings = GO["attention_types"]
    small = with_blocks(made(kind, settings).config, 6, [0, 3, 4, 5])
    assert small.attention_types == [[["global"], 1], [["local"], 1], [["local"], 1], [["local"], 1]]
    assert small.attention_layers == ["global", "local", "local", "local"]


def test_a_block_that_is_used_again_and_again_keeps_its_number_of_turns() -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    shape = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "head_dim")}
    model = AlbertForSequenceClassification(AlbertConfig(**shape, embedding_size=16)).eval()
    assert len(find_blocks(model).modules) == 1
    whole = build(submodel(model, take(model, [0])))
    assert whole.config.num_hidden_layers == 6
    ids = torch.tensor([[1, 9, 33]])
    with torch.no_grad():
        assert torch.equal(whole(input_ids=ids).logits, model(input_ids=ids).logits)


def test_infinity_in_a_configuration_reaches_the_clients() -> None:
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 4}
    model = made("falcon_h1", BASE | mamba | {"num_hidden_layers": 3})
    small = build(submodel(model, take(model, [0, 2])))
    assert small.config.time_step_limit == model.config.time_step_limit
    assert torch.equal(logits(small), logits(without(model, [0, 2])))


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
def test_clients_are_not_told_where_the_servers_model_lies(name: str) -> None:
    model = family(name)
    model.name_or_path = model.config.name_or_path = "/home/somebody/secret"
    sent = submodel(model, take(model, range(len(find_blocks(model).modules))))
    assert b"somebody" not in b"".join(bytes(t.flatten().view(torch.uint8).tolist()) for t in sent.values())


@pytest.mark.parametrize(
    "settings",
    [
        Config(compression="layer-drop"),
        FedBiOTConfig(adapter_layers=2, layer_dropout=0.5, alignment={"steps_before": 0, "steps": 0}),  # type: ignore[arg-type]
    ],
    ids=lambda settings: settings.name,
)
def test_a_method_that_leaves_blocks_out_refuses_before_its_first_round(settings: Any) -> None:
    method = registry.build(settings, 0)
    with pytest.raises(InputError, match="lambda_init"):
        method.client_model(lambda: made("diffllama", BASE))
    assert registry.build(settings, 0).client_model(lambda: made("gemma2", WINDOW)) is not None


@pytest.mark.parametrize("name", ["one entry a block", "both", "first_k_dense_replace", "moe_layers"])
@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedcybgd", "compression": "layer-drop", "local_steps": 1},
        {
            "name": "fedbiot", "layer_dropout": 0.5, "local_steps": 1,
            "lora": {"rank": 2, "targets": ["o_proj"]}, "alignment": {"steps_before": 1, "steps": 1},
        },
    ],
    ids=lambda method: method["name"],
)  # fmt: skip
def test_no_client_is_left_out(name: str, method: dict[str, Any]) -> None:
    """Before, turns failed with "does not fit its architecture", and the run ended as a success."""
    kind, settings = GO[name]
    config = parse_config(
        {
            "method": method,
            **({"data": {"public": {"source": "bundled"}}} if method["name"] == "fedbiot" else {}),
        },
        "test",
    ).method
    data = {client: [Encoded((1, 5 + client, 9), (1, 5 + client, 9))] * 2 for client in range(3)}
    built = registry.build(config, 0)
    if method["name"] == "fedbiot":  # the bench prepares a method without public examples
        prepare = built.prepare
        built.prepare = lambda server: prepare(replace(server, public=tuple(data[0])))  # type: ignore[method-assign]
    federation = Bench(built, made(kind, settings), data)
    outcome = federation.round(1)
    assert sorted(outcome.clients) == [0, 1, 2] and not outcome.left_out


def test_channels_of_experts_are_not_taken_for_those_of_an_mlp() -> None:
    """The shared expert's layers are linear, those of the others are not: pruning it alone prunes no MLP.

    FedBiOT's emulator takes channels out of all experts (test_pruned_families).
    """
    config = parse_config({"method": {"name": "fedcybgd", "compression": "hybrid"}}, "test").method
    with pytest.raises(InputError, match="Qwen2MoeDecoderLayer has none"):
        registry.build(config, 0).client_model(lambda: made("qwen2_moe", MOE))


def test_a_plan_refuses_what_the_run_would(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"model_type": "diffllama"}))
    tokenizer().save_pretrained(tmp_path)
    method = {"name": "fedcybgd", "compression": "layer-drop", "local_steps": 1}
    document = {"model": {"name": str(tmp_path)}, "method": method, "data": {"clients": 2}}
    with pytest.raises(InputError, match="lambda_init"):
        plan(parse_config(document, "test"), steps=False)
    save_folder(tmp_path / "llama", blocks=4)
    document["model"] = {"name": str(tmp_path / "llama")}
    assert plan(parse_config(document, "test"), steps=False).document["payload_bytes"]["down"] > 0


def test_a_list_of_two_words_in_a_model_of_two_blocks_stays() -> None:
    model = family("bert")
    model.config.pos_att_type = ["c2p", "p2c"]
    small = build(submodel(model, take(model, [1])))
    assert small.config.pos_att_type == ["c2p", "p2c"]
