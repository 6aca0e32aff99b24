"""Greedy answers to a set of prompts, in padded batches, equal to one prompt at a time.

The decoding loop is our own rather than `transformers.generate`: greedy search is a few lines, a hub model's
`generation_config` (sampling, penalties, forced tokens) must not leak into a comparison, and a soft prompt
has to stand between the padding and the text, which PEFT's own `generate` does not do.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from fedtune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    model: Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Answers each prompt greedily.

    Args:
        model: A causal language model of transformers, PEFT-wrapped or not (LoRA, prompt tuning, p-tuning).
        tokenizer: Gives the end-of-sequence token and turns the answers into text.
        prompts: Token ids, begin token included. What is longer than the model's context less
            `max_new_tokens` loses its start.
        max_new_tokens: The most tokens of an answer, the end-of-sequence token included.
        batch_size: Prompts decoded together.

    Returns:
        The answers in the order of the prompts, without prompt and special tokens.

    Raises:
        InputError: A prompt has no tokens, or `max_new_tokens` leaves no room in the model's context.
    """
    answers = generate_ids(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]


def generate_ids(
    model: Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[list[int]]:
    """As `generate`, but gives token ids, up to the end-of-sequence token and without it."""
    room = prompt_room(model, max_new_tokens)
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {place} has no tokens: give its example an instruction.")
    ends = _end_tokens(model, tokenizer)
    pad = next((i for i in (tokenizer.pad_token_id, *ends) if isinstance(i, int)), 0)  # any id: it is masked
    answers: list[list[int]] = [[] for _ in prompts]
    # Longest first: like lengths share a batch, and what does not fit in memory shows at once.
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    # not inference mode: buffers that a model updates while it runs (rope) must stay usable in training
    with evaluating(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = [list(prompts[place])[-room if room is not None else None :] for place in places]
            for place, ids in zip(places, _decode(model, batch, pad, ends, max_new_tokens), strict=True):
                answers[place] = ids
    return answers


def _decode(
    model: Module, prompts: list[list[int]], pad: int, ends: frozenset[int], max_new_tokens: int
) -> list[list[int]]:
    inner = _inner(model)
    device = next(inner.parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)  # (batch, width)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    inputs: dict[str, Tensor] = {"input_ids": ids}
    if virtual_tokens(model):
        inputs, mask = _with_soft_prompt(model, inner, prompts, ids, mask)
    takes = inspect.signature(inner.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    end_ids = torch.tensor(sorted(ends), device=device, dtype=torch.long)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    steps: list[Tensor] = []
    cache = None
    for _ in range(max_new_tokens):
        new = next(iter(inputs.values())).shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]  # padding takes no positions
        out = inner(
            **inputs,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": positions} if "position_ids" in takes else {}),
            **last_only,
        )
        token = out.logits[:, -1].argmax(-1)  # (batch,)
        steps.append(token)
        done |= torch.isin(token, end_ids)
        if done.all():
            break
        cache = out.past_key_values
        inputs = {"input_ids": token[:, None]}
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return [_until(row, ends) for row in torch.stack(steps, dim=1).tolist()]


def _with_soft_prompt(
    model: Any, inner: Any, prompts: list[list[int]], ids: Tensor, mask: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Embeds the batch as padding, soft prompt, text: so each row is what it would be alone, shifted."""
    if model.active_peft_config.peft_type not in ("PROMPT_TUNING", "P_TUNING"):
        raise InputError(f"cannot generate with {model.active_peft_config.peft_type}; merge it, or use LoRA.")
    embedded = inner.get_input_embeddings()(ids)  # (batch, width, dim)
    soft = model.get_prompt(len(prompts)).to(embedded.dtype)  # (batch, virtual, dim)
    ones = mask.new_ones(soft.shape[1])
    rows, masks = [], []
    for row, (prompt, virtual) in enumerate(zip(prompts, soft, strict=True)):
        gap = ids.shape[1] - len(prompt)
        rows.append(torch.cat([embedded[row, :gap], virtual, embedded[row, gap:]]))
        masks.append(torch.cat([mask[row, :gap], ones, mask[row, gap:]]))
    return {"inputs_embeds": torch.stack(rows)}, torch.stack(masks)


def _until(ids: list[int], ends: frozenset[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _end_tokens(model: Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokenizer's and the model's: chat models end their turn with a token of their own."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [tokenizer.eos_token_id, *listed] if isinstance(token, int))


def prompt_room(model: Module, max_new_tokens: int) -> int | None:
    """Tokens of a prompt that fit before an answer; None where there is no limit.

    Raises:
        InputError: There is no room for a prompt.
    """
    context = context_length(model)
    if context is not None and context - max_new_tokens < 2:  # a begin token and one of text
        raise InputError(
            f"evaluation.max_new_tokens must be at most {context - 2}, since the model sees {context} tokens "
            f"of text, got {max_new_tokens}."
        )
    return None if context is None else context - max_new_tokens


def context_length(model: Module) -> int | None:
    """Tokens of text that the model can see at once; None where there is no limit (BLOOM)."""
    inner = _inner(model)
    limit = getattr(inner.config, "max_position_embeddings", None)
    if limit is None:
        return None
    if inner.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        limit -= inner.config.pad_token_id + 1  # their positions start after the padding's
    return int(limit) - virtual_tokens(model)


def virtual_tokens(model: Module) -> int:
    """Tokens of a soft prompt before the text; 0 without one."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0


def _inner(model: Any) -> Any:
    """The model of transformers inside a PEFT wrapper. LoRA works in there, a soft prompt does not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module is in the mode it was in, also where they were mixed."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
