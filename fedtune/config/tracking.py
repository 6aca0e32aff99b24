"""Which trackers there are, and whether they are installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from fedtune.errors import InputError

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


def require_trackers(names: Sequence[Tracker]) -> None:
    """Raises InputError if the package of one of them is not installed; says what to install."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(
            f"tracking: {', '.join(missing)} is not installed here; pip install {' '.join(missing)}, or "
            f"pip install 'fedtune[{missing[0]}]' for a version that was tried"
        )
