"""What a run changes in its process, for as long as it lasts."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def settings_kept() -> Iterator[None]:
    """What libraries change when they are imported or started is as before at the end.

    That is: environment variables, filters of warnings, the hook for uncaught exceptions, and the state of
    Python's own random numbers (a library that the display needs draws one as it is imported).
    """
    environment, hook, numbers = dict(os.environ), sys.excepthook, random.getstate()
    with warnings.catch_warnings():
        try:
            yield
        finally:
            random.setstate(numbers)
            sys.excepthook = hook
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update({n: v for n, v in environment.items() if os.environ.get(n) != v})


@contextmanager
def torch_settings() -> Iterator[None]:
    """Deterministic algorithms while a run lasts; the process's own setting comes back after it."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
