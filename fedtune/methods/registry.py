"""The methods by name. A method's module is imported only when it is asked for."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fedtune.core.settings import Settings
from fedtune.core.types import ArrivalOrder, Method
from fedtune.errors import InputError
from fedtune.registry import Registry

M = TypeVar("M", bound=type)


class Classes(Protocol):
    """A method's class, that of its settings, and that of its server's state."""

    @property
    def method(self) -> type[Any]:
        """`core.types.Method`."""

    @property
    def config(self) -> type[Settings]:
        """Its settings."""

    @property
    def state(self) -> type[Any]:
        """What its server keeps between rounds."""


@dataclass(frozen=True)
class Given:
    """The classes of a method that somebody registered."""

    method: type[Any]
    config: type[Settings]
    state: type[Any]


@dataclass(frozen=True)
class Entry:
    """Where the three classes of one of fedtune's methods stand, as "module:class", and its summary.

    Each is imported when it is asked for: settings are read without torch.
    """

    method_place: str
    config_place: str
    state_place: str
    summary: str

    @property
    def method(self) -> type[Any]:
        """As `Classes`."""
        return _load(self.method_place)

    @property
    def config(self) -> type[Settings]:
        """As `Classes`."""
        return _load(self.config_place)

    @property
    def state(self) -> type[Any]:
        """As `Classes`."""
        return _load(self.state_place)


METHODS: Registry[Classes] = Registry("method", "method.name", "fedtune.methods")


def register(name: str, entry: Entry) -> None:
    """Adds one of fedtune's own methods. Raises InputError if the name is taken."""
    METHODS.built_in(name, entry.summary, lambda: entry)


def _load(place: str) -> type[Any]:
    module, _, name = place.partition(":")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


register(
    "fedavg",
    Entry(
        "fedtune.methods.fedavg.method:FedAvg",
        "fedtune.methods.fedavg.settings:Config",
        "fedtune.methods.fedavg.state:State",
        "FedAvg with full weights, LoRA, adapters or prompts; one-shot with rounds: 1, also asynchronous",
    ),
)
register(
    "fedkseed",
    Entry(
        "fedtune.methods.fedkseed.method:FedKSeed",
        "fedtune.methods.fedkseed.settings:Config",
        "fedtune.methods.fedkseed.state:State",
        "all weights tuned with two forward passes and K shared seeds; under 18 kB a round",
    ),
)
register(
    "fedkseed-pro",
    Entry(
        "fedtune.methods.fedkseed.method:FedKSeed",
        "fedtune.methods.fedkseed.settings:ProConfig",
        "fedtune.methods.fedkseed.state:State",
        "FedKSeed with seeds drawn by their importance, so that fewer are enough",
    ),
)
register(
    "infinite-pool",
    Entry(
        "fedtune.methods.fedkseed.infinite_pool:InfinitePool",
        "fedtune.methods.fedkseed.settings:InfinitePoolConfig",
        "fedtune.methods.fedkseed.infinite_pool:State",
        "FedKSeed's baselines: fresh seeds for ever, all steps replayed or the model downloaded",
    ),
)
register(
    "fedbiot",
    Entry(
        "fedtune.methods.fedbiot.method:FedBiOT",
        "fedtune.methods.fedbiot.settings:Config",
        "fedtune.methods.fedbiot.state:State",
        "clients tune an adapter on a compressed emulator that the server aligns; they never get the model",
    ),
)
register(
    "fedot",
    Entry(
        "fedtune.methods.fedbiot.method:FedBiOT",
        "fedtune.methods.fedbiot.settings:OffsiteConfig",
        "fedtune.methods.fedbiot.state:State",
        "offsite-tuning by several clients: first and last blocks as adapter, the emulator fixed",
    ),
)
register(
    "offsite-tuning",
    Entry(
        "fedtune.methods.fedbiot.method:FedBiOT",
        "fedtune.methods.fedbiot.settings:OneClientConfig",
        "fedtune.methods.fedbiot.state:State",
        "the adapter tuned on a fixed emulator by one client that holds all data",
    ),
)
register(
    "fedcybgd",
    Entry(
        "fedtune.methods.fedcybgd.method:FedCyBGD",
        "fedtune.methods.fedcybgd.settings:Config",
        "fedtune.methods.fedcybgd.state:State",
        "all weights tuned, one block a client, one client after another; downloads can be compressed",
    ),
)
register(
    "fedbavg",
    Entry(
        "fedtune.methods.fedcybgd.method:FedCyBGD",
        "fedtune.methods.fedcybgd.settings:FedBAvgConfig",
        "fedtune.methods.fedcybgd.state:State",
        "all clients train the same block and the server averages it; the next round takes the next block",
    ),
)
register(
    "badam",
    Entry(
        "fedtune.methods.fedcybgd.badam:BAdam",
        "fedtune.methods.fedcybgd.settings:BAdamConfig",
        "fedtune.methods.references:State",
        "all data in one place, Adam on one block at a time",
    ),
)
register(
    "standalone",
    Entry(
        "fedtune.methods.references:Local",
        "fedtune.methods.reference_settings:StandaloneConfig",
        "fedtune.methods.references:State",
        "each client trains alone; mean over the clients' models",
    ),
)
register(
    "centralized",
    Entry(
        "fedtune.methods.references:Local",
        "fedtune.methods.reference_settings:CentralizedConfig",
        "fedtune.methods.references:State",
        "all data in one place: what federation gives up at most",
    ),
)
register(
    "zero-shot",
    Entry(
        "fedtune.methods.references:ZeroShot",
        "fedtune.methods.reference_settings:ZeroShotConfig",
        "fedtune.methods.references:Nothing",
        "the pre-trained model as it is",
    ),
)

