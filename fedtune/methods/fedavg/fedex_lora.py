"""FedEx-LoRA: factors averaged, and what that gets wrong added to the base weights (`aggregation: residual`).

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models"
(2024), equations 9 to 12:

    A = Σ p_i A_i,  B = Σ p_i B_i                      the next factors
    W ← W + s (Σ p_i B_i A_i − B A)                    the residual, which clients add to their base weights

So every client begins the next round at the exact mean of the clients' models, W + s Σ p_i B_i A_i.

Deviation: a client keeps nothing between rounds, so that the residuals of all rounds so far come with each
order, stacked, or dense once that is smaller, as FLoRA's product does (`lora_aggregation.stack`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedtune.methods.fedavg.lora_aggregation import B, Trained, mean, stack


def averaged(
    replies: Sequence[Trained], product: Mapping[str, Tensor], scaling: Mapping[str, float]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The next factors, and the sum of all residuals.

    Args:
        replies: Each client's trained factors, whole and of one rank, and its number of examples.
        product: The residuals so far.
        scaling: alpha / rank of each module.
    """
    factors, total = mean(replies), sum(examples for _, examples in replies)
    less = {name: -t if name.endswith(B) else t for name, t in factors.items()}
    return factors, stack(product, [*replies, (less, total)], scaling, total=total)
