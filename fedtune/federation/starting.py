"""The model that a run's first round starts from: the base, what is attached, and an adapter's values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from fedtune.config.schema import RunConfig
from fedtune.core.types import Method
from fedtune.errors import InputError
from fedtune.federation.files import read_json
from fedtune.models.bottleneck import find_bottlenecks
from fedtune.models.continuing import adapter_folder, adapter_sha256, continue_adapter
from fedtune.models.quantize import packed_layers


def model_to_train(config: RunConfig, method: Method[Any], base: Callable[[], nn.Module]) -> nn.Module:
    """What the method trains, with the values of `model.adapter` where there is one.

    A client over a network needs no adapter: it is sent the values with its first order.

    Raises:
        InputError: The adapter is missing, or of another form.
    """
    model = method.client_model(base)
    adapter = isinstance(model, PeftModel) or bool(find_bottlenecks(model))
    if packed_layers(model) and not adapter:
        raise InputError(
            f"{config.method_name} ends with a whole model, and the layers of {config.model.name}, which "
            "came quantised, can be written by the package alone that made them; take fedavg with "
            "trainable: lora, or the model that it was made from, with model.quantization: nf4 or int8"
        )
    if config.model.adapter is not None:
        continue_adapter(model, adapter_folder(config.model.adapter))
    return model


def adapter_of(config: RunConfig, weights_sha256: str) -> dict[str, str]:
    """What environment.json says of `model.adapter`; nothing without one.

    Raises:
        InputError: It is missing, or the result of a run on another base model.
    """
    if config.model.adapter is None:
        return {}
    folder = adapter_folder(config.model.adapter)
    about = Path(config.model.adapter).expanduser() / "environment.json"
    if folder.name == "final" and about.is_file():
        base = read_json(about)["model"]["weights_sha256"]
        if base != weights_sha256:
            raise InputError(
                f"model.adapter: {config.model.adapter} was trained on a base model with SHA-256 "
                f"{base[:12]}, and model.name has {weights_sha256[:12]}; set model.name to the run's"
            )
    return {"adapter_sha256": adapter_sha256(folder)}
