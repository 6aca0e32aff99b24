"""Settings of FedAvg and one-shot; what they are for stands in method.py."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedtune.core.settings import Settings
from fedtune.methods.fedavg.server_optimizer import ServerOptimizer
from fedtune.methods.objective import Preferring
from fedtune.methods.settings import Training
from fedtune.methods.tuning import Tuning

Aggregation = Literal["mean", "stack", "freeze-a", "svd", "residual", "refine", "alternate", "sparsity"]
FACTORED = ("svd", "residual", "refine", "sparsity")  # whose server makes factors of all clients' factors
FROM_FACTORS = ("stack", *FACTORED)  # whose server needs each client's factors


class Prune(Settings):
    """Ranks that a client gives up for good once they bring less than before; see hetlora.py."""

    decay: float = Field(0.99, gt=0, lt=1)  # γ: the share of its ranks that it goes on with
    penalty: float = Field(5e-3, gt=0)  # λ of the norm of the others, beside its loss


class FineTune(Settings):
    """Local training after the last round, whose result each client keeps; see fine_tuning.py."""

    local_epochs: int | None = Field(None, ge=1)  # of a client's examples
    local_steps: int | None = Field(None, ge=1)  # in their place
    lr: float | None = Field(None, gt=0)  # None: as in the rounds

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.local_epochs is None) == (self.local_steps is None):
            both = "both are" if self.local_epochs is not None else "neither is"
            raise ValueError(f"fine_tune takes local_epochs or local_steps; {both} set")
        return self


Seconds = Annotated[float, Field(gt=0)]


class Buffer(Settings):
    """The server's steps come after so many updates, from clients of unlike speed; see fedbuff.py."""

    size: int = Field(3, ge=1)  # k, updates a step
    staleness: float = Field(0.5, ge=0)  # a: an update that is s steps old counts (1 + s)^-a
    seconds: list[Seconds] = Field([1.0], min_length=1)  # a client's training takes, virtual; in turn


class Regions(Settings):
    """Clients send to servers of regions, and these to the server; see hierarchical.py."""

    of: list[Annotated[int, Field(ge=0)]] = Field(min_length=2)  # the region of each client; in turn
    rounds: int = Field(1, ge=1)  # κ, of a region between two means of all

    @model_validator(mode="after")
    def _several(self) -> Self:
        if len(set(self.of)) == 1:
            raise ValueError("regions.of puts all clients into one region; name two or more, or leave it out")
        return self


