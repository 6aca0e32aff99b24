"""Which linear layers get LoRA: those of the attention, all of the blocks', or some by name.

`auto` is PEFT's entry for the architecture where it has one (usually query and value), so that results
stay what they were; else it is `attention`. That is found by structure: all linear layers of what mixes
tokens in a block, whatever a family calls them and whether they are joined: query, key, value and output
(Llama 4, Qwen3-MoE, DistilBERT's q_lin), one layer for three (Phi-3's qkv_proj, ModernBERT's Wqkv),
low-rank ones (DeepSeek), and the projections of Mamba and of other recurrent or convolving mixers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune.errors import InputError, nearest
from fedtune.models.blocks import find_blocks, is_mixing, linear_layers

Targets = str | Sequence[str] | None  # auto (None is that too), attention, all-linear, or names
AUTO, ATTENTION, ALL_LINEAR = "auto", "attention", "all-linear"
# PEFT refuses this layer of these kinds: their kernels take its weight and never call it.
_KERNELS = {"mamba", "mamba2", "falcon_mamba", "nemotron_h", "falcon_h1"}
_OF_KERNELS = "out_proj"


def find_targets(
    model: PreTrainedModel,
    wanted: Targets,
    layers: Sequence[int] | None = None,
    *,
    setting: str = "method.lora.targets",
) -> list[str]:
    """The ends of the paths of the linear layers that get LoRA, as PEFT's `target_modules` takes them.

    Args:
        model: Not wrapped by PEFT; of any device, also the meta device.
        wanted: `auto`, `attention`, `all-linear`, or names, matched as the end of a module's path ("q_proj",
            "attention.output.dense").
        layers: The blocks that get it, counted from 0; None: all. Whole paths are given then.
        setting: Which names them, for what is said.

    Raises:
        InputError: A name matches no linear layer, or there is none that LoRA can be on.
    """
    linears = tunable_layers(model)
    if not isinstance(wanted, str | None):
        ends = list(wanted)
        for name in ends:
            if not matched(linears, [name]):
                raise InputError(f"{setting}: {_unknown(model, name, linears)}")
    else:
        ends = _found(model, wanted or AUTO, linears, setting)
    if layers is None:
        return ends
    inside = tuple(f"{find_blocks(model).path}.{layer}." for layer in layers)
    return [path for path in matched(linears, ends) if path.startswith(inside)]


def tunable_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers of the blocks that LoRA can be on, by path, in the order of the blocks.

    Left out is what is no layer that is called and gives x Wᵀ: one with several results (Llama 4's router),
    and one whose weight the code around it multiplies itself (Mamba's dt_proj).
    """
    blocks = find_blocks(model)
    found = {}
    for index, block in enumerate(blocks.modules):
        for path, linear in linear_layers(block).items():
            where, _, name = path.rpartition(".")
            if _plain(linear) and not _multiplied(block.get_submodule(where), name):
                found[f"{blocks.path}.{index}.{path}"] = linear
    return found


def in_block(path: str) -> str:
    """A module's path inside its block, which is behind the first number in it."""
    return re.sub(r"^.*?\.\d+\.", "", path)


def tuned_modules(model: nn.Module) -> dict[str, int]:
    """The modules that PEFT has put something on, by their path inside a block, and in how many they are."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            found[in_block(path)] = found.get(in_block(path), 0) + 1
    return found


def tuned_text(modules: Mapping[str, int]) -> str:
    """Those modules as a text: "self_attn.q_proj, self_attn.v_proj (22 of each)"; "" of none."""
    counts: dict[int, list[str]] = {}
    for name, count in modules.items():
        counts.setdefault(count, []).append(name)
    return "; ".join(
        f"{', '.join(names)} ({count}{' of each' if len(names) > 1 else ''})"
        for count, names in counts.items()
    )


def unlinear(model: nn.Module) -> list[str]:
    """Matrices of the blocks that are no linear layer's, by path inside a block: experts in one parameter."""
    blocks = find_blocks(model).modules
    return list(
        dict.fromkeys(
            name
            for block in blocks
            for name, parameter in block.named_parameters()
            if parameter.ndim == 3 and "conv" not in name and ".lora_" not in name
        )
    )


def _found(model: PreTrainedModel, wanted: str, linears: Mapping[str, nn.Module], setting: str) -> list[str]:
    kind = model.config.model_type
    default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if wanted == AUTO and isinstance(default, list) and matched(linears, default):
        return default
    refused = kind in _KERNELS
    paths = [path for path in linears if not (refused and path.endswith(f".{_OF_KERNELS}"))]
    if wanted != ALL_LINEAR:
        paths = [path for path in paths if is_mixing(in_block(path))]
    if not paths:
        others = ", ".join(dict.fromkeys(map(in_block, linears)))
        what = "linear layers in its attention" if wanted != ALL_LINEAR else "linear layers in its blocks"
        way = f"Name some of its linear layers: {others}." if others else "Use another method.trainable."
        raise InputError(f'{setting} {wanted}: a model of type "{kind}" has no {what}. {way}')
    ends = list(dict.fromkeys(map(in_block, paths)))
    # a path inside a block may be the end of another's, elsewhere in the model or in a block of another kind
    everything = [path for path, module in model.named_modules() if isinstance(module, nn.Module)]
    return ends if set(matched(dict.fromkeys(everything), ends)) == set(paths) else paths


def matched(paths: Mapping[str, object], ends: Sequence[str]) -> list[str]:
    """As PEFT matches; a path matches itself."""
    return [path for path in paths if any(path == end or path.endswith(f".{end}") for end in ends)]


def _plain(linear: nn.Module) -> bool:
    """Whether a layer gives one tensor; a family may give it a forward pass of its own (Falcon does)."""
    if not type(linear).__module__.startswith("transformers.models") or "forward" not in vars(type(linear)):
        return True
    weight = linear.get_parameter("weight")
    with torch.no_grad():
        return isinstance(linear(weight.new_zeros(1, weight.shape[1])), Tensor)


def _multiplied(around: nn.Module, name: str) -> bool:
    """Whether the code of the module around it multiplies the layer's weight itself."""
    return re.search(rf"self\.{re.escape(name)}\.weight\s*@", _code(around)) is not None


def taken_past(around: nn.Module, name: str) -> bool:
    """Whether the code of the module around it also gives the layer's weight to a kernel."""
    return re.search(rf"self\.{re.escape(name)}\.weight,", _code(around)) is not None


def _code(module: nn.Module) -> str:
    kind = type(module)
    return inspect.getsource(kind.forward) if kind.__module__.startswith("transformers.models") else ""


def _unknown(model: PreTrainedModel, name: str, linears: Mapping[str, nn.Module]) -> str:
    known = list(dict.fromkeys(map(in_block, linears)))
    said = f'no linear layer of the blocks is named "{name}".'
    all_in_one = [path for path in unlinear(model) if path.endswith(name)]
    if all_in_one:
        said = (
            f"{all_in_one[0]} holds the weights of all experts in one parameter and is "
            "no linear layer, which LoRA is on."
        )
    return f"{said}{nearest(name, known) if not all_in_one else ''} Linear layers: {', '.join(known)}."
