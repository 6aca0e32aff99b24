"""HetLoRA: clients of unlike rank, weighed by what they have learned, which prune ranks that bring little.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (2024), section 3
(`aggregation: sparsity`, `lora.client_ranks`, `prune`):

    client k      trains the first r_k rows of A and columns of B, with the penalty            self-pruning
                      λ ‖B[:, γ r_k:]‖ ‖A[γ r_k:, :]‖ of each module beside its loss;
                  goes on with rank γ r_k once that is smaller after training than it was before
    server        A = Σ p_k A_k,  B = Σ p_k B_k,  each filled up with zeros                     aggregation
                      with p_k = ‖B_k A_k‖ / Σ_j ‖B_j A_j‖ for each module

All norms are Frobenius's; γ r_k is rounded down, to 1 at least. ‖B A‖² = Σ (Bᵀ B) ∘ (A Aᵀ), so that no
product is formed. A client that pruned sends what it trained with zeros in the ranks that it left, which
tells the server so; from the next round on it is sent fewer.

What has no factors (a head) is averaged by examples, as elsewhere. The defaults of γ and λ (0.99 and 5e-3)
were not checked: of the paper's text no part that names its values could be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedtune.methods.fedavg.lora_aggregation import A, B, Trained, pad
from fedtune.methods.fedavg.settings import Prune


def averaged(
    replies: Sequence[Trained], weights: Mapping[str, Tensor], scaling: Mapping[str, float]
) -> dict[str, Tensor]:
    """The next factors of each LoRA module.

    Args:
        replies: Each client's trained factors, whole, and its number of examples; ranks may differ.
        weights: The factors before the round, at the adapter's own rank.
        scaling: Names the modules.
    """
    new: dict[str, Tensor] = {}
    for module in scaling:
        a, b = module + A, module + B
        norms = [_norm(factors[a], factors[b]) for factors, _ in replies]
        total = sum(norms)
        # nobody has learned anything of this module: all alike
        shares = [n / total if total else 1 / len(norms) for n in norms]
        for name in (a, b):
            full = [pad({name: factors[name]}, weights)[name] for factors, _ in replies]
            mean = sum(
                (share * t.to(torch.float64) for share, t in zip(shares, full, strict=True)),
                torch.zeros(weights[name].shape, dtype=torch.float64),
            )
            new[name] = mean.to(torch.float32)
    return new


def rank_of(factors: Mapping[str, Tensor]) -> int:
    """The rank that a client's factors need: what lies behind is 0 in all of them."""
    most = max(t.shape[0] for name, t in factors.items() if name.endswith(A))
    for rank in range(most, 1, -1):
        last = [t[rank - 1] if name.endswith(A) else t[:, rank - 1] for name, t in factors.items()]
        if any(bool(t.any()) for t in last):
            return rank
    return 1


class SelfPruning:
    """A client's pruning in one round.

    Args:
        settings: γ and λ.
        start: The factors that it begins with, cut to its rank.
        parameters: The model's, at the adapter's own rank, filled up with zeros; hold the start.
    """

    def __init__(
        self, settings: Prune, start: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        rank = max(t.shape[0] for name, t in start.items() if name.endswith(A))
        self.kept = max(1, int(settings.decay * rank))
        self._weight, self._parameters = settings.penalty, parameters
        self._modules = [name.removesuffix(A) for name in start if name.endswith(A)]
        with torch.no_grad():
            self._before = float(self._size(parameters))

    def penalty(self) -> Tensor:
        """What is added to a step's loss."""
        return self._weight * self._size(self._parameters)

    def settled(self, trained: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The trained weights, by name; pruned, if the ranks that may go have become smaller."""
        if float(self._size(trained)) >= self._before:
            return trained
        whole = dict(trained)
        for module in self._modules:
            a, b = trained[module + A].clone(), trained[module + B].clone()
            a[self.kept :], b[:, self.kept :] = 0, 0
            whole |= {module + A: a, module + B: b}
        return whole

    def _size(self, values: Mapping[str, Tensor]) -> Tensor:
        """Σ over modules of ‖B[:, γ r:]‖ ‖A[γ r:, :]‖."""
        parts = [
            torch.linalg.vector_norm(values[module + B][:, self.kept :])
            * torch.linalg.vector_norm(values[module + A][self.kept :])
            for module in self._modules
        ]
        return torch.stack(parts).sum()


def _norm(a: Tensor, b: Tensor) -> float:
    a, b = a.to(torch.float64), b.to(torch.float64)
    return float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt())