class Config(Tuning, Preferring, Training):
    """Settings of `method.name: fedavg`."""

    name: Literal["fedavg"] = "fedavg"
    rounds: int = Field(3, ge=1)
    arrival: Literal["synchronous", "asynchronous"] = "synchronous"
    aggregation: Aggregation = "mean"
    ridge: float = Field(0.01, gt=0)  # aggregation: refine: λ of ‖ΔB‖²
    prune: Prune | None = None  # aggregation: sparsity: clients give up ranks (HetLoRA)
    buffer: Buffer | None = None  # the server steps after so many updates, not after a round (FedBuff)
    regions: Regions | None = None  # clients send to servers of regions (hierarchical FedAvg)
    server_optimizer: ServerOptimizer = ServerOptimizer()
    proximal: float = Field(0.0, ge=0)
    control_variates: bool = False
    keep_optimizer: bool = False  # a client's optimiser goes on where its last round ended (DiLoCo)
    own: list[str] = Field([])  # trained tensors that stay with each client, by parts of their names
    ditto: float | None = Field(None, ge=0)  # λ: how much a client's own model is tied to the global one
    fine_tune: FineTune | None = None  # local training after the last round, for a model of one's own

    @property
    def quantized_refusal(self) -> str:
        """Stacked products and residuals are added to the weights themselves."""
        if self.aggregation in ("stack", "residual"):
            return f"aggregation: {self.aggregation} adds to the model's own weights in each round; take mean"
        return super().quantized_refusal

    @property
    def adapter_refusal(self) -> str:
        """Clients that draw factors of their own do not have the adapter's."""
        if self.aggregation in ("stack", "freeze-a"):
            return f"with aggregation: {self.aggregation} clients draw factors anew; take mean"
        if self.own:
            return (
                f"method.own: {', '.join(self.own)} begins as clients draw it, and the adapter's is not sent"
            )
        return super().adapter_refusal

    @property
    def personal(self) -> Literal["", "beside", "instead"]:
        """Whether clients have models of their own: beside the global one, or in its place."""
        return "instead" if self.own else "beside" if self.ditto is not None or self.fine_tune else ""

    def _from_factors(self) -> None:
        """Raises ValueError for what does not go with a server that makes new factors of the clients'."""
        if self.arrival == "asynchronous" or self.control_variates or self.server_optimizer.name != "mean":
            raise ValueError(
                f"aggregation: {self.aggregation} makes factors of all clients' factors; it goes with "
                "arrival: synchronous, server_optimizer mean and no control_variates"
            )
        if self.server_optimizer.lr != 1.0:
            raise ValueError(f"aggregation: {self.aggregation} takes no server_optimizer.lr; leave it out")
        if self.lora and self.lora.use_dora:
            raise ValueError(
                f"aggregation: {self.aggregation} is of products, and a row's length is no part of the "
                "product; it does not go with lora.use_dora"
            )
        if self.aggregation == "residual" and self.lora and self.lora.init != "default":
            raise ValueError(
                f"aggregation: residual is saved as a whole model, of which lora.init: {self.lora.init} "
                "takes a part away; take svd, refine or mean"
            )
        if self.lora and self.lora.client_ranks and self.aggregation not in ("svd", "sparsity"):
            raise ValueError(
                f"aggregation: {self.aggregation} averages factors of one rank; with lora.client_ranks take "
                "svd, sparsity, stack or mean"
            )

    def _going_on(self) -> None:
        """Raises ValueError where an optimiser has nothing to go on with, or other weights."""
        if self.optimizer == "sgd" and not self.momentum:
            raise ValueError(
                "keep_optimizer: plain SGD keeps nothing; take adamw, set momentum, or leave it out"
            )
        if self.aggregation not in ("mean", "freeze-a"):
            raise ValueError(
                f"keep_optimizer is of weights that go on; with aggregation: {self.aggregation} a round "
                "begins with other factors. Take mean or freeze-a"
            )

    @model_validator(mode="after")
    def _buffered(self) -> Self:
        if self.buffer is None:
            return self
        if self.aggregation not in ("mean", "freeze-a"):
            raise ValueError(
                f"buffer adds updates of several versions of the model, and aggregation: {self.aggregation} "
                "is of one; take mean or freeze-a"
            )
        if self.arrival == "asynchronous" or self.control_variates or self.personal:
            other = (
                "arrival: asynchronous"
                if self.arrival == "asynchronous"
                else "control_variates"
                if self.control_variates
                else "own, ditto or fine_tune"
            )
            raise ValueError(f"buffer has no rounds that all clients take part in, which {other} counts on")
        return self

    @model_validator(mode="after")
    def _regional(self) -> Self:
        if self.regions is None:
            return self
        if self.aggregation not in ("mean", "freeze-a"):
            raise ValueError(
                f"regions send on means of updates, and aggregation: {self.aggregation} is none; take mean "
                "or freeze-a"
            )
        for other in ("buffer", "control_variates"):
            if getattr(self, other):
                raise ValueError(f"regions have rounds of their own, which {other} does not; leave one out")
        if self.arrival == "asynchronous":
            raise ValueError("regions wait for their clients; take arrival: synchronous")
        if self.rounds % self.regions.rounds:
            raise ValueError(
                f"regions.rounds is {self.regions.rounds} and rounds {self.rounds}: the last rounds of the "
                "regions would reach nobody; take a multiple"
            )
        return self

    @model_validator(mode="after")
    def _personal(self) -> Self:
        if self.ditto is not None and (self.own or self.fine_tune):
            other = "own" if self.own else "fine_tune"
            raise ValueError(
                f"ditto gives each client a whole model of its own already; leave {other} or ditto out"
            )
        if self.own and self.aggregation not in ("mean", "freeze-a"):
            raise ValueError(
                f"own: aggregation: {self.aggregation} is of whole products B A or trains A and B in turn; "
                "with parts that are not sent take mean or freeze-a"
            )
        if self.personal and self.aggregation in ("stack", "residual"):
            raise ValueError(
                f"aggregation: {self.aggregation} adds to the base weights, on which a client's own factors "
                "would not stand; take mean, freeze-a, svd, refine or alternate"
            )
        return self

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.aggregation != "mean" and self.trainable != "lora":
            raise ValueError(f"aggregation: {self.aggregation} is for trainable: lora, got {self.trainable}")
        if self.aggregation == "stack" and (
            self.arrival == "asynchronous" or self.control_variates or self.server_optimizer.name != "mean"
        ):
            raise ValueError(
                "aggregation: stack starts fresh factors every round; it goes with arrival: synchronous, "
                "server_optimizer mean and no control_variates"
            )
        if self.aggregation in FACTORED:
            self._from_factors()
        if self.prune and self.aggregation != "sparsity":
            raise ValueError(f"prune belongs to aggregation: sparsity, got {self.aggregation}")
        if self.prune and self.optimizer_in_backward:
            raise ValueError(
                "prune adds a penalty behind the loss, and optimizer_in_backward steps before; leave one out"
            )
        if self.aggregation != "refine" and "ridge" in self.model_fields_set and self.ridge != 0.01:
            raise ValueError(
                f"ridge has no effect with aggregation: {self.aggregation}; it belongs to refine"
            )
        if self.aggregation == "alternate" and (self.arrival == "asynchronous" or self.control_variates):
            raise ValueError(
                "aggregation: alternate trains B in odd rounds and A in even ones; it goes with arrival: "
                "synchronous and no control_variates"
            )
        if self.aggregation == "stack" and self.lora and (self.lora.use_dora or self.lora.init != "default"):
            one = "use_dora" if self.lora.use_dora else f"init: {self.lora.init}"
            why = "a row's length is no part of the product" if self.lora.use_dora else "which are drawn"
            raise ValueError(
                f"aggregation: stack adds products of fresh factors, {why}; it does not go with lora.{one}"
            )
        if self.arrival == "asynchronous" and (self.rounds != 1 or self.control_variates):
            raise ValueError(
                f"arrival: asynchronous is one-shot: set rounds: 1 (got {self.rounds}), more local_epochs, "
                "and no control_variates"
            )
        if self.arrival == "asynchronous" and self.server_optimizer.name != "mean":
            raise ValueError("arrival: asynchronous keeps a running mean; it goes with server_optimizer mean")
        if self.keep_optimizer:
            self._going_on()
        if self.control_variates and (self.optimizer != "sgd" or self.momentum):
            raise ValueError(
                "control_variates (SCAFFOLD) correct plain SGD steps; set optimizer: sgd, momentum: 0"
            )
        if self.control_variates and self.lora and self.lora.client_ranks:
            raise ValueError("control_variates need clients of one rank; leave lora.client_ranks out")
        return self
