"""What makes the mean that `federation.robust` asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedtune.core.gathered import Gathered, InMemory, OnDisk
from fedtune.core.robust import MeanMethod, RobustMean
from fedtune.protection.robust import Robust


def robust_mean(
    robust: Robust, method: MeanMethod, folder: Path | None, gather: Callable[[], Gathered] | None = None
) -> RobustMean:
    """What makes a robust mean of a round's replies.

    Args:
        robust: The settings.
        method: The method.
        folder: Where replies are gathered; None: in memory.
        gather: How, where it is another way than these.
    """
    return RobustMean(
        method.updates(),
        gather or (lambda: InMemory() if folder is None else OnDisk(folder)),
        robust.mean,
        trim=robust.trim,
        byzantine=robust.byzantine,
        keep=robust.keep,
        max_norm=robust.max_norm,
        norm_quantile=robust.norm_quantile,
    )
