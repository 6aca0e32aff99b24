"""Scores that were asked for after a run, kept in its folder: a line an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.data.objects import ObjectData
from fedtune.errors import FederationError
from fedtune.federation.folder import EVALUATIONS, RunFolder
from fedtune.federation.results import evaluate_target
from fedtune.version import __version__

log = logging.getLogger("fedtune")
KEPT = ("examples", "template", "tasks", "scores")  # not what was said, which may be long


def evaluate_and_keep(
    target: str, tasks: Sequence[str], overrides: Sequence[str], objects: ObjectData | None = None
) -> dict[str, Any]:
    """As `evaluate_target`; scores of a run are added to evaluations.jsonl in its folder.

    Where that cannot be written, a warning says so and the scores are given all the same.

    Raises:
        InputError: As `evaluate_target`; nothing is kept then.
    """
    found = evaluate_target(target, tasks, overrides, objects)
    if (Path(target) / "config.yaml").is_file():
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "settings": list(overrides),
            **{key: found[key] for key in KEPT if key in found},
        }
        try:
            RunFolder(Path(target)).append(EVALUATIONS, entry)
        except FederationError as error:
            log.warning("the scores are not kept: %s", error)
    return found
