"""Model folders with something wrong in them: what is done to a good one, who notices, what is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from model_families import COMMON, GROUPED, edit_json
from model_families import tokenizer as words
from safetensors.torch import load_file, save_file

ALL, LOADING, RUNNING = ("plan", "run", "eval"), ("run", "eval"), ("plan", "run")


@dataclass(frozen=True)
class Broken:
    """One way to be broken.

    Attributes:
        breaks: Does it to a good folder of a tiny Llama.
        says: Parts of the sentence.
        commands: Who refuses it; the others never read what is broken.
        settings: Overrides that it takes.
    """

    breaks: Callable[[Path], Any]
    says: tuple[str, ...]
    commands: tuple[str, ...] = ALL
    settings: tuple[str, ...] = ()


def config(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def gone(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def folder_in_place_of(name: str) -> Callable[[Path], Any]:
    def breaks(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return breaks


def cut(name: str, size: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def breaks(folder: Path) -> None:
        file = folder / "model.safetensors"
        held = load_file(file)
        change(held)
        save_file(held, file, metadata={"format": "pt"})

    return breaks


def index(document: Any) -> Callable[[Path], Any]:
    def breaks(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(document))

    return breaks


def family(settings: transformers.PretrainedConfig, auto: Any = None) -> Callable[[Path], Any]:
    def breaks(folder: Path) -> None:
        shutil.rmtree(folder)
        if auto is None:
            settings.save_pretrained(folder)
        else:
            with torch.random.fork_rng(devices=[]):
                auto.from_config(settings).save_pretrained(folder)
        words().save_pretrained(folder)

    return breaks


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def larger_vocabulary(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"] |= {f"more{number}": 64 + number for number in range(9)}
    (folder / "tokenizer.json").write_text(json.dumps(document))


CLASSIFY = ("model.task=classification",)
ADAPTER = ("method.trainable=adapter", "method.lora=null")
HUGE = 10**12
GEMMA3 = transformers.Gemma3Config(
    text_config={**GROUPED, "sliding_window": 8},
    vision_config={
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    },
    mm_tokens_per_image=1,
)
T5 = transformers.T5Config(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
)
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
REMOTE = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}

FOLDERS: dict[str, Broken] = {
    "config is a list": Broken(text("config.json", "[]"), ("config.json is no configuration",)),
    "config is empty": Broken(text("config.json", ""), ("config.json is no configuration",)),
    "config is binary": Broken(text("config.json", bytes(range(256))), ("config.json is no configuration",)),
    "config is cut": Broken(cut("config.json", 40), ("config.json is no configuration",)),
    "config is missing": Broken(gone("config.json"), ("no config.json in m",)),
    "config is a folder": Broken(folder_in_place_of("config.json"), ("no config.json in m",)),
    "no model type": Broken(text("config.json", "{}"), ("config.json is no configuration",)),
    "unknown model type": Broken(
        config(model_type="unheard-of"), ("config.json is no configuration", "unheard-of")
    ),
    "another kind of model": Broken(config(model_type="vit"), ('no causal-lm model of type "vit"',)),
    "remote code": Broken(config(**REMOTE), ("config.json is no configuration",)),
    "NaN as a size": Broken(config(hidden_size=float("nan")), ("model m", "hidden_size")),
    "text as a size": Broken(config(hidden_size="wide"), ("model m", "hidden_size")),
    "a negative size": Broken(config(vocab_size=-1), ("model m",)),
    "negative layers": Broken(config(num_hidden_layers=-1), ("model m", "num_hidden_layers")),
    "no layers": Broken(config(num_hidden_layers=0), ("model m", "num_hidden_layers")),
    "no attention heads": Broken(
        config(num_attention_heads=0, head_dim=None), ("model m", "num_attention_heads")
    ),
    "heads that do not divide": Broken(config(num_key_value_heads=3), ("model m", "num_key_value_heads")),
    "unknown activation": Broken(config(hidden_act="nonsense"), ("model m", "nonsense")),
    "unknown positions": Broken(
        config(rope_parameters={"rope_type": "nonsense", "rope_theta": 1e4}), ("model m",)
    ),
    "no context": Broken(config(max_position_embeddings=-3), ("max_position_embeddings",)),
    "huge sizes": Broken(config(hidden_size=HUGE, intermediate_size=HUGE), ("model m",)),
    "quantised without its package": Broken(
        config(quantization_config=BITS), ("model m", "quantised"), LOADING
    ),
    "weights cut": Broken(cut("model.safetensors", 1000), ("model.safetensors is damaged",), LOADING),
    "weights empty": Broken(text("model.safetensors", b""), ("model.safetensors is damaged",), LOADING),
    "weights are text": Broken(
        text("model.safetensors", "version https://git-lfs.github.com"),
        ("model.safetensors is damaged",),
        LOADING,
    ),
    "weights missing": Broken(gone("model.safetensors"), ("no weights in m",), LOADING),
    "weights a folder": Broken(folder_in_place_of("model.safetensors"), ("no weights in m",), LOADING),
    "weights pickled": Broken(pickled, ("pickle only",), LOADING),
    "weights of none": Broken(tensors(dict.clear), ("lack",), LOADING),
    "weights lack one": Broken(
        tensors(lambda held: held.pop("model.norm.weight")), ("lack 1 tensors", "model.norm.weight"), LOADING
    ),
    "weights of other shapes": Broken(config(intermediate_size=40), ("another shape", "mlp"), LOADING),
    "index of a missing shard": Broken(
        index({"weight_map": {"a": "model-2.safetensors"}}), ("lacks model-2.safetensors",), LOADING
    ),
    "index without a map": Broken(index({"weight_map": [1]}), ("no index of weights",), LOADING),
    "index is a list": Broken(index([]), ("no index of weights",), LOADING),
    "tokenizer missing": Broken(gone("tokenizer.json"), ("no tokenizer in m",), LOADING),
    "tokenizer broken": Broken(text("tokenizer.json", "{"), ("the tokenizer in m cannot be read",)),
    "tokenizer a list": Broken(text("tokenizer.json", "[]"), ("the tokenizer in m cannot be read",)),
    "tokenizer a folder": Broken(folder_in_place_of("tokenizer.json"), ("no tokenizer in m",), LOADING),
    "tokenizer settings broken": Broken(
        text("tokenizer_config.json", "{"), ("the tokenizer in m cannot be read",)
    ),
    "tokenizer of another model": Broken(larger_vocabulary, ("73 tokens", "embeddings for 64"), LOADING),
    "T5 classifies": Broken(family(T5), ('"t5" is an encoder-decoder',), ALL, CLASSIFY),
    "T5 generates": Broken(family(T5), ("t5",)),
    "Gemma 3 with pictures and adapters": Broken(
        family(GEMMA3, transformers.AutoModelForCausalLM), ("method.trainable adapter",), RUNNING, ADAPTER
    ),
    "XLNet generates": Broken(
        family(
            transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48),
            transformers.AutoModelForCausalLM,
        ),
        ("xlnet",),
    ),
    "BART classifies": Broken(
        family(transformers.BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1)),
        ('"bart" is an encoder-decoder',),
        ALL,
        CLASSIFY,
    ),
    "an encoder generates": Broken(family(transformers.BertConfig(**COMMON)), ('"bert" is an encoder',)),
}
