"""What a client reports beside its reply, and what of it is believed.

Whoever holds a client's key can report anything. Only what is asked for is taken, and only where it can be
true: a negative peak of memory, or a name that nobody asked for, refuses the reply.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from fedtune.core.cohort import COMPUTED_TOKENS, PADDING_TOKENS, TRAINED_TOKENS
from fedtune.core.types import Scalar
from fedtune.core.wire import FrameError
from fedtune.errors import foreign
from fedtune.measure.memory import COLUMNS

LOSS = "train_loss"
PEAK_BYTES, HOW = "peak_bytes", "how"  # the client's memory, and how it was measured
MOST = 1 << 53  # of a count: a whole number, as a float holds it
COUNTS = frozenset({TRAINED_TOKENS, COMPUTED_TOKENS, PADDING_TOKENS, "steps", PEAK_BYTES, *COLUMNS})
KNOWN = COUNTS | {LOSS, HOW}
_ADDRESS = frozenset({"round", "client"})


def reported(meta: Mapping[str, Scalar], *, more: Collection[str] = ()) -> tuple[dict[str, float], str]:
    """The metrics in a reply's bookkeeping, and how its memory was measured.

    Args:
        meta: The bookkeeping.
        more: Names of metrics that the method's clients report besides.

    Raises:
        FrameError: A name was not asked for, or a value cannot be one.
    """
    metrics = {}
    for name, value in meta.items():
        if name in _ADDRESS:
            continue
        if name not in KNOWN and name not in more:
            known = ", ".join(sorted(KNOWN | set(more)))
            raise FrameError(f"metric {foreign(name, 80)} was not asked for; known are {known}")
        if name == HOW:
            continue
        if isinstance(value, bool | str) or not math.isfinite(value):
            raise FrameError(f"metric {name} must be a finite number, got {foreign(repr(value), 80)}")
        if name in COUNTS and not 0 <= value <= MOST:
            raise FrameError(f"metric {name} is {value:g}; it must be in 0..{MOST:,}")
        metrics[name] = float(value)
    return metrics, foreign(str(meta.get(HOW, "not measured")), 60)
