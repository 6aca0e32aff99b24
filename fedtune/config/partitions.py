"""The settings of each partitioner: those of fedtune's own, or made from a function's parameters."""

from __future__ import annotations

import inspect
import typing
from functools import cache
from typing import Any, Literal, Self

from pydantic import Field, PydanticUserError, create_model, model_validator

from fedtune.core.settings import Settings
from fedtune.data.partition import PARTITIONERS
from fedtune.errors import InputError
from fedtune.registry import FEDTUNE

By = Literal["category", "output"]


class Iid(Settings):
    """Examples shuffled and dealt out evenly."""

    name: Literal["iid"] = "iid"


class Dirichlet(Settings):
    """Each label's examples split by a Dirichlet(alpha) draw, redrawn until everyone has `minimum`."""

    name: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(0.5, gt=0)
    minimum: int = Field(10, ge=1)
    by: By = "category"


class ByField(Settings):
    """One value of a field a client."""

    name: Literal["by-field"] = "by-field"
    by: By = "category"


class Shards(Settings):
    """Examples sorted by label, cut into shards, a few shards a client."""

    name: Literal["shards"] = "shards"
    shards_per_client: int = Field(2, ge=1)
    by: By = "category"


class Quantity(Settings):
    """Unequal sizes: a Dirichlet(alpha) draw over the clients, or given fractions."""

    name: Literal["quantity"] = "quantity"
    alpha: float | None = Field(None, gt=0)
    fractions: list[float] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("alpha") is None and values.get("fractions") is None:
            return {**values, "alpha": 1.0}
        return values

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        if self.alpha is not None and self.fractions is not None:
            raise ValueError("alpha and fractions are both set; keep the one that is meant")
        return self


class Given(Settings):
    """Python objects that come client by client: each keeps what it was given."""

    name: Literal["given"] = "given"


class FromFile(Settings):
    """The indices that a JSON file lists for each client: an object by client names, or a list of lists."""

    name: Literal["file"] = "file"
    path: str  # the file; indices into the training examples, without held-out ones, as in partition.json
    rest: Literal["refuse", "leave-out"] = "refuse"  # examples that the file gives to nobody


class OneFile(Settings):
    """One file of `data.train` a client; `data.clients: files` sets it."""

    name: Literal["files"] = "files"


PARTITIONS: tuple[type[Settings], ...] = (Iid, Dirichlet, ByField, Shards, Quantity, FromFile, Given, OneFile)


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
