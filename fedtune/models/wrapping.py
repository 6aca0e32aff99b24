"""Putting what PEFT adds around a model: what is the same for LoRA, IA3 and prompts."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from fedtune.models.heads import float32_heads, head_modules, is_classifier
from fedtune.models.load import quiet, seeded
from fedtune.models.soft_prompt import mend_soft_prompt

_NAMED_BY_PEFT = {"classifier", "score"}  # heads that PEFT trains by itself, by their names


def attach(model: PreTrainedModel, config: PeftConfig, seed: int, whole: Sequence[str] = ()) -> PeftModel:
    """Wraps a model in place; a classification head trains too.

    Args:
        config: What PEFT adds.
        seed: What that is drawn from.
        whole: Modules that are trained whole beside it, as ends of paths.
    """
    float32_heads(model)  # before PEFT copies them
    named = sorted(head_modules(model).keys() - _NAMED_BY_PEFT)
    if (
        config.is_prompt_learning
    ):  # PEFT compares ends of paths: a "head" would be P-tuning's own mlp_head too
        named = [f"base_model.{path}" for path in named]
    config.modules_to_save = [*named, *whole] or None  # type: ignore[attr-defined]  # of every kind that is used here
    with seeded(seed), quiet():
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    if config.is_prompt_learning:
        mend_soft_prompt(wrapped)
    return wrapped


def task_type(model: PreTrainedModel) -> TaskType:
    """Whether the model classifies or generates, as PEFT has it."""
    return TaskType.SEQ_CLS if is_classifier(model) else TaskType.CAUSAL_LM
