"""Load a tokenizer and a model; safetensors only, no remote code, and no randomness but the given seed."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from fedtune.errors import InputError, nearest
from fedtune.models.boundary import usable
from fedtune.models.ends import name_ends
from fedtune.models.folders import (
    CONFIG,
    files_sha256,
    has_weights,
    model_folder,
    of_revision,
    require_config,
    require_tokenizer,
    settings_sha256,
    tensor_shapes,
    weight_files,
)
from fedtune.models.heads import drawn_modules, lacking_poolers, mark_drawn, outside_body, pooler_of
from fedtune.models.mapped import adopt, known, share
from fedtune.models.memory_efficient import release_memory
from fedtune.models.quantize import quantization_of, quantize, quantized_parameters, quantized_sha256
from fedtune.models.quantized_checkpoints import as_it_comes, came_quantised, load_quantised

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REVISION = "hub_revision"  # attribute of a model
INITIALS = ("pretrained", "scratch")
QUANTIZATIONS = ("none", "int8", "nf4")
TASKS: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
}
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2")
ARCHITECTURES = {
    "causal-lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
# transformers also gives these a causal form, meant for the decoder half of an encoder-decoder: their weights
# were trained to look both ways and generate nothing of use.
# XLNet's and XLM's also take their loss without a shift: a token would be asked for that the model sees.
ENCODERS = frozenset(
    {
        *("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"),
        *("roberta", "roberta-prelayernorm", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet"),
        "xmod",
    }
)


@dataclass(frozen=True)
class Loaded:
    """A model with what belongs to it.

    Attributes:
        model: In eval mode, on the CPU, all parameters trainable.
        tokenizer: Has a pad token.
        name: As the configuration gave it: "bundled", a folder or a hub name.
        weights_sha256: Of the safetensors files' bytes, or of the initial weights when drawn from a seed.
        settings_sha256: By name, of each file beside the weights that loading reads; of a hub model's too.
        quantization: "none", or how the weights of linear layers are kept: nf4, int8, or as they came.
        quantized_sha256: Of the bits that are kept so; "" of none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    weights_sha256: str
    settings_sha256: Mapping[str, str] = field(default_factory=dict)
    quantization: str = "none"
    quantized_sha256: str = ""


