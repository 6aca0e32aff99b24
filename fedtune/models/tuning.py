"""What of a model is trained: all of it, LoRA, bottleneck adapters, a soft prompt, or a P-tuning encoder.

Each `attach_*` works in place around the model it is given, so that one base model in memory serves all
simulated clients, freezes the base and draws the new parameters from its `seed` alone. A classification head
always trains. What is added is float32, also on a bfloat16 base, where rounding would swallow small updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.errors import InputError, nearest
from fedtune.models.blocks import find_blocks, linear_layers
from fedtune.models.bottleneck import find_bottlenecks, insert_bottlenecks
from fedtune.models.heads import float32_heads, head_modules, is_classifier
from fedtune.models.load import quiet, seeded
from fedtune.models.quantize import quantized_parameters, weight_count
from fedtune.models.soft_prompt import mend_soft_prompt

_PEFT_SHAPE = {"num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads"}
_NAMED_BY_PEFT = {"classifier", "score"}  # heads that PEFT trains by itself, by their names


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


def attach_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str] | None,
    seed: int,
    layers: Sequence[int] | None = None,
) -> PeftModel:
    """Adds low-rank updates W + (alpha / rank) B A (Hu et al. 2022, eq. 3) to linear layers.

    A is drawn from `seed`, B is 0, so the model starts as it was.

    Args:
        rank: Columns of B.
        alpha: The update's scale is alpha / rank.
        dropout: On the input of A while training. torch draws it from its global generator.
        targets: Names of linear layers, matched as the end of a module's path ("q_proj",
            "attention.output.dense"). None takes PEFT's choice for the architecture, usually query and value.
        seed: What A is drawn from.
        layers: The blocks that get it, counted from 0; None: all.

    Raises:
        InputError: A target matches no linear layer, or there is no default for the architecture.
    """
    linears = _block_linears(model)
    chosen = targets if targets is not None else _default_targets(model, linears)
    for target in chosen:
        if not any(path.endswith(f".{target}") for path in linears):
            known = _short_names(model)
            raise InputError(
                f'method.lora.targets: no linear layer of the blocks is named "{target}".'
                f"{nearest(target, known)} Linear layers: {', '.join(known)}."
            )
    if layers is not None:
        inside = tuple(f"{find_blocks(model).path}.{layer}." for layer in layers)
        ends = tuple(f".{target}" for target in chosen)
        chosen = [path for path in linears if path.startswith(inside) and path.endswith(ends)]
    config = LoraConfig(
        task_type=_task_type(model),
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # declared int, used as a number
        lora_dropout=dropout,
        target_modules=list(chosen),
        fan_in_fan_out=any(isinstance(linear, Conv1D) for linear in linears.values()),
    )
    return _attach(model, config, seed)


def attach_prompt(model: PreTrainedModel, *, tokens: int, seed: int) -> PeftModel:
    """Prepends `tokens` trained embeddings to the input (prompt tuning, Lester et al. 2021).

    They start as embeddings of vocabulary entries drawn from `seed`; the paper found that better than noise.
    """
    config = PromptTuningConfig(
        task_type=_task_type(model),
        num_virtual_tokens=tokens,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
        **_shape(model),
    )
    return _attach(model, config, seed)


def attach_p_tuning(model: PreTrainedModel, *, tokens: int, hidden: int, seed: int) -> PeftModel:
    """Prepends `tokens` embeddings that an MLP of width `hidden` makes from trained ones (Liu et al. 2021).

    Deviation, PEFT's: an MLP alone, without the paper's LSTM before it. Both embeddings and MLP are trained;
    a saved result holds the prompt that the MLP gives and not the MLP.
    """
    config = PromptEncoderConfig(
        task_type=_task_type(model), num_virtual_tokens=tokens, encoder_hidden_size=hidden, **_shape(model)
    )
    return _attach(model, config, seed)


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


def _attach(model: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    float32_heads(model)  # before PEFT copies them
    named = sorted(head_modules(model).keys() - _NAMED_BY_PEFT)
    if (
        config.is_prompt_learning
    ):  # PEFT compares ends of paths: a "head" would be P-tuning's own mlp_head too
        named = [f"base_model.{path}" for path in named]
    config.modules_to_save = named or None  # type: ignore[attr-defined]  # of every kind that is used here
    with seeded(seed), quiet():
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    if config.is_prompt_learning:
        mend_soft_prompt(wrapped)
    return wrapped


def _task_type(model: PreTrainedModel) -> TaskType:
    return TaskType.SEQ_CLS if is_classifier(model) else TaskType.CAUSAL_LM


def _shape(model: PreTrainedModel) -> dict[str, Any]:
    """What PEFT would look up in the configuration, where not every family has it under the names it knows.

    A prompt is as wide as the embeddings, which in ALBERT and ELECTRA is not the width of the blocks.
    """
    known = {key: getattr(model.config, name, None) for key, name in _PEFT_SHAPE.items()}
    width = cast(Tensor, model.get_input_embeddings().weight).shape[1]
    shape = {key: value for key, value in known.items() if isinstance(value, int)}
    return {**shape, "token_dim": width}


def _block_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    blocks = find_blocks(model)
    return {
        f"{blocks.path}.{index}.{path}": linear
        for index, block in enumerate(blocks.modules)
        for path, linear in linear_layers(block).items()
    }


def _short_names(model: PreTrainedModel) -> list[str]:
    """The linear layers' paths inside a block."""
    return list(dict.fromkeys(path for block in find_blocks(model).modules for path in linear_layers(block)))


def _default_targets(model: PreTrainedModel, linears: dict[str, nn.Module]) -> list[str]:
    kind = model.config.model_type
    default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if not isinstance(default, list) or not any(p.endswith(f".{t}") for p in linears for t in default):
        raise InputError(
            f'method.lora.targets: there is no default for models of type "{kind}". '
            f"Name some of its linear layers: {', '.join(_short_names(model))}."
        )
    return default
