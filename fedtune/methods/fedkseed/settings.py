"""Settings of FedKSeed, FedKSeed-Pro (method.py) and of their baselines (infinite_pool.py)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from fedtune.core.settings import Settings

MAX_SEEDS = 65_536  # of a pool (`fedtune.zeroth`, which settings are read without)


def _scale(value: object) -> object:
    """A number above 0, or auto."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if value != "auto" and not number:
        raise ValueError(f"must be a number above 0, or auto, got {value!r}")
    return value


Kind = Literal["hadamard4", "rademacher", "gaussian", "binomial32", "subzero", "lozo"]
SUBSPACES = ("subzero", "lozo")  # kinds of low rank, which move float32 weights where they lie
Epsilon = Annotated[float | Literal["auto"], BeforeValidator(_scale)]


class Config(Settings):
    """Settings of `method.name: fedkseed`."""

    float16: ClassVar[bool] = True

    name: Literal["fedkseed", "fedkseed-pro"] = "fedkseed"  # the method
    rounds: int = Field(40, ge=1)  # communication rounds
    seeds: int = Field(4096, ge=1, le=MAX_SEEDS)  # K, the shared seeds
    noise: Kind = "hadamard4"  # see noise.md
    epsilon: Epsilon = 5e-4  # scale of a perturbation; auto: measured on the model
    lr: float = Field(3e-7, gt=0)  # η, constant
    local_steps: int = Field(200, ge=1)  # τ, a client and round
    batch_size: int = Field(1, ge=1)  # examples a step; rows with data.batching: packed
    perturbations: int = Field(1, ge=1)  # seeds tried a step, on the same batch
    scalar_limit: float | None = Field(None, gt=0)  # a reply with a scalar of this size or more is refused
    clip: float | None = Field(None, gt=0)  # the server cuts scalars to ± this
    aggregation: Literal["mean", "trimmed-mean", "median-of-means"] = "mean"  # of a seed's scalars
    trim: float = Field(0.1, ge=0, lt=0.5)  # trimmed-mean: share of a seed's clients left out at each end
    groups: int = Field(5, ge=1)  # median-of-means: groups of clients
    graph: Literal["ring", "full", "random"] | None = None  # no server: whom each client passes its sums to
    degree: int = Field(2, ge=1)  # random: others that a client draws in a round

    @model_validator(mode="after")
    def _peers(self) -> Self:
        if self.graph != "random" and self.degree != Config.model_fields["degree"].default:
            raise ValueError(f"degree has no effect with graph: {self.graph}; it belongs to random")
        if self.graph is None:
            return self
        if self.name == "fedkseed-pro":
            raise ValueError(
                f"graph: {self.graph} has no server, and fedkseed-pro needs one that knows how often all "
                "drew a seed; take fedkseed"
            )
        for name in ("clip", "aggregation"):
            if getattr(self, name) != Config.model_fields[name].default:
                raise ValueError(
                    f"graph: {self.graph} has no server, and {name} is what one does with all clients' "
                    "scalars; leave one of them out"
                )
        return self

    @model_validator(mode="after")
    def _robust(self) -> Self:
        for name, belongs in (("trim", "trimmed-mean"), ("groups", "median-of-means")):
            if self.aggregation != belongs and getattr(self, name) != Config.model_fields[name].default:
                raise ValueError(
                    f"{name} has no effect with aggregation: {self.aggregation}; it belongs to {belongs}"
                )
        return self


class ProConfig(Config):
    """Settings of `method.name: fedkseed-pro`."""

    name: Literal["fedkseed", "fedkseed-pro"] = "fedkseed-pro"  # the method
    seeds: int = Field(1024, ge=1, le=MAX_SEEDS)  # K, the shared seeds


class InfinitePoolConfig(Settings):
    """Settings of `method.name: infinite-pool`."""

    name: Literal["infinite-pool"] = "infinite-pool"  # the method
    rounds: int = Field(40, ge=1)  # communication rounds
    download: Literal["steps", "model", "means"] = "steps"  # how a client gets to the newest model
    noise: Kind = "hadamard4"  # see noise.md
    epsilon: Epsilon = 5e-4  # scale of a perturbation; auto: measured on the model
    lr: float = Field(3e-7, gt=0)  # η, constant
    local_steps: int = Field(200, ge=1)  # τ, a client and round
    batch_size: int = Field(1, ge=1)  # examples a step; rows with data.batching: packed
    perturbations: int = Field(1, ge=1)  # seeds tried a step, on the same batch

    @model_validator(mode="after")
    def _pool(self) -> Self:
        count = self.local_steps * self.perturbations
        if self.download == "means" and count > MAX_SEEDS:
            raise ValueError(
                f"download: means has one pool a round of at most {MAX_SEEDS:,} directions, and local_steps "
                f"times perturbations is {count:,}; lower one of them"
            )
        return self


def paper_bytes(config: Config) -> int:
    """Bytes of a client and round in the paper's own encoding (its Table 3).

    Down 4 for the seed of seeds and 4 a seed for the accumulator, for Pro 4 more for the probability; up 4
    for the seed and 4 for the scalar of each draw.
    """
    down = 4 + 4 * config.seeds * (2 if config.name == "fedkseed-pro" else 1)
    return down + 8 * config.local_steps * config.perturbations
