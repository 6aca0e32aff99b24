"""How far a LoRA update has moved, as a d × d matrix, without ever forming one.

With A (r, in), B (out, r), their starts A0, B0 and Δ = · − ·0,

    B A − B0 A0 = ΔB A + B0 ΔA = U V,   U = [ΔB, B0] (out, 2r),   V = [A; ΔA] (2r, in)
    ‖U V‖² = tr(UᵀU · VVᵀ) = Σ (UᵀU) ∘ (VVᵀ)

so all it takes are two products of size 2r × 2r. Written with differences, nothing large cancels right after
the start; in float64, nothing that float32 could tell is lost where ΔB A and B0 ΔA go against each other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moved_squared(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, scaling: float) -> Tensor:
    """‖s (B A − B0 A0)‖², differentiable in `a` and `b`, computed and returned in float64.

    Args:
        a: (r, in).
        b: (out, r).
        a0: Where `a` started; a constant.
        b0: Where `b` started; a constant.
        scaling: s = alpha / rank.
    """
    a, b, a0, b0 = a.double(), b.double(), a0.double(), b0.double()
    u = torch.cat([b - b0, b0], dim=1)
    v = torch.cat([a, a - a0])
    return scaling**2 * ((u.T @ u) * (v @ v.T)).sum()
