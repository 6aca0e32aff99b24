"""How many tokens a model sees, by families, and by what each does one token beyond."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from model_families import FAMILIES, build

from fedtune.models.context import context_length, positions
from fedtune.models.lora import attach_lora
from fedtune.models.tuning import attach_p_tuning, attach_prompt

ROPE = {"rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(max_position_embeddings=64), 64),
        (transformers.GPT2Config(n_positions=32), 32),
        (transformers.GPTJConfig(n_positions=40), 40),
        (transformers.OPTConfig(max_position_embeddings=48), 48),  # its own two more are not in the number
        (transformers.BertConfig(max_position_embeddings=24), 24),
        (transformers.RobertaConfig(max_position_embeddings=24, pad_token_id=1), 22),
        (transformers.RobertaConfig(max_position_embeddings=24, pad_token_id=0), 23),
        (transformers.XLMRobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (transformers.MPNetConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (transformers.BloomConfig(), None),
        (transformers.MptConfig(max_seq_len=64), None),
        (transformers.FalconConfig(alibi=True), None),
        (transformers.FalconConfig(alibi=False, max_position_embeddings=64), 64),
        (transformers.T5Config(), None),
        (transformers.XLNetConfig(), None),
        (transformers.MistralConfig(max_position_embeddings=64, sliding_window=8), 64),
        (transformers.MambaConfig(), None),
        (transformers.Gemma3Config(text_config={"max_position_embeddings": 96}), 96),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else str(value),
)
def test_positions(config: transformers.PretrainedConfig, expected: int | None) -> None:
    assert positions(config) == expected


@pytest.mark.parametrize(("first", "found"), [(None, 24), (0, 24), (-1, 24), (16, 16)])
def test_a_limit_that_says_nothing_is_passed_over(first: int | None, found: int) -> None:
    config = transformers.PretrainedConfig(max_position_embeddings=first, n_ctx=24)
    assert positions(config) == found


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 2048),
        ({"rope_type": "linear", "factor": 4.0}, 8192),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),  # as DeepSeek
        # Llama 3.1 names the positions after scaling
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 256,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            2048,
        ),
    ],
    ids=lambda value: str(value.get("rope_type")) if isinstance(value, dict) else str(value),
)
def test_rope_scaling(rope: dict[str, Any], expected: int) -> None:
    config = transformers.LlamaConfig(max_position_embeddings=2048, rope_parameters={**ROPE, **rope})
    assert positions(config) == expected


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "roberta"])
def test_one_token_more_has_no_position(family: str) -> None:
    model = build(family)
    limit = context_length(model)
    ids = torch.full((1, limit + 1), 5)
    assert torch.isfinite(model(input_ids=ids[:, :limit]).logits).all()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_soft_prompt_takes_its_tokens(family: str) -> None:
    limit = context_length(build(family))
    soft = attach_prompt(build(family), tokens=7, seed=0)
    inner = attach_p_tuning(build(family), tokens=5, hidden=4, seed=0)
    lora = attach_lora(build(family), rank=2, alpha=2, dropout=0, targets=None, seed=0)
    expected = [None] * 3 if limit is None else [limit - 7, limit - 5, limit]
    assert [context_length(model) for model in (soft, inner, lora)] == expected
    reserved = [None] * 3 if limit is None else [limit - 7, limit - 6, limit - 6]
    assert [context_length(model, reserved=6) for model in (soft, inner, lora)] == reserved


def test_a_prompt_at_the_limit_fits_and_one_token_more_does_not() -> None:
    model = attach_prompt(build("gpt2"), tokens=20, seed=0)
    ids = torch.full((2, 45), 5)
    mask = torch.ones_like(ids)
    assert context_length(model) == 44
    assert model(input_ids=ids[:, :44], attention_mask=mask[:, :44]).logits.shape[1] == 64
    with pytest.raises(IndexError):
        model(input_ids=ids, attention_mask=mask)


def test_a_copy_with_fewer_blocks_sees_as_much() -> None:
    assert positions(copy.deepcopy(build("llama", blocks=1).config)) == positions(build("llama").config) == 64
