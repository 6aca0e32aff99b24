"""What other libraries, and earlier versions of transformers, need of a saved result, beside its weights.

transformers 4 can read what 5 writes once three things are put back: the tokenizer's class, which 5 calls
TokenizersBackend; the list of extra tokens, which 4 looks for under another name and stumbles over under the
new one; and the settings of rotary positions, which 5 keeps in `rope_parameters` alone and 4, not knowing
that, silently takes at its defaults.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

TOKENIZER_CONFIG = "tokenizer_config.json"
_BACKEND = "TokenizersBackend"  # transformers 5; with this name 4 refuses the tokenizer
_ANY_FAST = "PreTrainedTokenizerFast"  # the same in both
_OF_THIS_LOADING = ("is_local", "local_files_only")  # no property of a tokenizer
# Of nested `rope_parameters`, those of one kind of layer: what transformers 4 calls their base.
_LAYER_BASES = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
_GPT_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def name_classes(config: PretrainedConfig, labels: Sequence[str]) -> None:
    """Writes a classifier's classes into its configuration, in the order of its outputs; none: nothing."""
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}


def classes_of(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that a configuration's `id2label` names, in order; none where it only numbers them."""
    named = about.get("id2label")
    if not isinstance(named, Mapping):
        return ()
    try:
        labels = tuple(str(named[key]) for key in sorted(named, key=int))
    except (TypeError, ValueError):
        return ()
    return () if labels == tuple(f"LABEL_{index}" for index in range(len(labels))) else labels


def mend_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets transformers 4 read a tokenizer that was just saved: the class of its source, and known names."""
    file = folder / TOKENIZER_CONFIG
    about = _read(file)
    origin = tokenizer.name_or_path  # a folder; nothing, if it was made in memory
    source = _read(Path(origin) / TOKENIZER_CONFIG).get("tokenizer_class") if origin else None
    if isinstance(source, str) and source != _BACKEND:
        about["tokenizer_class"] = source
    elif about.get("tokenizer_class") == _BACKEND:
        about["tokenizer_class"] = _ANY_FAST
    if isinstance(about.get("extra_special_tokens"), list):
        about["additional_special_tokens"] = about.pop("extra_special_tokens")
    for key in _OF_THIS_LOADING:
        about.pop(key, None)
    _write(file, about)


def mend_config(file: Path) -> None:
    """Adds to a config.json, where it has `rope_parameters`, the same under the names of transformers 4."""
    about = _read(file)
    rope = about.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    nested = {kind: part for kind, part in rope.items() if isinstance(part, dict) and kind in _LAYER_BASES}
    for kind, part in nested.items():
        about.setdefault(_LAYER_BASES[kind], part.get("rope_theta"))
    main = nested.get("full_attention", {} if nested else rope)
    names = _GPT_NEOX if about.get("model_type") == "gpt_neox" else {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in main:
            about.setdefault(names.get(key, key), main[key])
    scaling = {k: v for k, v in main.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type", "default") != "default":
        about.setdefault("rope_scaling", scaling)
    _write(file, about)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    value = json.loads(file.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def _write(file: Path, about: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(about, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
