"""A soft prompt with texts of unlike lengths: what PEFT and transformers get wrong about it, worked round.

Each fault made what a text gives depend on the others in its batch; each stands here with its reason, so that
it can go when it is mended where it belongs.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedtune.models.load import ENCODERS

_SEEN_WHOLE = ENCODERS | {"xlnet"}  # they have a causal form too, and classify from their first tokens or all


def mend_soft_prompt(model: PeftModel) -> None:
    """Makes a model with a soft prompt give for each text of a batch what it gives for that text alone."""
    if model.active_peft_config.task_type == TaskType.CAUSAL_LM:
        _mend_generation(model)
        return
    inner: Any = model.get_base_model()
    kind = inner.config.model_type
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in _SEEN_WHOLE:
        inner.register_forward_pre_hook(_padding_first, with_kwargs=True)


def _mend_generation(model: PeftModel) -> None:
    """Makes `generate` of a model with a soft prompt give what whole forward passes give.

    Two faults of PEFT (all versions up to 0.21.2) are worked round here:

    * It drops the position ids that generation computes, so a model counts the padding between the prompt and
      the text as positions, and a text's answer depends on the lengths of the others in its batch. They are
      computed again, from the attention mask.
    * transformers 5.24 renamed `past_key_values` to `cache`. PEFT looks for the old name, finds no cache, and
      puts the prompt in front of every new token. So PEFT is given the old name, and the model the new one.
    """
    inner = model.get_base_model()
    takes = inspect.signature(inner.forward).parameters
    if "cache" in takes:
        # kept on the wrapper, as a partial: no reference from the model to itself, and copies use their own
        prepare = model.base_model_prepare_inputs_for_generation
        renamed = partial(_with_old_cache_name, prepare)
        model.base_model_prepare_inputs_for_generation = renamed  # type: ignore[assignment]  # no module
        inner.register_forward_pre_hook(_new_cache_name, with_kwargs=True)
    if "position_ids" in takes:
        inner.register_forward_pre_hook(_positions_from_mask, with_kwargs=True)
        warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient")


def _padding_first(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Padding before the prompt instead of behind the text.

    A decoder classifies from its last token. transformers finds that from the token ids; given embeddings, as
    PEFT gives them, it takes the last position, which in all texts but the longest of a batch is padding.
    """
    mask, embeddings = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    if mask is None or mask.dim() != 2 or embeddings is None:
        return args, kwargs
    order = torch.argsort(
        mask.long(), dim=1, stable=True
    )  # (batch, prompt + tokens): padding, then as it was
    mask = mask.gather(1, order)
    moved = embeddings.gather(1, order.unsqueeze(-1).expand_as(embeddings))
    kwargs = {**kwargs, "attention_mask": mask, "inputs_embeds": moved}
    if "position_ids" in inspect.signature(module.forward).parameters:
        kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return args, kwargs


def _with_old_cache_name(prepare: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
    inputs = prepare(*args, **kwargs)
    if "cache" in inputs:
        inputs["past_key_values"] = inputs.pop("cache")
    return inputs


def _new_cache_name(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "past_key_values" in kwargs:
        kwargs = {**kwargs, "cache": kwargs["past_key_values"]}
        del kwargs["past_key_values"]
    return args, kwargs


def _positions_from_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = kwargs.get("attention_mask")  # (batch, prompt + past + new tokens)
    if mask is None or mask.dim() != 2 or kwargs.get("position_ids") is not None:
        return args, kwargs
    new = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
    return args, {**kwargs, "position_ids": positions}
