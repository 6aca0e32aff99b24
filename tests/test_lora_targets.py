"""Which layers get LoRA: in families of every kind, by structure, and what is said of them beforehand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_families import build, save_folder
from peft import LoraConfig, get_peft_model
from per_layer_models import BASE, IDS, KINDS, LATENT, LLAMA4, MOE, logits, made
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from fedtune.config.file import parse_config
from fedtune.errors import InputError
from fedtune.models.lora import attach_lora
from fedtune.models.lora_targets import find_targets, tuned_modules, tuned_text
from fedtune.models.tuning import trainable
from fedtune.planning.modules import trained_modules

TWO = {"num_hidden_layers": 2}
QKVO = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
STATE = {"vocab_size": 64, "hidden_size": 32, "state_size": 4} | TWO
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Kind, settings, and what the family's own code mixes tokens with.
FOUND: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "one layer for three": ("phi3", BASE | TWO, ["self_attn.o_proj", "self_attn.qkv_proj"]),
    "experts": ("qwen3_moe", MOE | TWO, QKVO),
    "norms behind": ("olmo2", BASE | TWO, QKVO),
    "no positions in some": ("smollm3", BASE | TWO, QKVO),
    "scaled": ("granite", BASE | TWO, QKVO),
    "parallel": ("cohere", BASE | TWO, QKVO),
    "low-rank": (
        "deepseek_v3",
        LATENT | TWO | {"first_k_dense_replace": 1},
        [
            *("self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa"),
            *("self_attn.kv_b_proj", "self_attn.o_proj"),
        ],
    ),
    "no attention": ("mamba", STATE, ["mixer.in_proj", "mixer.x_proj"]),
    "no attention, of heads": (
        "mamba2",
        STATE | {"num_heads": 8, "head_dim": 8, "n_groups": 1},
        ["mixer.in_proj"],
    ),
    "both in turn": (
        "bamba",
        BASE | SSM | TWO | {"attn_layer_indices": [1]},
        ["mamba.in_proj", "mamba.out_proj", *QKVO],
    ),
    "linear attention": (
        "qwen3_next",
        MOE | TWO | LINEAR,
        ["linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba", "linear_attn.out_proj", *QKVO],
    ),
    "recurrence": (
        "recurrent_gemma",
        BASE | {"num_hidden_layers": 3, "lru_width": 32, "num_key_value_heads": 1},
        [f"temporal_block.{x}" for x in ("linear_y", "linear_x", "linear_out")]
        + [f"temporal_block.{x}_proj" for x in "qkvo"],
    ),
    "convolution": (
        "lfm2",
        BASE | TWO | {"layer_types": ["conv", "full_attention"]},
        ["conv.in_proj", "conv.out_proj", *QKVO[:3], "self_attn.out_proj"],
    ),
}


@pytest.mark.parametrize("label", FOUND)
def test_auto_finds_what_mixes_tokens(label: str) -> None:
    kind, settings, expected = FOUND[label]
    model = made(kind, settings)
    before = logits(model)
    assert find_targets(model, "auto") == find_targets(model, None) == find_targets(model, "attention")
    assert find_targets(model, "auto") == expected
    wrapped = attach_lora(model, rank=2, alpha=4, dropout=0.0, targets="auto", seed=0)
    assert list(tuned_modules(wrapped)) == expected or set(tuned_modules(wrapped)) == set(expected)
    if label == "no attention":  # without its kernel for training Mamba sums in another order
        assert_close(logits(wrapped), before, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits(wrapped), before)
    wrapped.train()
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in trainable(wrapped).items():  # each is called: what LoRA adds has an effect
        assert name.endswith(".lora_A.weight") or parameter.grad.any(), name


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            transformers.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
            [f"attention.{x}_lin" for x in ("q", "k", "v", "out")],
        ),
        (
            transformers.ModernBertConfig(
                vocab_size=64,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                cls_token_id=1,
                sep_token_id=2,
            ),
            ["attn.Wqkv", "attn.Wo"],
        ),
    ],
)
def test_encoders_have_it_too(config: Any, expected: list[str]) -> None:
    model = AutoModelForSequenceClassification.from_config(config)
    assert find_targets(model, "auto") == expected
    attach_lora(model, rank=2, alpha=4, dropout=0.0, targets="auto", seed=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "roberta", "opt"])
def test_where_peft_has_an_entry_it_is_taken_bit_for_bit(family: str) -> None:
    ours = attach_lora(build(family), rank=2, alpha=4, dropout=0.0, targets="auto", seed=3)
    kind = "SEQ_CLS" if family == "roberta" else "CAUSAL_LM"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        theirs = get_peft_model(build(family), LoraConfig(task_type=kind, r=2, lora_alpha=4))
    one, other = trainable(ours), trainable(theirs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_attention_and_all_linear() -> None:
    model = made("llama4_text", LLAMA4 | TWO)
    shared = [f"feed_forward.shared_expert.{x}_proj" for x in ("gate", "up", "down")]
    assert find_targets(model, "attention") == QKVO
    assert find_targets(model, "all-linear") == QKVO + shared  # the router gives two results
    assert find_targets(made("llama", BASE | TWO), "attention") == QKVO
    # of GPT-2 "mlp.c_proj" and "attn.c_proj" are two layers, of unlike paths in a block
    assert find_targets(build("gpt2"), "all-linear") == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]
    falcon = made("falcon", {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4} | TWO)
    assert len(find_targets(falcon, "all-linear")) == 4  # its linear layers are of its own class
    assert find_targets(made("llama", BASE | TWO), "attention", layers=[1]) == [
        f"model.layers.1.{path}" for path in QKVO
    ]


def test_what_cannot_have_it_is_refused_with_what_can() -> None:
    with pytest.raises(InputError, match=r"mlp.experts.gate_up_proj holds the weights of all experts in one"):
        find_targets(made("mixtral", MOE | TWO), ["experts.gate_up_proj"])
    with pytest.raises(InputError, match=r'named "dt_proj".*Linear layers: mixer.in_proj, mixer.x_proj'):
        find_targets(made("mamba", STATE), ["dt_proj"])
    small = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    with pytest.raises(InputError, match=r'"xlnet" has no linear layers in its attention.*ff.layer_1'):
        find_targets(made("xlnet", small), "auto")


def test_a_kernel_that_takes_weights_past_lora_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("mamba", STATE)
    code: Any = transformers.models.mamba.modeling_mamba
    plain = attach_lora(copy.deepcopy(model), rank=2, alpha=4, dropout=0.0, targets="auto", seed=0).train()
    expected = plain(input_ids=IDS).logits

    def kernel(*_: Any, **__: Any) -> Any:
        raise AssertionError("the kernel for training was called")

    monkeypatch.setattr(code, "mamba_inner_fn", kernel)
    assert torch.equal(plain(input_ids=IDS).logits, expected)
    with pytest.raises(AssertionError, match="the kernel"):
        model.train()(input_ids=IDS)


def test_what_will_be_trained_is_said_from_the_configuration_alone(tmp_path: Path) -> None:
    save_folder(tmp_path / "m", "llama")
    whole = sum(tensor.numel() for tensor in load_file(tmp_path / "m" / "model.safetensors").values())
    (tmp_path / "m" / "model.safetensors").unlink()

    def said(**method: Any) -> list[str]:
        document = {"model": {"name": str(tmp_path / "m")}, "method": method}
        return trained_modules(parse_config(document, "c"))

    lora = 2 * 2 * (16 * (32 + 32) + 16 * (32 + 16)) // 2  # q and v of two blocks, rank 16
    assert said(name="fedavg") == [
        f"trained: self_attn.q_proj, self_attn.v_proj (2 of each); {lora:,} of {lora + whole:,} parameters"
    ]
    assert said(name="fedkseed") == [f"trained: full; {whole:,} of {whole:,} parameters"]
    assert said(name="zero-shot") == ["trained: nothing"]
    made("olmoe", MOE | TWO).config.save_pretrained(tmp_path / "m")
    first, second = said(name="fedavg", lora={"targets": "all-linear"})
    assert first.startswith(f"trained: {', '.join(QKVO)} (2 of each); ")
    experts = "mlp.experts.gate_up_proj, mlp.experts.down_proj"
    assert second.endswith(f"no linear layers but hold all experts in one: {experts}")


def test_modules_as_a_text() -> None:
    assert tuned_text({"a": 2, "b": 1, "c": 2}) == "a, c (2 of each); b (1)"
    assert tuned_text({}) == ""
    assert KINDS
