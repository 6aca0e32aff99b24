"""Tiny random models of every family (vocabulary 64, width 32, 2 blocks), and every way to train them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from fedtune.models.lora import attach_lora
from fedtune.models.tuning import (
    attach_adapter,
    attach_p_tuning,
    attach_prompt,
    train_all,
    trainable,
)

BLOCKS = 2
# Far above the usual 0.02: attention and positions must matter in a model that was never trained.
SCALE = {"initializer_range": 0.3}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **SCALE}
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    **TOKENS,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
DECODERS: dict[str, PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "qwen2": transformers.Qwen2Config(**COMMON, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**GROUPED),
    "gemma": transformers.GemmaConfig(**GROUPED),
    "gemma3": transformers.Gemma3TextConfig(**GROUPED),
    "mistral": transformers.MistralConfig(**GROUPED),
    "gpt2": transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=BLOCKS, n_head=4, n_positions=64, **TOKENS
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**COMMON),
    "opt": transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        init_std=0.3,
        **TOKENS,
    ),
    "bloom": transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=BLOCKS, n_head=4, **TOKENS),
}
ENCODERS: dict[str, PretrainedConfig] = {
    "roberta": transformers.RobertaConfig(**COMMON, num_labels=3),
    "bert": transformers.BertConfig(**COMMON, num_labels=3),
}
FAMILIES = {**DECODERS, **ENCODERS}


def build(family: str, dtype: torch.dtype = torch.float32, blocks: int = BLOCKS) -> PreTrainedModel:
    """The family's tiny model in eval mode, always the same weights."""
    config = copy.deepcopy(FAMILIES[family])
    if blocks != BLOCKS:
        if hasattr(config, "layer_types"):
            config.layer_types = [config.layer_types[0]] * blocks
        config.num_hidden_layers = blocks
    auto = (
        transformers.AutoModelForSequenceClassification
        if family in ENCODERS
        else transformers.AutoModelForCausalLM
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)
        model = auto.from_config(config, dtype=dtype)
        for (
            parameter
        ) in model.parameters():  # biases start at 0 and norms at 1, where mistakes would not show
            parameter.data.add_(0.1 * torch.randn(parameter.shape).to(dtype))
    model.name_or_path = "tiny"
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(4, 64))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_folder(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, blocks: int = BLOCKS
) -> Path:
    """A complete Hugging Face folder with the family's model."""
    build(family, dtype, blocks).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def batch(family: str) -> dict[str, torch.Tensor]:
    """Two rows of 5 tokens, the second with two padding tokens at its end, with labels."""
    ids = torch.tensor([[1, 9, 33, 50, 17], [1, 41, 12, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([2, 0]) if family in ENCODERS else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


ATTACH = {
    "full": lambda model, seed: train_all(model),
    "lora": lambda model, seed: attach_lora(model, rank=2, alpha=4, dropout=0.0, targets=None, seed=seed),
    "adapter": lambda model, seed: attach_adapter(model, size=3, seed=seed),
    "prompt": lambda model, seed: attach_prompt(model, tokens=4, seed=seed),
    "p-tuning": lambda model, seed: attach_p_tuning(model, tokens=4, hidden=6, seed=seed),
}
DTYPES = [torch.float32, torch.bfloat16]


def wake(model: nn.Module) -> None:
    """Gives what starts at 0 (LoRA's B, the adapter's up) values, so that everything has a gradient."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.1 * noise).to(parameter.dtype))
