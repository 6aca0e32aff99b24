"""How many tokens a model sees at once: the one answer for training, evaluation, plans and checks.

Counted are the positions that a model has embeddings for, or that it was trained on: a rotary model computes
beyond them and was never taught to. A sliding window is no limit: what is before it is seen through the
layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PretrainedConfig

# Positions start after the padding token's id: so many of them are never used.
_AFTER_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
# Distances between tokens alone (ALiBi, T5's buckets, XLNet), or a state that is carried on.
_UNLIMITED = frozenset(
    {
        "bloom",
        "falcon_mamba",
        "mamba",
        "mamba2",
        "mpt",
        "mt5",
        "recurrent_gemma",
        "rwkv",
        "switch_transformers",
        "t5",
        "transfo-xl",
        "umt5",
        "xlnet",
        "xlstm",
    }
)
_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")
# Where the configuration's positions are those after scaling.
_SCALED_ALREADY = frozenset({"default", "llama3", "longrope", "mrope", "proportional", "su"})


def positions(config: PretrainedConfig) -> int | None:
    """Tokens that a model of this configuration has positions for; None where there is no limit."""
    text: Any = config.get_text_config(decoder=True)
    if text.model_type in _UNLIMITED or getattr(text, "alibi", False):
        return None
    found = next((getattr(text, name) for name in _NAMES if _count(getattr(text, name, None))), None)
    if found is None:
        return None
    if text.model_type in _AFTER_PADDING:
        return int(found) - int(text.pad_token_id or 0) - 1
    return int(found * _scale(text, found))


def context_length(model: Module, *, reserved: int = 0) -> int | None:
    """Tokens of text that the model can see at once; None where there is no limit (BLOOM).

    Args:
        model: Of transformers, PEFT-wrapped or not; a soft prompt takes its tokens.
        reserved: Tokens that are kept free for a soft prompt, of one that has none or fewer.
    """
    wrapped: Any = model
    inner = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped
    limit = positions(inner.config)
    return None if limit is None else limit - max(virtual_tokens(model), reserved)


def virtual_tokens(model: Module) -> int:
    """Tokens of a soft prompt before the text; 0 without one."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0


def has_prefix(model: Module) -> bool:
    """Whether its virtual tokens are keys and values, so that it gives no logits of them."""
    config: Any = getattr(model, "active_peft_config", None)
    return config is not None and config.peft_type == "PREFIX_TUNING"


def _count(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _scale(text: Any, found: int) -> float:
    """By how much RoPE scaling extends the positions that the configuration names."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    factor = rope.get("factor")
    # Gemma 3 has one for each kind of layer, and names the positions after scaling
    if any(isinstance(value, dict) for value in rope.values()) or kind in _SCALED_ALREADY or not factor:
        return 1.0
    if kind == "yarn" and _count(rope.get("original_max_position_embeddings")):
        return max(1.0, float(rope["original_max_position_embeddings"] * factor / found))
    return max(1.0, float(factor))
