"""Models of six blocks whose configurations say what each block is, and models with mixtures of experts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedtune.models.blocks import find_blocks

BLOCKS = 6
BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
MOE = BASE | {
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "shared_expert_intermediate_size": 24,
}
LATENT = {k: v for k, v in MOE.items() if k != "head_dim"} | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LLAMA4 = MOE | {"intermediate_size_mlp": 48, "attention_chunk_size": 3}
NEO = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": BLOCKS,
    "num_heads": 4,
    "window_size": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
}
KINDS = ["sliding_attention", "full_attention"]
IDS = torch.tensor([[1, 9, 33, 50, 17, 5, 44, 8], [1, 41, 12, 3, 9, 60, 22, 31]])


def made(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    """A model of this kind in eval mode, always the same weights, none of them as they usually begin."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    """Of two rows of eight tokens."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    return found


class _Nothing(nn.Module):
    """In place of a block: gives what comes in, in a tuple where the block gives one."""

    def __init__(self, block: nn.Module, tuples: int) -> None:
        super().__init__()
        self._tuples = tuples
        for name in ("attention_type", "layer_type", "is_sliding", "block_type"):
            if hasattr(block, name):  # asked for by the model that runs the block
                setattr(self, name, getattr(block, name))

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) + (None,) * (self._tuples - 1) if self._tuples else hidden_states


def without(model: PreTrainedModel, keep: list[int]) -> PreTrainedModel:
    """The whole model, in which the blocks that are not kept do nothing."""
    given: list[int] = []
    last = find_blocks(model).modules[-1]
    hook = last.register_forward_hook(
        lambda *seen: given.append(len(seen[2]) if isinstance(seen[2], tuple) else 0)
    )
    logits(model)
    hook.remove()
    copied = copy.deepcopy(model)
    blocks = find_blocks(copied).modules
    for index in range(len(blocks)):
        if index not in keep:
            blocks[index] = _Nothing(blocks[index], given[0])
    return copied
