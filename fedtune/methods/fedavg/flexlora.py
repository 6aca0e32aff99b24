"""FlexLoRA: the exact mean product, factored anew for each client's rank (`aggregation: svd`).

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources"
(2024), section 3:

    M = Σ p_i B_i A_i = U S Vᵀ                 the mean product, in full
    B = U S,  A = Vᵀ, cut to rank r            the next round's factors, the best of that rank

The rows of A come in the order of their singular values, so that cutting the global factors to a client's
rank (`lora_aggregation.cut`) is cutting the decomposition itself. M is never formed: with the clients'
factors beside and below each other, [p_1 B_1 | …] = Q_b R_b and [A_1; …]ᵀ = Q_a R_a, and R_b R_aᵀ is
decomposed, which is as large as the sum of ranks.

Deviation: where M has a lower rank than the adapter, a row of A stays as it was and its column of B is 0:
with both 0 neither would ever train again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedtune.methods.fedavg.lora_aggregation import A, B, Trained, shares

SMALLEST = 1e-7  # of a singular value, as a share of the largest: below it there is float32's own rounding


def factored(
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
        a = torch.cat([t[module + A].to(torch.float64) for t, _ in replies])  # (Σ ranks, in)
        b = torch.cat([t[module + B].to(torch.float64) * p for t, p in shares(replies)], dim=1)
        before = weights[module + A]
        left, values, right = _decomposed(b, a, len(before))
        there = values > SMALLEST * values[0]
        new[module + A] = torch.where(there[:, None], right, before.to(torch.float64)).to(torch.float32)
        new[module + B] = (left * torch.where(there, values, 0.0)).to(torch.float32)
    return new


def _decomposed(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest parts of B A: U (out, rank), S (rank), Vᵀ (rank, in); 0 where it has fewer."""
    q_left, r_left = torch.linalg.qr(b)
    q_right, r_right = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    lacking = max(0, rank - len(s))
    left = nn.functional.pad((q_left @ u)[:, :rank], (0, lacking))
    right = nn.functional.pad((vh @ q_right.T)[:rank], (0, 0, 0, lacking))
    return left, nn.functional.pad(s[:rank], (0, lacking)), right
