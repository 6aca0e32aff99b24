"""Write a result where other tools can read it, and read it back.

* full, and LoRA merged: a Hugging Face model folder;
* LoRA, prompt tuning, P-tuning: a PEFT adapter folder; of a classifier, with `base/` in it: PEFT gives a head
  as many outputs as the base's configuration says, so one that says it right stands there, with links to the
  base's weights;
* bottleneck adapter: adapter.safetensors with canonical names and adapter.json, our own since PEFT has none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedtune.errors import InputError
from fedtune.models.bottleneck import find_bottlenecks, sits_as_before
from fedtune.models.boundary import first_line, usable
from fedtune.models.folders import CONFIG, WEIGHTS, WEIGHTS_INDEX, local_folder, weight_files
from fedtune.models.heads import float32_heads
from fedtune.models.ia3 import scaled_tensors
from fedtune.models.load import REVISION, Loaded, quiet, seeded
from fedtune.models.lora import joined_factors, joined_rank, lora_layers, lora_parameter, merged_weight
from fedtune.models.names import BUNDLED
from fedtune.models.picture_results import INDEX, LORA, load_pictures_lora, save_pictures
from fedtune.models.portable import classes_of, mend_config, mend_tokenizer
from fedtune.models.quantize import packed_layers, plain_state, quantized_parameters
from fedtune.models.soft_prompt import mend_soft_prompt
from fedtune.models.text_to_image import text_to_image
from fedtune.models.tuning import attach_adapter, canonical_name, trainable

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter.json", "adapter.safetensors"
ADAPTER_FORMAT = "fedtune bottleneck adapter"
ADAPTER_VERSION = 1
PLACEMENT = "after each block's feed-forward network"
TOKENIZER = "tokenizer_config.json"
BASE, HEADS = "base", "heads.safetensors"  # in the folder of a classifier's PEFT adapter


def save_result(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    merge: bool = False,
    place: Path | None = None,
) -> None:
    """Writes a trained model into `folder`, with its tokenizer. Making that atomic is the caller's.

    Args:
        model: What `train_all` or an `attach_*` function returned; it is not changed.
        tokenizer: Saved beside it.
        folder: Made if it is not there.
        merge: Put what LoRA or IA3 changes into the weights and write a plain model, W + (alpha / rank) B A,
            computed in float32 and rounded to the base's dtype.
        place: Where the folder will be, if it is written elsewhere at first.

    Raises:
        InputError: `merge` for anything but LoRA and IA3.
    """
    into = isinstance(model, PeftModel) and model.active_peft_config.peft_type in ("LORA", "IA3")
    if merge and not into:
        raise InputError(
            "--merge is for LoRA and IA3: nothing else can be added into the base model's weights."
        )
    if merge and packed_layers(model):
        raise InputError(
            "--merge: the base model came quantised by a package that alone can widen its weights; give the "
            "adapter to the model that it was made from (model.name), and merge it there."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if (pipeline := text_to_image(model)) is not None:
        save_pictures(model, pipeline, tokenizer, folder, merge=merge)
        return
    with quiet():
        if isinstance(model, PeftModel):
            if merge:
                base = cast(PreTrainedModel, model.get_base_model())
                base.save_pretrained(folder, state_dict=_merged_state(model))
            else:
                _save_peft(model, folder, (place or folder).absolute())
        elif find_bottlenecks(model):
            _save_adapter(model, folder)
        else:
            whole = plain_state(model) if quantized_parameters(model) else None
            model.save_pretrained(folder, state_dict=whole)
        tokenizer.save_pretrained(folder)
    mend_config(folder / CONFIG)
    mend_tokenizer(folder, tokenizer)


def classes_in(folder: Path) -> tuple[str, ...]:
    """The classes of a saved classifier in the order of its outputs; none if nothing there names them."""
    if (folder / PEFT_CONFIG).is_file():
        return classes_of(_read_json(folder / PEFT_CONFIG).get("auto_mapping") or {})
    for name in (ADAPTER_CONFIG, CONFIG):
        if (folder / name).is_file():
            return classes_of(_read_json(folder / name))
    return ()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return any((folder / name).is_file() for name in (PEFT_CONFIG, ADAPTER_CONFIG))


def adapter_base(folder: Path) -> str:
    """The base model that an adapter's folder names. Raises InputError if it names none."""
    peft = (folder / PEFT_CONFIG).is_file()
    about = _read_json(folder / (PEFT_CONFIG if peft else ADAPTER_CONFIG))
    name = (about.get("auto_mapping") or {}).get("base_model") or about.get("base_model_name_or_path")
    name = name if peft else about.get("base_model")
    if not isinstance(name, str) or not name:
        raise InputError(f"{folder} does not name its base model (base_model_name_or_path, base_model)")
    return name


