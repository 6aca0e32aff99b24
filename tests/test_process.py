"""A run leaves the settings of its process as they were, also those that libraries change."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_api import CONFIG, ROWS

import fedtune


def settings_of_the_process() -> dict[str, Any]:
    loggers = [logging.getLogger(), *map(logging.getLogger, sorted(logging.root.manager.loggerDict))]
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "random": torch.random.get_rng_state().tolist(),
        "verbosity": transformers.logging.get_verbosity(),
        "bars": transformers.logging.is_progress_bar_enabled(),
        "levels": {
            logger.name: logger.level for logger in loggers if not logger.name.startswith("matplotlib")
        },
        "handlers": {logger.name: list(logger.handlers) for logger in loggers},
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "hook": sys.excepthook,
        "numbers": random.getstate(),
        "folder": os.getcwd(),
    }


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_a_run_restores_every_setting_of_the_process(tmp_path: Path, before: tuple[bool, bool]) -> None:
    run = lambda out: fedtune.run(CONFIG, out=tmp_path / out, data=ROWS, progress=False)  # noqa: E731
    run("first")  # imports what it needs, which registers loggers
    enabled, warn_only = before
    try:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        then = settings_of_the_process()
        made = run("second")
        made.generate(["Add 1 and 2."])
        fedtune.evaluate(made, ["loss"])
        now = settings_of_the_process()
    finally:
        torch.use_deterministic_algorithms(False)
    assert {key for key in then if then[key] != now[key]} == set()


FIRST_RUN = """
import logging, os, random, sys, warnings
import torch, transformers, peft, datasets
import fedtune
from test_api import CONFIG, ROWS

def settings():
    return [dict(os.environ), sys.excepthook, random.getstate(), list(warnings.filters), os.getcwd(),
            logging.getLogger().level, list(logging.getLogger().handlers), torch.get_num_threads(),
            torch.random.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled()]

before = settings()
run = fedtune.run(CONFIG, "transport." + sys.argv[1], out=sys.argv[2], data=ROWS)
after = settings()
print([place for place, (was, now) in enumerate(zip(before, after)) if was != now], run.status)
"""


@pytest.mark.parametrize("transport", ["name=in-process", "name=flower-simulation", "workers=2"])
def test_what_libraries_change_when_they_are_first_imported_is_put_back(
    tmp_path: Path, transport: str
) -> None:
    command_line = [sys.executable, "-c", FIRST_RUN, transport, str(tmp_path / "run")]
    done = subprocess.run(command_line, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.strip().endswith("[] done"), done.stdout + done.stderr[-2000:]
