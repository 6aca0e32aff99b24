"""What of a model is trained: all of it, bottleneck adapters, a soft prompt; LoRA is lora.py's.

Each `attach_*` works in place around the model it is given, so that one base model in memory serves all
simulated clients, freezes the base and draws the new parameters from its `seed` alone. A classification head
always trains. What is added is float32, also on a bfloat16 base, where rounding would swallow small updates.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, PromptTuningInit
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune.models.bottleneck import find_bottlenecks, insert_bottlenecks
from fedtune.models.heads import float32_heads
from fedtune.models.load import seeded
from fedtune.models.quantize import quantized_parameters, weight_count
from fedtune.models.wrapping import attach, task_type

_PEFT_SHAPE = {"num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads"}


class ParameterCount(NamedTuple):
    """Numbers of parameters, tied ones once; `total` is the base model with what is attached to it."""

    total: int
    trainable: int


def train_all(model: PreTrainedModel) -> PreTrainedModel:
    """Makes every parameter trainable, in the dtype that it has; what is quantised stays frozen."""
    kept = {id(parameter) for parameter in quantized_parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in kept)
    return model


def attach_prompt(model: PreTrainedModel, *, tokens: int, seed: int) -> PeftModel:
    """Prepends `tokens` trained embeddings to the input (prompt tuning, Lester et al. 2021).

    They start as embeddings of vocabulary entries drawn from `seed`; the paper found that better than noise.
    """
    config = PromptTuningConfig(
        task_type=task_type(model),
        num_virtual_tokens=tokens,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
        **_shape(model),
    )
    return attach(model, config, seed)


def attach_p_tuning(model: PreTrainedModel, *, tokens: int, hidden: int, seed: int) -> PeftModel:
    """Prepends `tokens` embeddings that an MLP of width `hidden` makes from trained ones (Liu et al. 2021).

    Deviation, PEFT's: an MLP alone, without the paper's LSTM before it. Both embeddings and MLP are trained;
    a saved result holds the prompt that the MLP gives and not the MLP.
    """
    config = PromptEncoderConfig(
        task_type=task_type(model), num_virtual_tokens=tokens, encoder_hidden_size=hidden, **_shape(model)
    )
    return attach(model, config, seed)


def attach_adapter(model: PreTrainedModel, *, size: int, seed: int) -> PreTrainedModel:
    """Adds a bottleneck adapter of width `size` to each block, see `fedtune.models.bottleneck`.

    Raises:
        InputError: The model's blocks are not found, or do not end in a linear layer of the model's width.
    """
    with seeded(seed):
        insert_bottlenecks(model, size)
    model.requires_grad_(False)
    for adapter in find_bottlenecks(model).values():
        adapter.requires_grad_(True)
    for head in float32_heads(model):
        head.requires_grad_(True)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by canonical name in sorted order, tied ones once.

    Canonical names are the same with and without PEFT's wrapping: `classifier.dense.weight`,
    `prompt_encoder.embedding.weight`, `model.layers.0.self_attn.q_proj.lora_A.weight`.
    """
    named = [
        (canonical_name(model, name), parameter)
        for name, parameter in model.named_parameters()  # gives a tied parameter once, under its first name
        if parameter.requires_grad
    ]
    result = dict(sorted(named, key=lambda pair: pair[0]))
    assert len(result) == len(named), "two parameters share a canonical name"
    return result


def canonical_name(model: nn.Module, name: str) -> str:
    """A parameter's name without what PEFT's wrapping adds to it."""
    if not isinstance(model, PeftModel):
        return name
    # A prompt's base model sits one level higher than that of LoRA, which has a tuner in between.
    wrapper = "base_model." if model.active_peft_config.is_prompt_learning else "base_model.model."
    parts = name.removeprefix(wrapper).split(".")
    return ".".join(part for part in parts if part not in ("default", "base_layer", "modules_to_save"))


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts parameters: total = base + what is attached, less the frozen copy of a head that PEFT keeps."""
    copies = [p for name, p in model.named_parameters() if ".original_module." in name]
    return ParameterCount(
        total=weight_count(model) - sum(p.numel() for p in copies),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def _shape(model: PreTrainedModel) -> dict[str, Any]:
    """What PEFT would look up in the configuration, where not every family has it under the names it knows.

    A prompt is as wide as the embeddings, which in ALBERT and ELECTRA is not the width of the blocks.
    """
    known = {key: getattr(model.config, name, None) for key, name in _PEFT_SHAPE.items()}
    width = cast(Tensor, model.get_input_embeddings().weight).shape[1]
    shape = {key: value for key, value in known.items() if isinstance(value, int)}
    return {**shape, "token_dim": width}
