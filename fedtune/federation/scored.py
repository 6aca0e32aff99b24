"""Scores of what a run has at one moment, as its round's line has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluated:
    """Scores of a state's result (of one model a client their mean), of each model, and over the clients."""

    result: Scores = field(default_factory=dict)
    models: dict[str, Scores] = field(default_factory=dict)  # where there are several
    per_client: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)  # by task
    details: list[dict[str, Any]] = field(default_factory=list)  # lines of answers.jsonl
    pictures: dict[str, Tensor] = field(default_factory=dict)  # that a result made, by its name
    scored: dict[str, Any] = field(default_factory=dict)  # by clients: who did, and who was left out

    @property
    def more(self) -> dict[str, Any]:
        """What a line of rounds.jsonl has beside the result's scores, where there is any of it."""
        more = {"eval_clients": self.models, "per_client": self.per_client, "eval_notes": self.notes}
        more |= {"scored": self.scored}
        return {key: found for key, found in more.items() if found}
