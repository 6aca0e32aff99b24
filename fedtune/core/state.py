"""A method's state as a Payload and back, so that one checkpoint format serves every method.

A state is a frozen dataclass whose fields are scalars, tensors, or mappings from names to either.
A mapping's entry travels as "field/name".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

from torch import Tensor

from fedtune.core.types import Payload, Scalar

T = TypeVar("T")


@runtime_checkable
class ScoredState(Protocol):
    """A state that holds more than `Method.export` reads of it."""

    def for_scoring(self) -> Self:
        """Without what the server needs for its own steps: what clients are sent to score the result."""


@runtime_checkable
class TellingMethod(Protocol):
    """A method whose state says more of a round than its losses."""

    def told(self, state: Any) -> dict[str, Any]:
        """What the round's line in rounds.jsonl says of the state after it, as JSON."""


def for_scoring(state: T) -> T:
    """What `Method.export` needs of a state; all of one that does not say."""
    return state.for_scoring() if isinstance(state, ScoredState) else state


def to_payload(state: object) -> Payload:
    """Flattens a state.

    Raises:
        TypeError: A field holds something that is neither a scalar, a tensor nor a mapping of those.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Scalar] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, int | float | str):
            scalars[name] = value
        else:
            raise TypeError(
                f"{type(state).__name__}.{name} is {type(value).__name__}: a state holds scalars and tensors"
            )

    for spec in dataclasses.fields(state):  # type: ignore[arg-type]
        value = getattr(state, spec.name)
        if isinstance(value, Mapping):
            for key, entry in value.items():
                put(f"{spec.name}/{key}", entry)
        elif value is not None:
            put(spec.name, value)
    return Payload(tensors, scalars)


def from_payload(cls: type[T], payload: Payload) -> T:
    """Builds a state of class `cls` from what `to_payload` gave.

    Raises:
        ValueError: The payload holds fields that `cls` does not have.
    """
    fields = {spec.name for spec in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in [*payload.tensors.items(), *payload.scalars.items()]:
        head, slash, rest = name.partition("/")
        if head not in fields:
            raise ValueError(f"{cls.__name__} has no field {head}; it has {', '.join(sorted(fields))}")
        if slash:
            values.setdefault(head, {})[rest] = value
        else:
            values[head] = value
    for spec in dataclasses.fields(cls):  # type: ignore[arg-type]
        if spec.name not in values:  # an empty mapping leaves no entry behind
            has_default = (
                spec.default is not dataclasses.MISSING or spec.default_factory is not dataclasses.MISSING
            )
            if not has_default:
                values[spec.name] = {}
    return cls(**values)
