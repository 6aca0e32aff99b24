"""Results of text-to-image runs on disk: LoRA as diffusers takes it, or a whole pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fedtune.errors import InputError
from fedtune.models.boundary import first_line, usable
from fedtune.models.load import Loaded, quiet
from fedtune.models.lora import lora_layers
from fedtune.models.pipelines import INDEX, pipeline_of, without_reports
from fedtune.models.text_to_image import TextToImage, attach_lora, lora_tensors, text_to_image

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LORA = "pytorch_lora_weights.safetensors"
ABOUT = "text_to_image.json"
_REMARKS = "lora_adapter_metadata"  # diffusers' name for what LoRA is
__all__ = ["INDEX", "LORA", "load_pictures_lora", "save_pictures"]


def save_pictures(
    model: nn.Module, pipeline: TextToImage, tokenizer: PreTrainedTokenizerBase, folder: Path, *, merge: bool
) -> None:
    """Writes a trained pipeline into `folder`: LoRA alone, or with `merge` or all weights the whole of it.

    Args:
        model: What was trained, wrapped by PEFT or not; it is not changed.
        pipeline: The same without the wrapping.
        tokenizer: Saved beside it.
        folder: There already.
        merge: Put the LoRA into the weights, W + alpha / rank · BA, in float32, rounded to their dtype.
    """
    if isinstance(model, PeftModel) and not merge:
        save_lora(model, folder)
        config = model.active_peft_config
        about = {
            "base_model": pipeline.name_or_path,
            "rank": config.r,
            "alpha": config.lora_alpha,
            "targets": sorted(lora_layers(model)),
        }
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder)
        return
    if isinstance(model, PeftModel):
        with _merged(pipeline):
            save_pipeline(pipeline, tokenizer, folder)
    else:
        save_pipeline(pipeline, tokenizer, folder)


def load_pictures_lora(folder: Path, base_model_loader: Callable[[str], Loaded]) -> Loaded:
    """Reads back the LoRA that `save_pictures` wrote, on its base pipeline, in eval mode.

    Raises:
        InputError: A file is damaged or missing, or does not fit the pipeline.
    """
    file = folder / ABOUT
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        rank, alpha, targets = int(about["rank"]), float(about["alpha"]), [str(t) for t in about["targets"]]
        name = str(about["base_model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is missing or damaged: {first_line(error)}") from error
    try:
        with safe_open(folder / LORA, framework="pt") as stream:
            saved = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / LORA} is missing or damaged: {first_line(error)}") from error
    loaded = base_model_loader(name)
    base = text_to_image(loaded.model)
    if base is None:
        raise InputError(f"{folder} does not fit its base model {name}, which makes no pictures")
    missing = [path for path in targets if path not in dict(base.named_modules())]
    if missing:
        raise InputError(f"{folder} does not fit its base model {name}: it has no layer {missing[0]}")
    model = attach_lora(base, rank=rank, alpha=alpha, dropout=0.0, targets=targets, seed=0)
    wanted = {key: tuple(tensor.shape) for key, tensor in lora_tensors(model).items()}
    found = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    if wanted != found:
        other = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        raise InputError(
            f"{folder} does not fit its base model {name}: the first tensor that differs is {other[0]}"
        )
    with usable(f"{folder} does not fit its base model {name}"), quiet():
        set_peft_model_state_dict(model, {f"base_model.model.{key}": t for key, t in saved.items()})
    return replace(loaded, model=cast(Any, model.requires_grad_(False).eval()))


def save_pipeline(model: TextToImage, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a whole pipeline as diffusers does."""
    with quiet(), without_reports():
        pipeline_of(model, tokenizer).save_pretrained(folder, safe_serialization=True)


def save_lora(model: PeftModel, folder: Path) -> None:
    """Writes LoRA as `load_lora_weights` of diffusers takes it, with rank and alpha beside the factors.

    Not by diffusers itself, which writes the file's remarks in another order each time.
    """
    config, about = model.active_peft_config, dict[str, Any]()
    for part in ("unet", "text_encoder"):
        targets = sorted(p.removeprefix(f"{part}.") for p in lora_layers(model) if p.startswith(f"{part}."))
        if targets:
            own = config.to_dict() | {"target_modules": targets, "base_model_name_or_path": None}
            about |= {f"{part}.{name}": value for name, value in own.items()}
    remarks = {_REMARKS: json.dumps(about, sort_keys=True)}
    save_file(dict(lora_tensors(model)), folder / LORA, metadata=remarks)


class _merged:
    """Inside, the layers of a pipeline that have LoRA are plain ones with it in their weights."""

    def __init__(self, pipeline: TextToImage) -> None:
        self._pipeline = pipeline
        self._before: dict[str, nn.Module] = {}

    def __enter__(self) -> None:
        layers = {p: m for p, m in self._pipeline.named_modules() if isinstance(m, LoraLayer)}
        for path, layer in layers.items():
            base = cast(nn.Linear, layer.get_base_layer())
            plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
            delta = cast(Any, layer).get_delta_weight("default").float()
            weight = (base.weight.detach().float() + delta).to(base.weight.dtype)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            if base.bias is not None:
                plain.bias = base.bias
            self._before[path] = layer  # type: ignore[assignment]
            self._put(path, plain)

    def __exit__(self, *_: object) -> None:
        for path, layer in self._before.items():
            self._put(path, layer)

    def _put(self, path: str, module: nn.Module) -> None:
        where, _, name = path.rpartition(".")
        self._pipeline.get_submodule(where).register_module(name, module)
