"""Prefix tuning (Li & Liang 2021): trained keys and values in front of the text, in every block.

    softmax(q [P_k; K]ᵀ) [P_v; V]          P_k, P_v: (tokens, key-value heads, head width) of each block

They begin as the keys and values that the model itself has of entries of its vocabulary, drawn from a seed:
the paper found real activations better than noise (section 7.4). That also says what shape they have,
whatever a family calls the numbers of its heads, and whether the model has any.

Deviation: no MLP stands between what is trained and the prefix, which the paper has for noise's sake.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel, PrefixTuningConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.heads import is_classifier
from fedtune.models.wrapping import attach, task_type


def attach_prefix(model: PreTrainedModel, *, tokens: int, seed: int) -> PeftModel:
    """Puts a prefix of `tokens` keys and values into each block, in place.

    Raises:
        InputError: The model classifies; or it does not keep keys and values of one shape in every block, or
            does not look at those that it is given.
    """
    if is_classifier(model):
        raise InputError(
            f"method.trainable prefix is for models that generate, and {type(model).__name__} classifies; "
            "use prompt or lora"
        )
    words = cast(Tensor, model.get_input_embeddings().weight)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(words.shape[0], (1, tokens), generator=generator)
    held = _held(model, drawn.to(words.device))  # (blocks, 2, heads, tokens, width)
    blocks, _, heads, _, width = held.shape
    config = PrefixTuningConfig(
        task_type=task_type(model),
        num_virtual_tokens=tokens,
        num_layers=blocks,
        num_attention_heads=heads,
        token_dim=heads * width,
        num_transformer_submodules=1,
    )
    wrapped = attach(model, config, seed)
    prefix = wrapped.prompt_encoder["default"].get_parameter("embedding.weight")
    if held.is_meta or isinstance(held, FakeTensor):  # a plan: shapes count
        return wrapped
    with torch.no_grad():  # PEFT cuts a row into blocks, then keys and values, then heads
        prefix.copy_(held.permute(3, 0, 1, 2, 4).reshape(tokens, -1))
    _require_used(wrapped, drawn.to(words.device), blocks)
    return wrapped


def _held(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Keys and values that a model keeps of some tokens: (blocks, 2, heads, tokens, width)."""
    training = model.training
    with torch.no_grad():
        try:
            out: Any = model.eval()(input_ids=ids, use_cache=True)
        finally:
            model.train(training)
    cache = getattr(out, "past_key_values", None) or getattr(out, "cache", None)
    found = []
    for layer in getattr(cache, "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.shape == values.shape:
            found.append(torch.stack([keys[0], values[0]]))
    count = len(find_blocks(model).modules)
    alike = {tuple(one.shape) for one in found}
    if len(found) != count or len(alike) != 1 or found[0].ndim != 4 or found[0].shape[2] != ids.shape[1]:
        raise InputError(
            "method.trainable prefix needs keys and values of one shape in every block, and "
            f"{type(model).__name__} keeps such in {len(found)} of {count}; use prompt or lora"
        )
    return torch.stack(found)


def _require_used(model: PeftModel, ids: Tensor, blocks: int) -> None:
    """Raises InputError if the model gives the same whatever its prefix is, in any block."""
    prefix = model.prompt_encoder["default"].get_parameter("embedding.weight")
    mask = torch.ones_like(ids)
    training = model.training
    model.eval()
    with torch.enable_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        gradient = None
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad(logits.float().square().mean(), [prefix], allow_unused=True)
    model.train(training)
    moved = gradient is not None and gradient.reshape(len(prefix), blocks, -1).abs().sum((0, 2)).bool().all()
    if not moved:
        raise InputError(
            f"method.trainable prefix: {type(model.get_base_model()).__name__} does not look at a prefix in "
            "every block; use prompt or lora"
        )
