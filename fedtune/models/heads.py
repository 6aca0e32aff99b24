"""A classifier's head, which trains whatever else of the model does, and is part of what is saved.

It is every module beside the model's body, whatever the family calls it (`classifier`, `score`,
`pre_classifier`, `pooler`, `sequence_summary`, ...), and a pooler inside the body where the weights lacked
it, so that loading had to draw it: frozen, it would stay random, and who loads the result would not have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

_CLASSIFIERS = frozenset(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
_POOLER = "pooler"
_DRAWN = "drawn_modules"  # attribute of a model: paths of the modules inside its body that were drawn


def is_classifier(model: nn.Module) -> bool:
    """Whether it classifies whole texts."""
    return type(model).__name__ in _CLASSIFIERS


def mark_drawn(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Notes which parameters of a classifier were drawn, so that `head_modules` knows of them.

    Args:
        model: Changed by an attribute that its copies have too.
        names: Of parameters of the head or a pooler, as `named_parameters` gives them; of others nothing is
            noted.
    """
    setattr(model, _DRAWN, tuple(sorted({pooler_of(model, name) for name in names} - {""})))


def pooler_of(model: PreTrainedModel, name: str) -> str:
    """The path of the pooler inside a classifier's body that a parameter belongs to; "" where it does not."""
    parts = name.split(".")
    if not is_classifier(model) or parts[0] != model.base_model_prefix or _POOLER not in parts[:-1]:
        return ""
    return ".".join(parts[: parts.index(_POOLER) + 1])


def outside_body(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter stands beside the model's body."""
    return not name.startswith(f"{model.base_model_prefix}.")


def drawn_modules(model: nn.Module) -> list[str]:
    """The paths of the modules that `mark_drawn` noted."""
    return list(getattr(model, _DRAWN, ()))


def head_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules of a classifier that always train, by path; none in a model that generates."""
    if not is_classifier(model):
        return {}
    beside = {
        name: module
        for name, module in model.named_children()
        if name != model.base_model_prefix and next(module.parameters(), None) is not None
    }
    return beside | {path: model.get_submodule(path) for path in drawn_modules(model)}


def lacking_poolers(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Parameters of poolers that weights lack or have in another shape, before anything is loaded.

    Args:
        model: Of any device, also torch's meta device.
        shapes: Of the tensors in the weights, by name; a body alone has names without its prefix.
    """
    prefix = f"{model.base_model_prefix}."
    return [
        name
        for name, parameter in model.named_parameters()
        if pooler_of(model, name)
        and tuple(parameter.shape) not in (shapes.get(name), shapes.get(name.removeprefix(prefix)))
    ]


def float32_heads(model: PreTrainedModel) -> list[nn.Module]:
    """Makes the head's modules float32 in place, casting their inputs too, and gives them."""
    heads = list(head_modules(model).values())
    for head in heads:
        if next(head.parameters()).dtype != torch.float32:
            head.float()
            head.register_forward_pre_hook(_cast_to_float32)
    return heads


def _cast_to_float32(module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args)