def load_result(folder: Path, base_model_loader: Callable[[str], Loaded]) -> Loaded:
    """Reads back what `save_result` wrote, in eval mode, for use and not for more training.

    Args:
        folder: A model folder, a PEFT adapter folder or one with our own adapter.
        base_model_loader: Loads a model by name, as `load_model` with all but the name filled in. It is
            called with the base model's name that an adapter records, or with `folder` if that holds a
            whole model. It must give the weights that the adapter was trained on: for a base drawn from a
            seed, the same seed.

    Raises:
        InputError: The folder holds no result, a damaged one, or one that does not fit its base model.
    """
    if (folder / PEFT_CONFIG).is_file():
        return _load_peft(folder, base_model_loader)
    if (folder / ADAPTER_CONFIG).is_file():
        return _load_adapter(folder, base_model_loader)
    if (folder / LORA).is_file():
        return load_pictures_lora(folder, base_model_loader)
    if (folder / CONFIG).is_file() or (folder / INDEX).is_file():
        return base_model_loader(str(folder.resolve()))
    raise InputError(f"{folder} holds no result: expected {CONFIG}, {PEFT_CONFIG} or {ADAPTER_CONFIG} in it.")


def _merged_state(model: PeftModel) -> dict[str, Tensor]:
    base = cast(PreTrainedModel, model.get_base_model())
    merged = {
        canonical_name(model, f"base_model.model.{path}.{lora_parameter(module)}"): merged_weight(module)
        for path, module in base.named_modules()
        if isinstance(module, LoraLayer)
    }
    for path, module in base.named_modules():
        if isinstance(module, IA3Layer):
            for name, tensor in scaled_tensors(module).items():
                merged[canonical_name(model, f"base_model.model.{path}.{name}")] = tensor
    state = {}
    for name, tensor in plain_state(base).items():
        if ".lora_" in name or ".ia3_l" in name or ".original_module." in name:
            continue
        plain = canonical_name(model, f"base_model.model.{name}")
        if plain in merged:
            tensor = merged.pop(plain)
        # A copy for each changed tensor only. The head is float32 while it is trained on a bfloat16 base.
        if tensor.is_floating_point():
            tensor = tensor.to(base.dtype)
        state[plain] = tensor
    assert not merged, f"what was changed is not in the model: {', '.join(merged)}"
    return state


