"""The settings of a partitioner by its name: those of fedtune's own, or made from a function's parameters."""

from __future__ import annotations

import inspect
import typing
from functools import cache
from typing import Any, Literal

from pydantic import PydanticUserError, create_model

from fedtune.config.schema import PARTITIONS
from fedtune.core.settings import Settings
from fedtune.data.partition import PARTITIONERS
from fedtune.errors import InputError
from fedtune.registry import FEDTUNE


def partition_class(name: str) -> type[Settings]:
    """The class of a partitioner's settings.

    Raises:
        InputError: No partitioner has that name, or the types of its parameters are none of settings.
    """
    part = PARTITIONERS.part(name)
    if part.origin == FEDTUNE:
        return next(cls for cls in PARTITIONS if cls.model_fields["name"].default == name)
    return _made(name, part.load())


@cache
def _made(name: str, function: Any) -> type[Settings]:
    """A block with the keyword-only parameters of a function as its settings."""
    try:
        types = typing.get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {"name": (Literal[name], name)} | {
            p.name: (types[p.name], ... if p.default is p.empty else p.default)
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        return create_model(name, __base__=Settings, **fields)
    except (
        NameError,
        TypeError,
        PydanticUserError,
    ) as error:  # unknown names, and types that are no settings
        cause = str(error).partition("\n")[0]
        raise InputError(f"partitioner {name}: its parameters cannot be settings: {cause}") from None
