"""What a client's batches are made of, and which of it share one: `data.batching`.

Padding is computed like any other token and teaches nothing. It goes where the lengths in a batch differ:
either examples of like length share one (`epoch_batches` of `batches.py`), or several examples share a row
(`packing.py`). Both change which examples a step sees together, and no number of any one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from fedtune.data.encoded import Encoded

Name = Literal["random", "length-grouped", "packed"]


@dataclass(frozen=True)
class Batching:
    """How examples become batches.

    Attributes:
        name: `random`: as they were shuffled. `length-grouped`: those of like length share a batch. `packed`:
            a batch is of rows, each of one or more whole examples that do not see each other.
        room: The most tokens of a row, with `packed`.
    """

    name: Name = "random"
    room: int = 0

    def rows(self, items: Sequence[Encoded], generator: torch.Generator) -> Sequence[Encoded]:
        """What batches of these examples are made of: the examples, or rows of them.

        Args:
            items: Encoded examples.
            generator: A CPU generator; with `packed` one permutation is drawn.
        """
        from fedtune.data.packing import Packed  # here, so that a configuration is checked without torch

        return Packed.of(items, self.room, generator) if self.name == "packed" else items

    def lengths(self, rows: Sequence[Encoded]) -> list[int] | None:
        """Tokens of each row, where they decide which ones share a batch; else None."""
        from fedtune.data.encoded import lengths_of

        return lengths_of(rows) if self.name == "length-grouped" else None


RANDOM = Batching()


def batching_refusal(name: Name, *, task: str, prompt: bool) -> str | None:
    """Why a run's examples cannot become batches that way; None: they can.

    Args:
        name: Which way.
        task: As `model.task`.
        prompt: Whether a soft prompt is trained.
    """
    why = None
    if name == "packed" and task == "classification":
        why = "a classifier gives a row one class"
    elif name == "packed" and prompt:
        why = "of a row only the first example would stand behind the soft prompt"
    return why and f"packed puts several examples into a row, and {why}; take length-grouped"