def load_tokenizer(name: str, base: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model; the end-of-text token pads where there is no pad token.

    Args:
        name: "bundled", a folder (relative to `base`) or a hub name.
        base: The folder that relative names start from.

    Raises:
        InputError: No such model, no tokenizer files, unreadable ones, or a tokenizer with neither token.
    """
    return _tokenizer(name, model_folder(name, base, weights=False))


def load_model(
    name: str,
    *,
    dtype: str,
    initial: str,
    task: str = "causal-lm",
    num_labels: int | None = None,
    seed: int,
    base: Path,
    shared: Path | None = None,
    quantization: str = "none",
    attention: str = "auto",
) -> Loaded:
    """Loads a model and its tokenizer.

    Args:
        name: "bundled", a folder (relative to `base`) or a hub name, with @ and a revision behind it or not.
        dtype: Of the parameters, a name in `DTYPES`, whatever dtype the weights are stored in.
        initial: "pretrained", or "scratch" for the same architecture with random weights drawn from `seed`.
        task: "causal-lm" or "classification".
        num_labels: Classes of a classifier; None takes the number in config.json. A head that the weights
            lack, or have for another number of classes, is drawn from `seed`.
        seed: The only source of randomness; torch's own generator is left as it was.
        base: The folder that relative names start from.
        shared: A folder of several processes that hold the same model, empty for the first of them: their
            weights are then mapped from one file.
        quantization: How the weights of the blocks' linear layers are kept: none, int8, nf4 (quantize.py). A
            checkpoint that comes quantised stays as it came.
        attention: Which implementation of it: auto (transformers' choice), sdpa, eager, flash_attention_2.

    Raises:
        InputError: Anything wrong with the arguments, the folder, the weights or the hub.
    """
    _check(dtype, DTYPES, "model.dtype")
    _check(initial, INITIALS, "model.initial")
    _check(quantization, QUANTIZATIONS, "model.quantization")
    check_attention(attention, dtype)
    folder = model_folder(name, base, weights=initial == "pretrained")
    config = _config(name, folder, task, num_labels, attention)
    came = came_quantised(config, quantization, name, scratch=initial == "scratch")
    tokenizer = _tokenizer(name, folder)
    model: Any
    before, quantised = known(shared), bool(came) or quantization != "none"
    in_file = before is not None and before.written  # by whoever loaded it first
    if quantised:
        release_memory()  # and from here on at once what bits are made of
    with seeded(seed), quiet():
        if (
            shared is not None
            and before is not None
            and not quantised
            and (in_file or initial == "pretrained")
        ):
            digest = before.sha256
            model = _pretrained(name, shared if in_file else folder, config, task, DTYPES[dtype])
            mark_drawn(model, [f"{path}.weight" for path in before.drawn])
        elif came and initial == "pretrained":
            digest = files_sha256(name, weight_files(name, folder))
            load = partial(_pretrained, name, folder, config, task, DTYPES[dtype])
            model = load_quantised(name, came, DTYPES[dtype], load)
        elif initial == "scratch":
            with usable(f"model {name}: no model can be made from {folder / CONFIG}"):
                model = TASKS[task].from_config(config, dtype=DTYPES[dtype]).eval()
            digest = _state_sha256(model)
        else:
            digest = files_sha256(name, weight_files(name, folder))
            model = _pretrained(name, folder, config, task, DTYPES[dtype])
    if quantization != "none" and not came:
        quantize(model, quantization, name)
    if shared is not None and in_file and quantised:
        adopt(model, shared)
    with usable(f"model {name}: it has no input embeddings that fedtune can use"):
        vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"model {name}: its tokenizer has {len(tokenizer)} tokens, but its weights have embeddings for "
            f"{vocabulary}. Use the tokenizer that the model was trained with."
        )
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if task == "classification" and model.config.pad_token_id is None:
        # A decoder with a head classifies from the last token that is no padding.
        model.config.pad_token_id = tokenizer.pad_token_id
    _name(model, name)
    if shared is not None and before is None:
        share(model, shared, digest, drawn_modules(model))
    kept = came if came and quantized_parameters(model) else quantization_of(model)
    return Loaded(model, tokenizer, name, digest, settings_sha256(folder), kept, quantized_sha256(model))


def model_config(name: str, *, base: Path, task: str = "causal-lm") -> PretrainedConfig:
    """Reads a model's config.json.

    Raises:
        InputError: As `load_model`, but weights and tokenizer are neither needed nor read.
    """
    return _config(name, model_folder(name, base, weights=False), task, None)


def meta_model(
    name: str,
    *,
    base: Path,
    initial: str = "pretrained",
    task: str = "causal-lm",
    num_labels: int | None = None,
    dtype: str = "float32",
    quantization: str = "none",
    attention: str = "auto",
) -> PreTrainedModel:
    """Builds the architecture on torch's meta device from config.json alone: no weights, no memory.

    Where the weights are at hand, the list of their tensors says whether a classifier's pooler is among them;
    without them it is taken to be.

    Raises:
        InputError: As `load_model`, but weights and tokenizer are not needed.
    """
    _check(dtype, DTYPES, "model.dtype")
    check_attention(attention, dtype)
    folder = model_folder(name, base, weights=False)
    config = _config(name, folder, task, num_labels, attention)
    came = came_quantised(config, quantization, name, scratch=initial == "scratch")
    built = usable(f"model {name}: no model can be made from {CONFIG}")
    with built, torch.device("meta"), seeded(0), quiet():
        model: PreTrainedModel = TASKS[task].from_config(config, dtype=DTYPES[dtype]).eval()
    if initial == "pretrained" and task == "classification" and has_weights(folder):
        mark_drawn(model, lacking_poolers(model, tensor_shapes(name, weight_files(name, folder))))
    if came:
        as_it_comes(model, came, name)
    elif quantization != "none":
        quantize(model, quantization, name)
    _name(model, name)
    return model


def check_attention(attention: str, dtype: str) -> None:
    """Refuses an implementation of attention that this machine cannot run, with what is missing.

    transformers would fetch one from the hub in its place, and run it.
    """
    _check(attention, ATTENTIONS, "model.attention")
    if attention != "flash_attention_2":
        return
    missing = [
        *(["the package flash-attn"] if find_spec("flash_attn") is None else []),
        *([] if torch.cuda.is_available() else ["an NVIDIA GPU"]),
        *(["model.dtype: bfloat16 or float16"] if dtype == "float32" else []),
    ]
    if missing:
        raise InputError(
            f"model.attention: flash_attention_2 needs {' and '.join(missing)}; set it to auto or sdpa"
        )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts from `seed`; outside, it goes on as if nothing had been drawn.

    Only the CPU's generator is touched (`torch.manual_seed` would reset every GPU's too): new parameters are
    drawn on the CPU and moved, so a seed means the same bits on every device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and reports of transformers and PEFT: what matters becomes an error here."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT's own use of transformers' old names, and its report of what load_result refuses.
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # merged here
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _check(value: str, allowed: Iterable[str], field: str) -> None:
    if value not in allowed:
        choices = ", ".join(allowed)
        raise InputError(f'{field} must be one of {choices}, got "{value}".{nearest(value, allowed)}')


def _name(model: PreTrainedModel, name: str) -> None:
    # PEFT records this as the base model. A path to the bundled folder would mean nothing on another machine.
    hub, revision = (name, None) if Path(name).is_dir() else of_revision(name)
    model.name_or_path = model.config.name_or_path = hub
    if revision is not None:
        setattr(model, REVISION, revision)


def _config(
    name: str, folder: Path, task: str, num_labels: int | None, attention: str = "auto"
) -> PretrainedConfig:
    _check(task, TASKS, "task")
    require_config(name, folder)
    config = _read_config(name, folder)
    if attention != "auto":
        config._attn_implementation = attention
    kind = config.model_type
    if task == "causal-lm" and kind in ENCODERS:
        raise InputError(f'model {name}: "{kind}" is an encoder and cannot generate. Use it to classify.')
    if task == "classification" and config.is_encoder_decoder:
        raise InputError(
            f'model {name}: "{kind}" is an encoder-decoder, whose class depends on a text of its own. Use an '
            "encoder (BERT, RoBERTa) or a decoder to classify."
        )
    if kind not in ARCHITECTURES[task]:
        raise InputError(f'model {name}: transformers has no {task} model of type "{kind}".')
    if num_labels is not None:
        config.num_labels = num_labels
    if task == "classification":  # one class a text, whatever the weights were trained for before
        config.problem_type = "single_label_classification"
    return config


def _read_config(name: str, folder: Path) -> PretrainedConfig:
    with usable(f"model {name}: {folder / CONFIG} is no configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    require_tokenizer(name, folder)
    if (folder / CONFIG).is_file():  # a tokenizer's class depends on it: what is wrong with it is said of it
        require_config(name, folder)
        _read_config(name, folder)
    with usable(f"model {name}: the tokenizer in {folder} cannot be read"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        name_ends(tokenizer, name, folder)
    return tokenizer


def _pretrained(
    name: str,
    folder: Path,
    config: PretrainedConfig,
    task: str,
    dtype: torch.dtype,
    more: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    model: PreTrainedModel
    with usable(f"model {name}: the weights in {folder} cannot be loaded"):
        model, info = TASKS[task].from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported in `info`: only a head may differ, checked below
            **(more or {}),
        )
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    absent = sorted(set(info["missing_keys"]) | mismatched)
    if task == "classification":
        # drawn from the seed: a fresh head, and BERT's pooler, which masked-language-model weights lack
        mark_drawn(model, absent)
        absent = [key for key in absent if not outside_body(model, key) and not pooler_of(model, key)]
    if absent:
        raise InputError(
            f"model {name}: the weights in {folder} lack {len(absent)} tensors that {CONFIG} asks for, or "
            f"have them in another shape: {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}."
        )
    return model


def _state_sha256(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
