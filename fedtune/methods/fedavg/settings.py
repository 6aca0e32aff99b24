"""Settings of FedAvg and one-shot; what they are for stands in method.py."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fedtune.methods.fedavg.server_optimizer import ServerOptimizer
from fedtune.methods.settings import Training
from fedtune.methods.tuning import Tuning


class Config(Tuning, Training):
    """Settings of `method.name: fedavg`."""

    name: Literal["fedavg"] = "fedavg"
    rounds: int = Field(3, ge=1)
    arrival: Literal["synchronous", "asynchronous"] = "synchronous"
    aggregation: Literal["mean", "stack", "freeze-a"] = "mean"
    server_optimizer: ServerOptimizer = ServerOptimizer()
    proximal: float = Field(0.0, ge=0)
    control_variates: bool = False

    @property
    def quantized_refusal(self) -> str:
        """Stacked products are added to the weights themselves."""
        if self.aggregation == "stack":
            return "aggregation: stack adds each round's product to the model's own weights; take mean"
        return super().quantized_refusal

    @property
    def adapter_refusal(self) -> str:
        """Clients that draw factors of their own do not have the adapter's."""
        if self.aggregation != "mean":
            return f"with aggregation: {self.aggregation} clients draw factors anew; take mean"
        return super().adapter_refusal

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
        if self.control_variates and (self.optimizer != "sgd" or self.momentum):
            raise ValueError(
                "control_variates (SCAFFOLD) correct plain SGD steps; set optimizer: sgd, momentum: 0"
            )
        if self.control_variates and self.lora and self.lora.client_ranks:
            raise ValueError("control_variates need clients of one rank; leave lora.client_ranks out")
        return self
