"""Checkpoints that come quantised: what their config.json says, and the model that is made of them.

Those of bitsandbytes become the same layers as a model that is quantised here, bit for bit what was saved.
Those of compressed-tensors are widened as they are loaded, which that package would do in the first forward
pass, and are then a plain model. Others keep the layers of the package that made them, which has to be
installed; what is trained on top of them is added by PEFT, where PEFT knows how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fedtune.errors import InputError
from fedtune.models.quantize import (
    NESTED,
    QuantizedLinear,
    of_state,
    put,
    quantized_parameters,
    require_bitsandbytes,
    shapes_of,
)

_PACKAGES = {  # of a quant_method, what reads it: names to import, and to install where they differ
    "bitsandbytes": {"bitsandbytes": "fedtune[quant]"},
    "gptq": {"gptqmodel": "gptqmodel", "optimum": "optimum"},
    "awq": {"gptqmodel": "gptqmodel"},
    "torchao": {"torchao": "torchao"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "auto-round": {"auto_round": "auto-round"},
    "quanto": {"optimum.quanto": "optimum-quanto"},
    "hqq": {"hqq": "hqq"},
    "aqlm": {"aqlm": "aqlm"},
}
WIDENED = "compressed-tensors"


def came_quantised(config: PretrainedConfig, wanted: str, name: str, *, scratch: bool) -> str:
    """How a checkpoint was quantised, as its config.json says: nf4, fp4, int8, gptq, ...; "" if it was not.

    Args:
        config: Of the model. Where nothing is read from the checkpoint, it forgets that it was quantised.
        wanted: `model.quantization`.
        name: The model's.
        scratch: Whether the weights are drawn.

    Raises:
        InputError: Another quantisation is wanted, or the package that reads it is missing.
    """
    about = getattr(config, "quantization_config", None)
    if about is None or scratch:
        if about is not None:
            del config.quantization_config
        return ""
    settings = about if isinstance(about, dict) else about.to_dict()
    method = str(settings.get("quant_method") or "bitsandbytes").lower()
    if method == "bitsandbytes" and not (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        raise InputError(
            f"model {name}: quantization_config in its config.json is of bitsandbytes, and says neither "
            "load_in_4bit nor load_in_8bit; set the one that its weights have to true, or take "
            "quantization_config out if they have none"
        )
    came = _of_bitsandbytes(settings) if method == "bitsandbytes" else method
    if wanted not in ("none", came):
        raise InputError(
            f"model.quantization is {wanted}, but model {name} comes quantised ({came}, in its config.json); "
            "leave model.quantization out, or take the model that it was made from"
        )
    missing = {module: package for module, package in _PACKAGES.get(method, {}).items() if not _there(module)}
    if missing:
        raise InputError(
            f"model {name} comes quantised by {method} (in its config.json), which needs "
            f"{' and '.join(m.split('.')[0] for m in missing)}; pip install "
            f"{' '.join(f'{package!r}' if '[' in package else package for package in missing.values())}, "
            "or take the model that it was made from, with model.quantization: nf4 or int8"
        )
    if method == WIDENED:
        config.quantization_config = {**settings, "dequantize": True}
    return came


def load_quantised(
    name: str, came: str, dtype: torch.dtype, load: Callable[[Mapping[str, Any]], PreTrainedModel]
) -> PreTrainedModel:
    """The model of a quantised checkpoint.

    Args:
        name: The model's.
        came: As `came_quantised` gives it.
        dtype: Of what is not quantised.
        load: Loads it as transformers does, with these arguments besides.

    Raises:
        InputError: Its weights are not quantised.
    """
    model = load({"device_map": {"": "cpu"}})
    if came in ("nf4", "fp4", "int8"):
        _take_over(model, name)
    elif not quantized_parameters(model):  # widened: some packages do that in a dtype of their own
        nn.Module.to(model, dtype)
    _forget(model)
    return model


def as_it_comes(model: PreTrainedModel, came: str, name: str) -> None:
    """Gives a model on the meta device the layers that its checkpoint has, without values.

    Raises:
        InputError: They are of a package whose layers cannot be followed without values.
    """
    if came == WIDENED:
        return
    if came not in ("nf4", "fp4", "int8"):
        raise InputError(
            f"model {name} comes quantised by {came}: what its layers need is known to that package alone, "
            "so it cannot be planned. Plan the model that it was made from, with model.quantization: nf4 "
            "or int8"
        )
    from transformers.quantizers.auto import AutoHfQuantizer

    require_bitsandbytes(f"model {name}")
    quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=True)
    quantizer._process_model_before_weight_loading(model, device_map=None)
    made = {}
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            linear = cast(nn.Linear, module)
            shape = torch.empty(linear.out_features, linear.in_features, dtype=model.dtype, device="meta")
            nested = quantizer.quantization_config.bnb_4bit_use_double_quant
            bits = shapes_of(shape, came, nested=nested)
            made[id(module)] = QuantizedLinear(linear, came, model.dtype, bits)
    put(model, made)
    _forget(model)


def _of_bitsandbytes(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_8bit"):
        return "int8"
    return str(settings.get("bnb_4bit_quant_type", "fp4"))


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a name with a dot, what is before it
        return False


def _take_over(model: PreTrainedModel, name: str) -> None:
    """Puts layers of our own in the places of bitsandbytes', with the same bits."""
    made = {}
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            weight: Any = module.weight
            state = getattr(weight, "quant_state", None)
            if state is None:
                raise InputError(
                    f"model {name}: its config.json says that its weights are quantised, and those in its "
                    "files are not; take quantization_config out of config.json, and set model.quantization"
                )
            assert not state.nested or state.state2.blocksize == NESTED
            bits = of_state(weight.data, state)
            layer = QuantizedLinear(module, state.quant_type, model.dtype, bits, state.blocksize)
        elif kind == "Linear8bitLt":
            weight = module.weight
            scales = weight.SCB if weight.SCB is not None else cast(Any, module).state.SCB
            bits = {"packed": weight.data, "absmax": cast(Tensor, scales).detach().reshape(-1)}
            layer = QuantizedLinear(module, "int8", model.dtype, bits)
        else:
            continue
        made[id(module)] = layer
    put(model, made)


def _can_be_undone(operation: Any) -> bool:
    try:
        return operation.reverse_op is not None
    except NotImplementedError:  # of those that read bits
        return False


def _forget(model: PreTrainedModel) -> None:
    """Has transformers take the model for a plain one: what is saved of it is."""
    model.config.__dict__.pop("quantization_config", None)
    conversions = getattr(model, "_weight_conversions", None)  # what saving would undo
    if conversions:
        plain = [each for each in conversions if all(map(_can_be_undone, getattr(each, "operations", ())))]
        setattr(model, "_weight_conversions", plain or None)  # noqa: B010  # no attribute to the type checker
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)
    setattr(model, "is_quantized", False)  # noqa: B010  # to the type checker a module
