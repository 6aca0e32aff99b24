"""Trained models written to a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedtune.federation.files import atomic_folder, disk_errors
from fedtune.models.bottleneck import find_bottlenecks
from fedtune.models.save import save_result


def save_models(
    models: Iterable[tuple[str, nn.Module]],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    merge: bool,
    what: str,
) -> list[Path]:
    """Writes models into `path`, all of them or none: the one called global there, others in folders.

    Returns:
        The folders written; `what` names them in an error.

    Raises:
        FederationError: The disk is full or cannot be written.
    """
    written = []
    with disk_errors(what), atomic_folder(path) as new:
        for name, model in models:
            where = new if name == "global" else new / name
            where.mkdir(exist_ok=True)
            # what stands beside the result has a base model that only this method can build
            beside = name != "global" and not name.startswith("client-")
            whole = (merge or beside) and _is_adapter(model)
            place = path if name == "global" else path / name
            save_result(cast(PreTrainedModel, model), tokenizer, where, merge=whole, place=place)
            written.append(place)
    return written


def _is_adapter(model: nn.Module) -> bool:
    """Whether something is attached to the base model; a whole model needs no merging."""
    return isinstance(model, PeftModel) or bool(find_bottlenecks(model))
