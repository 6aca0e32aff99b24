"""Fine-tune one foundation model on data that stays with many owners.

    import fedtune

    run = fedtune.run("mine.yaml", "method.lr=1e-4", out="runs/mine")
    run.scores, run.generate(["Add 2 and 3."])
    fedtune.compare(["one.yaml", "other.yaml"], seeds=[0, 1, 2])

Importing it is quick: what needs PyTorch is imported by the function that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedtune.api.commands import compare, diagnose, evaluate, load, open, plan, report_page, run
from fedtune.api.runs import Comparison, Run
from fedtune.errors import FederationError, FedtuneError, InputError
from fedtune.version import __version__

if TYPE_CHECKING:
    from fedtune.api.callbacks import Callback, ClientReport, RoundState

_LATER = {  # names whose modules import PyTorch
    "Callback": "fedtune.api.callbacks",
    "ClientReport": "fedtune.api.callbacks",
    "RoundState": "fedtune.api.callbacks",
}

__all__ = [
    "Callback",
    "ClientReport",
    "Comparison",
    "FederationError",
    "FedtuneError",
    "InputError",
    "RoundState",
    "Run",
    "__version__",
    "compare",
    "diagnose",
    "evaluate",
    "load",
    "open",
    "plan",
    "report_page",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
