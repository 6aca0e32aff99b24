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

from fedtune.api.commands import available, compare, evaluate, load, open, report_page, run, status
from fedtune.api.network import make_keys, serve, take_part
from fedtune.api.plans import data_report, diagnose, plan, rank
from fedtune.api.runs import Comparison, Run
from fedtune.api.sweeps import Sweep, sweep
from fedtune.errors import FederationError, FedtuneError, InputError
from fedtune.version import __version__

if TYPE_CHECKING:
    from fedtune.api.callbacks import Callback, ClientReport, RoundState
    from fedtune.api.parts import (
        load_plugin,
        register_method,
        register_metric,
        register_partitioner,
        register_task,
        register_template,
    )

_LATER = {  # names whose modules import PyTorch
    "fedtune.api.callbacks": ("Callback", "ClientReport", "RoundState"),
    "fedtune.api.parts": (
        "load_plugin",
        "register_method",
        "register_metric",
        "register_partitioner",
        "register_task",
        "register_template",
    ),
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
    "Sweep",
    "__version__",
    "available",
    "compare",
    "data_report",
    "diagnose",
    "evaluate",
    "load",
    "load_plugin",
    "make_keys",
    "open",
    "plan",
    "rank",
    "register_method",
    "register_metric",
    "register_partitioner",
    "register_task",
    "register_template",
    "report_page",
    "run",
    "serve",
    "status",
    "sweep",
    "take_part",
]


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'fedtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
