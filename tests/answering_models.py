"""Small models of several families with peaked outputs, and a tokenizer of whole words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from fedtune.models.lora import attach_lora
from fedtune.models.tuning import attach_adapter, attach_p_tuning, attach_prompt

VOCABULARY = 48

PAD, BEGIN, END = 0, 1, 2


def tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    """Words w3 ... w47, split at blanks."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **special, **({"pad_token": "<pad>"} if pad else {})
    )


def llama(**changes: Any) -> LlamaForCausalLM:
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "initializer_range": 0.4,  # large, so that argmax has no near ties and answers vary
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**config | changes)))


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=96,
        initializer_range=0.4,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    return seeded(lambda: GPT2LMHeadModel(config))


def bloom() -> BloomForCausalLM:
    config = BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4, eos_token_id=END
    )
    return seeded(lambda: BloomForCausalLM(config))


def opt() -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        word_embed_proj_dim=32,
        init_std=0.4,
        eos_token_id=END,
        bos_token_id=BEGIN,
        pad_token_id=PAD,
    )
    return seeded(lambda: OPTForCausalLM(config))


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def shaken(model: nn.Module) -> Any:
    """Moves trained parameters away from where they start (LoRA's B and adapters start at zero)."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bloom": bloom,
    "opt": opt,
    "lora": lambda: shaken(attach_lora(llama(), rank=2, alpha=4, dropout=0.5, targets=None, seed=1)),
    "adapter": lambda: shaken(attach_adapter(llama(), size=4, seed=1)),
    "prompt on llama": lambda: shaken(attach_prompt(llama(), tokens=5, seed=1)),
    "prompt on gpt2": lambda: shaken(attach_prompt(gpt2(), tokens=5, seed=1)),
    "p-tuning": lambda: shaken(attach_p_tuning(llama(), tokens=5, hidden=16, seed=1)),
}
