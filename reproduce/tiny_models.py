"""A tiny random model of every family, made from its configuration: width 16, a vocabulary of 64 words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

WORDS = 64
IDS = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE: dict[str, Any] = {
    **IDS,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
SHARED: dict[str, Any] = {**WIDE, "num_key_value_heads": 2}  # two heads share a key
GROUPED: dict[str, Any] = {**SHARED, "head_dim": 4}
EXPERTS: dict[str, Any] = {
    **GROUPED,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "shared_expert_intermediate_size": 8,
}
LATENT: dict[str, Any] = {
    **{key: value for key, value in EXPERTS.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
}
STATE = {**IDS, "hidden_size": 16, "state_size": 4}
WINDOW = {**GROUPED, "sliding_window": 8}
BERT = WIDE


def kinds(*each: str) -> Callable[[int], dict[str, Any]]:
    """Blocks of these kinds in turn."""
    return lambda blocks: {"layer_types": [each[block % len(each)] for block in range(blocks)]}


LOCAL = kinds("sliding_attention", "full_attention")
LINEAR = kinds("linear_attention", "full_attention")


def layers(name: str) -> Callable[[int], dict[str, Any]]:
    """Where the number of blocks has another name."""
    return lambda blocks: {name: blocks}


# Settings, and what of them depends on the number of blocks.
DECODERS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]] | None]] = {
    "gpt_neox": (WIDE, None),
    "falcon": ({**IDS, "hidden_size": 16, "num_attention_heads": 4}, None),
    "llama": (GROUPED, None),
    "llama4_text": ({**EXPERTS, "intermediate_size_mlp": 24, "attention_chunk_size": 8}, None),
    "mixtral": (EXPERTS, None),
    "qwen3_moe": (EXPERTS, None),
    "qwen3_next": (
        {
            **EXPERTS,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
        },
        LINEAR,
    ),
    "gemma3_text": (WINDOW, LOCAL),
    "phi": (SHARED, None),
    "phi3": (SHARED, None),
    "cohere": (SHARED, None),
    "granite": (SHARED, None),
    "olmo2": (SHARED, None),
    "smollm3": (SHARED, None),
    "glm4": (GROUPED, None),
    "gpt_oss": ({**EXPERTS, "sliding_window": 8}, LOCAL),
    "deepseek_v3": (LATENT, None),
    "mamba": (STATE, None),
    "jamba": (
        {
            **SHARED,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        None,
    ),
    "recurrent_gemma": (
        {**SHARED, "num_key_value_heads": 1, "lru_width": 16, "attention_window_size": 8},
        None,
    ),
}
ENCODERS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]] | None]] = {
    "bert": (BERT, None),
    "distilbert": (
        {**IDS, "dim": 16, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 64},
        layers("n_layers"),
    ),
    "albert": ({**BERT, "embedding_size": 8}, None),
    "modernbert": (
        {**BERT, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
        None,
    ),
    "deberta-v2": (BERT, None),
}
FAMILIES = (*DECODERS, *ENCODERS)


def settings_of(family: str, blocks: int) -> PretrainedConfig:
    """The configuration of the family's tiny model with so many blocks."""
    fixed, varying = {**DECODERS, **ENCODERS}[family]
    config: PretrainedConfig = AutoConfig.for_model(
        family, **{**fixed, **(varying(blocks) if varying else {}), "num_hidden_layers": blocks}
    )
    return config


def save(family: str, blocks: int, folder: Path) -> Path:
    """A whole folder of the family's tiny model, always the same weights."""
    auto: Any = AutoModelForSequenceClassification if family in ENCODERS else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        model: nn.Module = auto.from_config(settings_of(family, blocks))
        with torch.no_grad():
            for parameter in model.parameters():  # what usually begins at 0 or 1 too
                parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(4, WORDS))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
