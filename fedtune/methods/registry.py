"""The methods by name. A method's module is imported only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fedtune.core.settings import Settings
from fedtune.core.types import Method
from fedtune.errors import InputError, nearest


@dataclass(frozen=True)
class Entry:
    """Where a method stands: its module, its two classes, and one line for `fedtune ls methods`."""

    module: str
    method: str
    config: str
    state: str
    summary: str


_ENTRIES: dict[str, Entry] = {}


def register(name: str, entry: Entry) -> None:
    """Adds a method. Raises ValueError if the name is taken."""
    if name in _ENTRIES:
        raise ValueError(f"a method named {name} is registered already: {_ENTRIES[name].module}")
    _ENTRIES[name] = entry


register(
    "fedavg",
    Entry(
        "fedtune.methods.fedavg",
        "FedAvg",
        "Config",
        "State",
        "FedAvg with full weights, LoRA, adapters or prompts; one-shot with rounds: 1, also asynchronous",
    ),
)
register(
    "fedkseed",
    Entry(
        "fedtune.methods.fedkseed",
        "FedKSeed",
        "Config",
        "State",
        "all weights tuned with two forward passes and K shared seeds; under 18 kB a round",
    ),
)
register(
    "fedkseed-pro",
    Entry(
        "fedtune.methods.fedkseed",
        "FedKSeed",
        "ProConfig",
        "State",
        "FedKSeed with seeds drawn by their importance, so that fewer are enough",
    ),
)
register(
    "infinite-pool",
    Entry(
        "fedtune.methods.infinite_pool",
        "InfinitePool",
        "Config",
        "State",
        "FedKSeed's baselines: fresh seeds for ever, all steps replayed or the model downloaded",
    ),
)
register(
    "fedbiot",
    Entry(
        "fedtune.methods.fedbiot",
        "FedBiOT",
        "Config",
        "State",
        "clients tune an adapter on a compressed emulator that the server aligns; they never get the model",
    ),
)
register(
    "fedot",
    Entry(
        "fedtune.methods.fedbiot",
        "FedBiOT",
        "OffsiteConfig",
        "State",
        "offsite-tuning by several clients: first and last blocks as adapter, the emulator fixed",
    ),
)
register(
    "offsite-tuning",
    Entry(
        "fedtune.methods.fedbiot",
        "FedBiOT",
        "OneClientConfig",
        "State",
        "the adapter tuned on a fixed emulator by one client that holds all data",
    ),
)
register(
    "fedcybgd",
    Entry(
        "fedtune.methods.fedcybgd",
        "FedCyBGD",
        "Config",
        "State",
        "all weights tuned, one block a client, one client after another; downloads can be compressed",
    ),
)
register(
    "fedbavg",
    Entry(
        "fedtune.methods.fedcybgd",
        "FedCyBGD",
        "FedBAvgConfig",
        "State",
        "all clients train the same block and the server averages it; the next round takes the next block",
    ),
)
register(
    "badam",
    Entry(
        "fedtune.methods.badam",
        "BAdam",
        "Config",
        "State",
        "all data in one place, Adam on one block at a time",
    ),
)
register(
    "standalone",
    Entry(
        "fedtune.methods.references",
        "Local",
        "StandaloneConfig",
        "State",
        "each client trains alone; mean over the clients' models",
    ),
)
register(
    "centralized",
    Entry(
        "fedtune.methods.references",
        "Local",
        "CentralizedConfig",
        "State",
        "all data in one place: what federation gives up at most",
    ),
)
register(
    "zero-shot",
    Entry(
        "fedtune.methods.references",
        "ZeroShot",
        "ZeroShotConfig",
        "Nothing",
        "the pre-trained model as it is",
    ),
)

METHODS: Mapping[str, Entry] = MappingProxyType(_ENTRIES)


def entry(name: str) -> Entry:
    """The entry of a method.

    Raises:
        InputError: No method has that name; suggests the nearest.
    """
    if name not in METHODS:
        raise InputError(
            f"method.name {name!r} is not known; known are {', '.join(METHODS)}.{nearest(name, METHODS)}"
        )
    return METHODS[name]


def config_class(name: str) -> type[Settings]:
    """The class of a method's settings. Raises InputError for an unknown name."""
    return _load(name, entry(name).config)


def state_class(name: str) -> type[Any]:
    """The class of a method's server state. Raises InputError for an unknown name."""
    return _load(name, entry(name).state)


def build(config: Settings, seed: int) -> Method[Any]:
    """The method that `config` (an object of its config class) describes."""
    name = config.name  # type: ignore[attr-defined]
    return _load(name, entry(name).method)(config, seed)


def _load(name: str, attribute: str) -> Any:
    return getattr(importlib.import_module(entry(name).module), attribute)
