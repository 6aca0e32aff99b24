"""The tokens that end and pad a text, where a tokenizer does not name them and its model's files do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedtune.errors import InputError
from fedtune.models.folders import CONFIG

FILES = ("generation_config.json", CONFIG)  # in this order: the first was made for generating


def name_ends(tokenizer: PreTrainedTokenizerBase, name: str, folder: Path) -> None:
    """Gives a tokenizer the end and pad tokens that it lacks: the model's, and for padding else the end.

    Args:
        tokenizer: Changed in place.
        name: The model's, for errors.
        folder: Where `eos_token_id` and `pad_token_id` may stand, in `FILES`.

    Raises:
        InputError: Neither token is named anywhere.
    """
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = _named(tokenizer, folder, "eos_token_id")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _named(tokenizer, folder, "pad_token_id") or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"model {name}: its tokenizer has neither a pad nor an eos token, and {' and '.join(FILES)} name "
            f"none. Set one in {folder}."
        )


def _named(tokenizer: PreTrainedTokenizerBase, folder: Path, key: str) -> str | None:
    """The first token that a file names by its number; None where none does."""
    for about in _settings(folder):
        value = about.get(key)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and 0 <= number < len(tokenizer):
                token = tokenizer.convert_ids_to_tokens(number)
                if isinstance(token, str):
                    return token
    return None


def _settings(folder: Path) -> Iterator[dict[str, Any]]:
    for name in FILES:
        if (folder / name).is_file():
            about = json.loads((folder / name).read_text(encoding="utf-8"))
            for part in (about, about.get("text_config") if isinstance(about, dict) else None):
                if isinstance(part, dict):
                    yield part
