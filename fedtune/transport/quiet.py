"""What keeps Flower and Ray from saying what is theirs alone, and from what nobody asked them to do."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("fedtune")
QUIET = {  # no telemetry, no look for newer versions, and no installing of packages while a run begins
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # s; its default of 1 s is waited for in every message
}


@contextmanager
def quiet_environment() -> Iterator[None]:
    """Inside, environment variables keep Flower and Ray to their work; those set already stay."""
    new = {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Inside, Flower's and Ray's logs are silent, and so is what Ray prints on stdout of its processes.

    Whatever its settings, it prints there that one of them has died; but stdout is the user's.
    """
    from ray._private import worker

    levels = {"flwr": logging.CRITICAL, "ray": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    prints = worker.print_to_stdstream
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    worker.print_to_stdstream = lambda data, **_: log.debug("Ray: %s", data)
    try:
        yield
    finally:
        worker.print_to_stdstream = prints
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
