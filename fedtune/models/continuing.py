"""An adapter that training goes on from: its values put into one that was just attached."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedtune.errors import InputError
from fedtune.models.boundary import first_line, usable
from fedtune.models.load import quiet
from fedtune.models.save import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS
from fedtune.models.tuning import trainable

# Of PEFT's configuration, what tensors of the same shapes may mean different things by.
MEANING = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "num_virtual_tokens")


def adapter_folder(place: str) -> Path:
    """The folder of an adapter: itself, or that of a run's result.

    Raises:
        InputError: There is no adapter.
    """
    path = Path(place).expanduser()
    folder = path / "final" if (path / "config.yaml").is_file() else path
    if not any((folder / name).is_file() for name in (PEFT_CONFIG, ADAPTER_CONFIG)):
        said = "no such folder" if not path.exists() else f"neither {PEFT_CONFIG} nor {ADAPTER_CONFIG} in it"
        raise InputError(
            f"model.adapter: {folder}: {said}; give a PEFT adapter's folder, or a run whose result is an "
            "adapter. A result that is a whole model goes into model.name"
        )
    return folder


def adapter_sha256(folder: Path) -> str:
    """Of its tensors' file, and of what says what they mean."""
    digest = hashlib.sha256()
    for name in (PEFT_WEIGHTS, ADAPTER_WEIGHTS):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def continue_adapter(model: nn.Module, folder: Path) -> None:
    """Gives what was attached to a model the values of an adapter of the same form.

    Raises:
        InputError: It is of another form, or its tensors are others.
    """
    named = ADAPTER_WEIGHTS if (folder / ADAPTER_CONFIG).is_file() else PEFT_WEIGHTS
    try:
        tensors = load_file(folder / named)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / named} is missing or damaged: {first_line(error)}") from error
    if isinstance(model, PeftModel) != (named == PEFT_WEIGHTS):
        raise InputError(_unlike(folder, "the adapter is of another form than method.trainable"))
    if not isinstance(model, PeftModel):
        own: dict[str, Tensor] = dict(trainable(model))
        _require_same(folder, tensors, own)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        return
    about = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    mine: dict[str, Any] = json.loads(json.dumps(model.active_peft_config.to_dict(), default=str))
    for key in MEANING:
        theirs, ours = (str(each.get(key)).removeprefix("PeftType.") for each in (about, mine))
        if key in about and theirs != ours:
            raise InputError(_unlike(folder, f"its {key} is {theirs}, and the run's {ours}"))
    _require_same(folder, tensors, get_peft_model_state_dict(model, save_embedding_layers=False))
    with usable(f"model.adapter: {folder} cannot be read"), quiet():
        set_peft_model_state_dict(cast(Any, model), tensors)


def _require_same(folder: Path, has: dict[str, Tensor], needs: dict[str, Tensor]) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (has, needs)]
    different = sorted(n for n in has.keys() | needs.keys() if shapes[0].get(n) != shapes[1].get(n))
    if different:
        first = different[0]
        raise InputError(
            _unlike(
                folder,
                f"{len(different)} tensors are others, the first is {first}: "
                f"{shapes[0].get(first, 'missing')} there, {shapes[1].get(first, 'none')} here",
            )
        )


def _unlike(folder: Path, why: str) -> str:
    return (
        f"model.adapter: {folder} cannot be continued: {why}. Set method.trainable and its block to what it "
        "was made with; or merge it into its base (fedtune export RUN --merge) and give that as model.name"
    )