_CALLED = ("prepare", "client_model", "init", "plan", "client_step", "server_step", "export")
_SAID = ("config", "rounds", "arrival", "pools_data", "uses_wire", "saves_merged", "sends_model")


def register_method(
    name: str,
    *,
    config: type[Settings] | None = None,
    state: type[Any] | None = None,
    summary: str | None = None,
) -> Callable[[M], M]:
    """Makes `method: {name: NAME}` stand for a class (see `core.types.Method` for what it needs).

    Args:
        name: What a configuration calls it.
        config: Its settings: derived from `core.settings.Settings`, or `methods.settings.Training` for
            one that trains locally, with the field `name: Literal["NAME"] = "NAME"`. None: as the class
            annotates `config` of its `__init__`.
        state: What its server keeps between rounds: a frozen dataclass of scalars, tensors and mappings.
            None: as the class annotates what its `init` returns.
        summary: One line for `fedtune ls methods`; None: the docstring's first.

    Raises:
        InputError: The name is taken, or a class is not as it must be; says what is missing.
    """

    def decorate(method: M) -> M:
        missing = [called for called in _CALLED if not callable(getattr(method, called, None))]
        if missing:
            raise InputError(
                f"method {name}: {method.__name__} lacks {', '.join(missing)} "
                "(fedtune.core.types.Method says what each of them does)"
            )
        settings = _annotated(method, "__init__", "config") if config is None else config
        if not (isinstance(settings, type) and issubclass(settings, Settings)):
            raise InputError(
                f"method {name}: config must be a class derived from fedtune.core.settings.Settings, got "
                f"{settings!r}; give config=..., or annotate config in __init__ of {method.__name__}"
            )
        field = settings.model_fields.get("name")
        if field is None or typing.get_args(field.annotation) != (name,) or field.default != name:
            raise InputError(
                f"method {name}: its settings {settings.__name__} need the field "
                f'name: Literal["{name}"] = "{name}"'
            )
        kept = _annotated(method, "init", "return") if state is None else state
        if not (dataclasses.is_dataclass(kept) and kept.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise InputError(
                f"method {name}: state must be a frozen dataclass, got {kept!r}; give state=..., or annotate "
                f"what init of {method.__name__} returns"
            )
        METHODS.register(name, method, Given(method, settings, typing.cast(type[Any], kept)), summary)
        return method

    return decorate


def _annotated(method: type[Any], function: str, parameter: str) -> Any:
    """What a function of a class says that a parameter, or its result, is; None where that says nothing."""
    try:
        return typing.get_type_hints(getattr(method, function)).get(parameter)
    except NameError:  # a name of the function that the class is written in
        return None


def config_class(name: str) -> type[Settings]:
    """The class of a method's settings. Raises InputError for an unknown name."""
    return METHODS[name].config


def state_class(name: str) -> type[Any]:
    """The class of a method's server state. Raises InputError for an unknown name."""
    return METHODS[name].state


def check(config: Settings, seed: int) -> None:
    """Raises InputError if a method that somebody brings refuses its settings or is not whole.

    fedtune's own have said all that their settings can be refused for when these were read.
    """
    if not isinstance(METHODS[config.name], Entry):  # type: ignore[attr-defined]
        build(config, seed)


def build(config: Settings, seed: int) -> Method[Any]:
    """The method that `config` (an object of its config class) describes.

    Raises:
        InputError: The built method lacks something that every method says of itself.
    """
    name = config.name  # type: ignore[attr-defined]
    method: Method[Any] = METHODS[name].method(config, seed)
    missing = [said for said in _SAID if not hasattr(method, said)]
    if missing:
        raise InputError(
            f"method {name}: {type(method).__name__} lacks {', '.join(missing)} "
            "(fedtune.core.types.Method says what each of them stands for)"
        )
    orders = typing.get_args(ArrivalOrder)
    if method.arrival not in orders:
        raise InputError(f"method {name}: arrival must be one of {', '.join(orders)}, got {method.arrival!r}")
    return method
