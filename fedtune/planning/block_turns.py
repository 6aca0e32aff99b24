"""Operations of the methods that train one block at a time: a mean over the turns of a run.

A turn's step goes forward through every block that the client's model has, and back from the top to the part
that it trains. So with w whole and p pruned blocks in the model, w' and p' of them above that part, it costs

    forward    a + f (w + r p)      a: what is around the blocks
    backward   b + g (w' + r p')    b: what is around them, and the part itself; another for embeddings

`dry_run.py` takes a few turns' steps without values; the coefficients follow from those, and with them what
all turns of the run cost, whose models the orders describe. A pruned block's share r of a whole one is that
of the forward pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedtune.core.types import Scalar
from fedtune.models.parts import block_of

BLOCK = "block"


@dataclass(frozen=True)
class Turn:
    """One part being trained.

    Attributes:
        kind: `BLOCK`, or the name of a part around the blocks.
        whole, pruned: Blocks of the client's model.
        whole_above, pruned_above: Those that the backward pass crosses before it comes to the part.
    """

    kind: str
    whole: int
    pruned: int = 0
    whole_above: int = 0
    pruned_above: int = 0

    @staticmethod
    def of(part: str, blocks: Mapping[int, bool]) -> Turn:
        """The turn of a part in a model with these blocks, each pruned or not."""
        own = block_of(part)
        lowest = own if own is not None else -1 if part == "embeddings" else max(blocks, default=0)
        above = [pruned for block, pruned in blocks.items() if block > lowest]
        count = sum(blocks.values())
        kind = part if own is None else BLOCK
        return Turn(kind, len(blocks) - count, count, len(above) - sum(above), sum(above))


def ordered(scalars: Mapping[str, Scalar]) -> list[Turn]:
    """The turns that an order of FedCyBGD or FedBAvg asks for; none of other methods' orders."""
    if "forms" not in scalars:
        return []
    forms: dict[str, str] = json.loads(str(scalars["forms"]))
    blocks = {int(part): form.endswith("p") for part, form in forms.items() if part.isdigit()}
    return [Turn.of(part, blocks) for part in str(scalars["own"]).split(",")]


@dataclass(frozen=True)
class Cost:
    """What the step of a turn takes, in floating-point operations."""

    turn: Turn
    forward: int
    backward: int


def mean_cost(known: Sequence[Cost], turns: Sequence[Turn]) -> tuple[int, int]:
    """Forward and backward operations of a step, the mean over `turns`.

    Args:
        known: Steps that were run: of the lowest and the highest block, in a model without pruned blocks, and
            of each kind of part that is trained; where models have unlike numbers of blocks, of one such; and
            where blocks are pruned, of one with pruned blocks.
        turns: Of the run.
    """
    plain = [cost for cost in known if not cost.turn.pruned]
    blocks = [cost for cost in plain if cost.turn.kind == BLOCK]
    low, high = (choose(blocks, key=lambda cost: cost.turn.whole_above) for choose in (max, min))
    crossed = low.turn.whole_above - high.turn.whole_above
    g = (low.backward - high.backward) / crossed if crossed else 0.0
    small, large = (choose(plain, key=lambda cost: cost.turn.whole) for choose in (min, max))
    more = large.turn.whole - small.turn.whole
    f = (large.forward - small.forward) / more if more else 0.0
    a = small.forward - f * small.turn.whole
    r = 1.0
    for cost in known:
        if cost.turn.pruned and f:
            r = ((cost.forward - a) / f - cost.turn.whole) / cost.turn.pruned
    b = {cost.turn.kind: cost.backward - g * cost.turn.whole_above for cost in [*plain, high]}
    forward = sum(a + f * (turn.whole + r * turn.pruned) for turn in turns)
    backward = sum(b[turn.kind] + g * (turn.whole_above + r * turn.pruned_above) for turn in turns)
    return round(forward / len(turns)), round(backward / len(turns))
