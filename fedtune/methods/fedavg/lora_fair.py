"""LoRA-FAIR: factors averaged, and B moved towards the exact mean product (`aggregation: refine`).

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement" (2024),
equation 7, with clients that begin at the averaged factors:

    A = Σ p_i A_i,  B = Σ p_i B_i + ΔB
    ΔB = argmin ‖M − (Σ p_i B_i + ΔB) A‖² + λ ‖ΔB‖²,   M = Σ p_i B_i A_i
       = (M − Σ p_i B_i A) Aᵀ (A Aᵀ + λ I)⁻¹

Nothing more is sent than with plain averaging. M is never formed: M Aᵀ = Σ p_i B_i (A_i Aᵀ).

Deviation: the paper takes a cosine between the two products and some steps of SGD; the squared distance has
this one answer, in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune.methods.fedavg.lora_aggregation import A, B, Trained, mean, shares


def refined(replies: Sequence[Trained], scaling: Mapping[str, float], ridge: float) -> dict[str, Tensor]:
    """The next factors of each LoRA module.

    Args:
        replies: Each client's trained factors, whole and of one rank, and its number of examples.
        scaling: Names the modules.
        ridge: λ.
    """
    new = mean(replies)
    for module in scaling:
        a, b = new[module + A].to(torch.float64), new[module + B].to(torch.float64)
        gram = a @ a.T  # (rank, rank)
        exact = torch.zeros_like(b)
        for factors, share in shares(replies):
            one = factors[module + A].to(torch.float64) @ a.T
            exact += share * (factors[module + B].to(torch.float64) @ one)
        wanted, ridged = exact - b @ gram, gram + ridge * torch.eye(len(gram), dtype=torch.float64)
        new[module + B] = (b + torch.linalg.solve(ridged, wanted.T).T).to(torch.float32)
    return new
