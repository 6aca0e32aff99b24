"""RoLoRA: A and B are trained in turn, a round each (`aggregation: alternate`).

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA" (2024), Algorithm 1:

    odd rounds    B_i trained from B with A fixed;   B ← Σ p_i B_i,   so Σ p_i B_i A = B A
    even rounds   A_i trained from A with B fixed;   A ← Σ p_i A_i,   so Σ p_i B A_i = B A

What is fixed is the same for all clients, so that the mean of the factors is that of their products.
A client sends what it trained, half as much. What is not LoRA (a head, biases) trains in every round.

Deviation: a client keeps nothing between rounds, so that an order brings both factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from fedtune.methods.fedavg.lora_aggregation import A, B

T = TypeVar("T")


def fixed(name: str, round: int) -> bool:
    """Whether a trainable tensor is left as it is in a round, counted from 1."""
    return name.endswith(A if round % 2 else B)


def moving(tensors: Mapping[str, T], round: int) -> dict[str, T]:
    """What is trained in a round."""
    return {name: tensor for name, tensor in tensors.items() if not fixed(name, round)}


@contextmanager
def in_turn(parameters: Mapping[str, nn.Parameter], round: int) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters that a round trains; the others ask for no gradient inside."""
    still = [parameter for name, parameter in parameters.items() if fixed(name, round)]
    for parameter in still:
        parameter.requires_grad_(False)
    try:
        yield moving(parameters, round)
    finally:
        for parameter in still:
            parameter.requires_grad_(True)
