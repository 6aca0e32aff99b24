"""What the server does with the mean update: add it, add momentum, look ahead with it, or adapt.

FedAvg adds it; Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution" (2019), for
FedAvgM; Douillard et al., "DiLoCo" (2023), Algorithm 1, for Nesterov's momentum as PyTorch's SGD has it;
Reddi et al., "Adaptive Federated Optimization" (2021), Algorithm 2, for FedAdam: no bias correction,
and τ outside the root.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from fedtune.core.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor


class ServerOptimizer(Settings):
    """The server's optimiser. `mean` with lr 1 is FedAvg itself."""

    name: Literal["mean", "momentum", "nesterov", "adam"] = "mean"
    lr: float = Field(1.0, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)  # momentum, nesterov: β; adam: β1
    beta2: float = Field(0.99, ge=0, lt=1)  # adam
    tau: float = Field(1e-3, gt=0)  # adam: added to the root of the second moment

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        belongs = {"momentum": ("momentum", "nesterov", "adam"), "beta2": ("adam",), "tau": ("adam",)}
        for field, names in belongs.items():
            if self.name not in names and getattr(self, field) != type(self).model_fields[field].default:
                *first, last = names
                owners = f"{', '.join(first)} and {last}" if first else last
                raise ValueError(f"{field} has no effect with name: {self.name}; it belongs to {owners}")
        return self

    def step(
        self, weight: Tensor, update: Tensor, moments: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of one tensor.

        Args:
            weight: The global weights, float32.
            update: The clients' mean update Δ, float32, same shape.
            moments: What the last step returned, empty at first.

        Returns:
            The new weights and moments:
            mean      w + lr·Δ
            momentum  m ← β·m + Δ;                                   w + lr·m
            nesterov  m ← β·m + Δ;                                   w + lr·(β·m + Δ)
            adam      m ← β1·m + (1−β1)·Δ, v ← β2·v + (1−β2)·Δ²;     w + lr·m / (√v + τ)
        """
        if self.name == "mean":
            return weight + self.lr * update, {}
        if self.name in ("momentum", "nesterov"):
            m = self.momentum * moments["m"] + update if moments else update.clone()
            move = m if self.name == "momentum" else self.momentum * m + update
            return weight + self.lr * move, {"m": m}
        m = (1 - self.momentum) * update
        v = (1 - self.beta2) * update.square()
        if moments:
            m, v = m + self.momentum * moments["m"], v + self.beta2 * moments["v"]
        return weight + self.lr * m / (v.sqrt() + self.tau), {"m": m, "v": v}
