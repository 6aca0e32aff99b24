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
    """Where a method's three classes stand, as "module:class", and one line for `fedtune ls methods`."""

    method: str
    config: str
    state: str
    summary: str


_ENTRIES: dict[str, Entry] = {}


def register(name: str, entry: Entry) -> None:
    """Adds a method. Raises ValueError if the name is taken."""
    if name in _ENTRIES:
        raise ValueError(f"a method named {name} is registered already: {_ENTRIES[name].method}")
    _ENTRIES[name] = entry


register(
    "fedavg",
    Entry(
        "fedtune.methods.fedavg.method:FedAvg",
        "fedtune.methods.fedavg.method:Config",
        "fedtune.methods.fedavg.method:State",
        "FedAvg with full weights, LoRA, adapters or prompts; one-shot with rounds: 1, also asynchronous",
    ),
)
register(
    "fedkseed",
    Entry(
        "fedtune.methods.fedkseed.method:FedKSeed",
        "fedtune.methods.fedkseed.settings:Config",
        "fedtune.methods.fedkseed.settings:State",
        "all weights tuned with two forward passes and K shared seeds; under 18 kB a round",
    ),
)
register(
    "fedkseed-pro",
    Entry(
        "fedtune.methods.fedkseed.method:FedKSeed",
        "fedtune.methods.fedkseed.settings:ProConfig",
        "fedtune.methods.fedkseed.settings:State",
        "FedKSeed with seeds drawn by their importance, so that fewer are enough",
    ),
)
register(
    "infinite-pool",
    Entry(
        "fedtune.methods.fedkseed.infinite_pool:InfinitePool",
        "fedtune.methods.fedkseed.infinite_pool:Config",
        "fedtune.methods.fedkseed.infinite_pool:State",
        "FedKSeed's baselines: fresh seeds for ever, all steps replayed or the model downloaded",
    ),
)
register(
    "fedbiot",
    Entry(
        "fedtune.methods.fedbiot.method:FedBiOT",
        "fedtune.methods.fedbiot.settings:Config",
        "fedtune.methods.fedbiot.settings:State",
        "clients tune an adapter on a compressed emulator that the server aligns; they never get the model",
    ),
)
register(
    "fedot",
    Entry(
        "fedtune.methods.fedbiot.method:FedBiOT",
        "fedtune.methods.fedbiot.settings:OffsiteConfig",
        "fedtune.methods.fedbiot.settings:State",
        "offsite-tuning by several clients: first and last blocks as adapter, the emulator fixed",
    ),
)
register(
    "offsite-tuning",
    Entry(
        "fedtune.methods.fedbiot.method:FedBiOT",
        "fedtune.methods.fedbiot.settings:OneClientConfig",
        "fedtune.methods.fedbiot.settings:State",
        "the adapter tuned on a fixed emulator by one client that holds all data",
    ),
)
register(
    "fedcybgd",
    Entry(
        "fedtune.methods.fedcybgd.method:FedCyBGD",
        "fedtune.methods.fedcybgd.settings:Config",
        "fedtune.methods.fedcybgd.settings:State",
        "all weights tuned, one block a client, one client after another; downloads can be compressed",
    ),
)
register(
    "fedbavg",
    Entry(
        "fedtune.methods.fedcybgd.method:FedCyBGD",
        "fedtune.methods.fedcybgd.settings:FedBAvgConfig",
        "fedtune.methods.fedcybgd.settings:State",
        "all clients train the same block and the server averages it; the next round takes the next block",
    ),
)
register(
    "badam",
    Entry(
        "fedtune.methods.fedcybgd.badam:BAdam",
        "fedtune.methods.fedcybgd.badam:Config",
        "fedtune.methods.fedcybgd.badam:State",
        "all data in one place, Adam on one block at a time",
    ),
)
register(
    "standalone",
    Entry(
        "fedtune.methods.references:Local",
        "fedtune.methods.references:StandaloneConfig",
        "fedtune.methods.references:State",
        "each client trains alone; mean over the clients' models",
    ),
)
register(
    "centralized",
    Entry(
        "fedtune.methods.references:Local",
        "fedtune.methods.references:CentralizedConfig",
        "fedtune.methods.references:State",
        "all data in one place: what federation gives up at most",
    ),
)
register(
    "zero-shot",
    Entry(
        "fedtune.methods.references:ZeroShot",
        "fedtune.methods.references:ZeroShotConfig",
        "fedtune.methods.references:Nothing",
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
    return _load(entry(name).config)


def state_class(name: str) -> type[Any]:
    """The class of a method's server state. Raises InputError for an unknown name."""
    return _load(entry(name).state)


def build(config: Settings, seed: int) -> Method[Any]:
    """The method that `config` (an object of its config class) describes."""
    name = config.name  # type: ignore[attr-defined]
    return _load(entry(name).method)(config, seed)


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
