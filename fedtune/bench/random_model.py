"""The model and the batch that steps are measured with: a random Llama and one sequence of random tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.models.load import seeded

TOKENS, VOCABULARY = 256, 32000
HIDDEN, LAYERS = 768, 12  # 110 million parameters


def random_llama(hidden: int = HIDDEN, layers: int = LAYERS) -> LlamaForCausalLM:
    """A float32 Llama with tied embeddings, always with the same weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
    )
    with seeded(0):
        return LlamaForCausalLM(config).eval()


def random_batch() -> dict[str, Tensor]:
    """One sequence of `TOKENS` tokens, each of which counts in the loss."""
    tokens = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
