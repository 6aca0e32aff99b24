"""Which modules of a model a configuration will train: from its config.json, without weights or data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fedtune.config.schema import RunConfig
from fedtune.methods import registry
from fedtune.models.lora import lora_layers
from fedtune.models.lora_targets import ALL_LINEAR, tuned_modules, tuned_text, unlinear
from fedtune.models.memory_efficient import base_model
from fedtune.models.tuning import count_parameters, trainable
from fedtune.planning.fake import Fakes


def trained_modules(config: RunConfig) -> list[str]:
    """What is trained, a line each, as the method would attach it.

    Raises:
        InputError: No such model or no config.json, or the method does not go with the model.
    """
    if config.data.pictures is not None:
        return _of_pipeline(config)
    base = Fakes().model(
        config.model.place,
        base=Path("."),
        initial=config.model.initial,
        task=config.model.task,
        num_labels=2 if config.model.task == "classification" else None,  # of whatever number
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        attention=config.model.attention,
    )
    model = registry.build(config.method, config.seed).client_model(lambda: base)
    return module_notes(config.method, model)


def _of_pipeline(config: RunConfig) -> list[str]:
    """The same of a text-to-image model, and what that sends."""
    from fedtune.models.pipelines import meta_pipeline

    base = meta_pipeline(config.model.place, dtype=config.model.dtype, base=Path("."))
    method = registry.build(config.method, config.seed)
    return pipeline_notes(method, method.client_model(lambda: base))


def pipeline_notes(method: Any, model: nn.Module) -> list[str]:
    """The same of a pipeline that the method was attached to."""
    if method.config.name == "zero-shot":
        return ["trained: nothing"]
    count, layers = count_parameters(model), len(lora_layers(model))
    form = f"LoRA on {layers} linear layers" if layers else "all weights of the UNet"
    lines = [f"trained: {form}; {count.trainable:,} of {count.total:,} parameters"]
    if method.uses_wire:
        size = sum(parameter.nbytes for parameter in trainable(model).values())
        lines.append(f"sent: {size:,} bytes a client, round and way; {method.rounds} rounds")
    return lines


def module_notes(settings: Any, model: nn.Module) -> list[str]:
    """The same of a model that the method was attached to."""
    found, count = tuned_modules(model), count_parameters(model)
    form = tuned_text(found) or getattr(settings, "trainable", "full")
    trained = f"{count.trainable:,} of {count.total:,} parameters"
    notes = [f"trained: {form}; {trained}" if settings.name != "zero-shot" else "trained: nothing"]
    lora = getattr(settings, "lora", None)
    if found and lora and lora.targets == ALL_LINEAR and (left := unlinear(base_model(model))):
        notes.append(
            f"not trained, as they are no linear layers but hold all experts in one: {', '.join(left)}"
        )
    return notes