def _save_peft(model: PeftModel, folder: Path, place: Path) -> None:
    # Asked to decide whether embeddings were resized, PEFT would look for the base on the hub.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    about = _read_json(folder / PEFT_CONFIG)
    state = _adapter_state(model)
    if state.keys() != _read_tensors(folder / PEFT_WEIGHTS).keys() or joined_rank(model):
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(held, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    if rank := joined_rank(model):  # plain LoRA of twice the rank, and of the same scale
        times = (rank / about["r"]) ** (0.5 if about["use_rslora"] else 1.0)
        about |= {"r": rank, "lora_alpha": about["lora_alpha"] * times}
    for key in (
        "target_modules",
        "exclude_modules",
        "feedforward_modules",
        "modules_to_save",
    ):  # sets, in whatever order
        if isinstance(about.get(key), list):
            about[key] = sorted(about[key])
    base = cast(PreTrainedModel, model.get_base_model())
    # Of an adapter that was read back PEFT keeps the base that it was trained on, wherever that was.
    about["base_model_name_or_path"] = str(base.name_or_path)
    about["revision"] = getattr(base, REVISION, None)
    if about.get("task_type") == "SEQ_CLS":
        # PEFT has no field for classes; in this one it keeps what it does not know.
        about["auto_mapping"] = {"base_model": about["base_model_name_or_path"], **_classes(base)}
        if _save_base(base, folder / BASE):
            about["base_model_name_or_path"] = str(place / BASE)
    _write_json(folder / PEFT_CONFIG, about)


def _adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """What an adapter's file holds, by PEFT's names: with trained biases, and with what factors began as."""
    state = dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    if model.active_peft_config.is_prompt_learning:
        return state
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith(".bias") and ".modules_to_save." not in name:
            state.setdefault(name, parameter.detach())  # PEFT looks for lora_only's under another name
    for path, layer in lora_layers(model).items():
        if (joined := joined_factors(layer)) is not None:
            for part, tensor in zip("AB", joined, strict=True):
                state[f"base_model.model.{path}.lora_{part}.weight"] = tensor
    return state


def _save_base(base: PreTrainedModel, folder: Path) -> bool:
    """Writes the configuration of a classifier's base as it is used, and links to its weights.

    Returns:
        Whether there was need for one, and weights on this machine under the base's own name.
    """
    name = str(base.name_or_path)
    if name != BUNDLED and not Path(name).is_absolute():
        return False
    source, own = local_folder(name), classes_of(base.config.to_dict())
    if source is None or classes_in(source) == own:
        return False
    try:
        files = weight_files(name, source)
    except InputError:  # it was drawn from a seed, and no other program can draw it again
        return False
    base.config.save_pretrained(folder)
    mend_config(folder / CONFIG)
    shapes = dict[str, tuple[str, list[int]]]()
    kept = {
        ".".join(part for part in key.split(".") if part not in ("base_layer", "original_module")): tensor
        for key, tensor in base.state_dict().items()
        if ".modules_to_save." not in key
    }
    for file in files:
        with safe_open(file, framework="pt") as stream:
            shapes |= {key: (file.name, stream.get_slice(key).get_shape()) for key in stream.keys()}  # noqa: SIM118
    links = {file.name: file for file in files}
    other = {key for key, (_, shape) in shapes.items() if key in kept and shape != list(kept[key].shape)}
    if other:  # a head for other classes: transformers reads files by name, and the last has the word
        links = {f"base-{file}": path for file, path in links.items()}
        where = {key: f"base-{file}" for key, (file, _) in shapes.items()} | dict.fromkeys(other, HEADS)
        save_file({key: kept[key].cpu().contiguous() for key in other}, folder / HEADS)
        _write_json(folder / WEIGHTS_INDEX, {"metadata": {}, "weight_map": where})
    elif files[0].name != WEIGHTS:
        links[WEIGHTS_INDEX] = source / WEIGHTS_INDEX
    for link, path in links.items():
        (folder / link).symlink_to(path.absolute())
    return True


def _classes(model: PreTrainedModel) -> dict[str, Any]:
    about = model.config.to_dict()
    return {key: about[key] for key in ("id2label", "label2id") if key in about}


def _save_adapter(model: PreTrainedModel, folder: Path) -> None:
    size = next(iter(find_bottlenecks(model).values())).down.out_features
    about = {
        "format": ADAPTER_FORMAT,
        "version": ADAPTER_VERSION,
        "base_model": model.name_or_path,
        "size": size,
        "placement": PLACEMENT,
        **(_classes(model) if classes_of(model.config.to_dict()) else {}),
    }
    _write_json(folder / ADAPTER_CONFIG, about)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trainable(model).items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _load_adapter(folder: Path, base_model_loader: Callable[[str], Loaded]) -> Loaded:
    about = _read_json(folder / ADAPTER_CONFIG)
    known = about.get("format") == ADAPTER_FORMAT and about.get("version") == ADAPTER_VERSION
    if not known or not isinstance(about.get("size"), int) or not isinstance(about.get("base_model"), str):
        raise InputError(f"{folder / ADAPTER_CONFIG}: not a {ADAPTER_FORMAT} of version {ADAPTER_VERSION}.")
    tensors = _read_tensors(folder / ADAPTER_WEIGHTS)
    loaded = base_model_loader(about["base_model"])
    if about.get("placement") != PLACEMENT and not sits_as_before(loaded.model):
        raise InputError(
            f"{folder} was trained by a version that put adapters elsewhere in "
            f"{type(loaded.model).__name__} ({about.get('placement')}). Train it again, or use the version "
            "that wrote it."
        )
    model = attach_adapter(loaded.model, size=about["size"], seed=0)
    parameters = trainable(model)
    _require_same(folder, tensors, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return replace(loaded, model=model.requires_grad_(False).eval())


def _load_peft(folder: Path, base_model_loader: Callable[[str], Loaded]) -> Loaded:
    about = _read_json(folder / PEFT_CONFIG)
    name = (about.get("auto_mapping") or {}).get("base_model") or about.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{folder / PEFT_CONFIG} does not name its base model (base_model_name_or_path).")
    saved = _read_tensors(folder / PEFT_WEIGHTS)
    loaded = base_model_loader(name)
    float32_heads(loaded.model)
    with usable(f"{folder} does not fit its base model {name}"):
        config = PeftConfig.from_pretrained(str(folder))
        with seeded(0), quiet():  # it draws values first, which those of the file replace
            model = PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=False)
        if config.is_prompt_learning:
            mend_soft_prompt(model)
    # PEFT only warns when tensors are left over or missing, as they are on a base of another depth.
    present = get_peft_model_state_dict(model, save_embedding_layers=False)
    _require_same(folder, saved, present)
    # A PeftModel is no PreTrainedModel to the type checker, but is called and generates as one.
    return replace(loaded, model=cast(PreTrainedModel, model.eval()))


def _require_same(folder: Path, saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    has = {name: tensor.shape for name, tensor in saved.items()}
    needs = {name: tensor.shape for name, tensor in wanted.items()}
    if has != needs:
        different = sorted(n for n in has.keys() | needs.keys() if has.get(n) != needs.get(n))
        raise InputError(
            f"{folder} does not fit its base model: {len(different)} tensors are missing, left over or of "
            f"another shape, the first is {different[0]}."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def _write_json(path: Path, about: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged: {first_line(error)}") from error
