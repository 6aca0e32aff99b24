"""LoRA factors of clients: cut to a client's rank, padded back, or stacked into the exact mean product.

The mean of A and the mean of B do not give the mean of BA. Stacking does (Wang et al., "FLoRA", 2024):

    Σ p_i B_i A_i = [p_1 B_1 | p_2 B_2 | …] · [A_1; A_2; …]

so the stack's rank is the sum of the clients' ranks, which may differ. The product is folded into the
base weights and every round trains fresh factors. Once a stack would be larger than the dense product,
the dense product takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from fedtune.models.lora import lora_layers

A, B, DENSE = ".lora_A.weight", ".lora_B.weight", ".dense"
Trained = tuple[Mapping[str, Tensor], int]  # a client's factors by name, and its number of examples


def is_factor(name: str) -> bool:
    """Whether a trainable tensor is a LoRA factor (a classification head is not)."""
    return name.endswith((A, B))


def cut(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The first `rank` rows of each A (rank x in) and columns of each B (out x rank); others whole."""
    return {
        name: t[:rank] if name.endswith(A) else t[:, :rank] if name.endswith(B) else t
        for name, t in tensors.items()
    }


def fresh(parameters: Mapping[str, nn.Parameter], generator: torch.Generator) -> dict[str, Tensor]:
    """Factors as LoRA begins with them: A uniform in ±1/√in, B zero."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if name.endswith(A):
            bound = parameter.shape[1] ** -0.5
            found[name] = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        elif name.endswith(B):
            found[name] = torch.zeros(parameter.shape)
    return found


def cut_like(whole: Tensor, received: Tensor) -> Tensor:
    """The part of a tensor that has another's shape, from its beginning."""
    return whole[tuple(slice(n) for n in received.shape)] if whole.ndim else whole


def pad(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fills cut factors up with zeros to the shapes of `like`.

    Zero rows of A with zero columns of B have zero gradients, so a padded client trains as one of its
    own rank; in a mean of updates, what a client lacks it leaves unchanged.
    """
    padded = {}
    for name, t in tensors.items():
        full = like[name].shape
        if t.shape != full:
            t = nn.functional.pad(t, (0, full[1] - t.shape[1], 0, full[0] - t.shape[0]))
        padded[name] = t
    return padded


def padded(update: Mapping[str, Tensor], rank: int) -> Iterator[Tensor]:
    """An update's tensors by name, factors filled up with zeros to a rank: every number has its place."""
    for name in sorted(update):
        lacking = rank - update[name].shape[0 if name.endswith(A) else 1] if is_factor(name) else 0
        places = (0, 0, 0, lacking) if name.endswith(A) else (0, lacking)
        yield nn.functional.pad(update[name], places) if lacking else update[name]


def products(update: Mapping[str, Tensor], scale: float) -> Iterator[Tensor]:
    """An update's tensors by name, with `scale` · B A for two factors; one product in memory at a time."""
    for name in sorted(update):
        if name.endswith(B):
            a = update[name.removesuffix(B) + A].to(torch.float32)
            yield scale * (update[name].to(torch.float32) @ a)
        elif not name.endswith(A):
            yield update[name]


def stack(
    product: Mapping[str, Tensor],
    replies: Sequence[Trained],
    scaling: Mapping[str, float],
    *,
    total: int | None = None,
) -> dict[str, Tensor]:
    """Adds Σ p_i B_i A_i, p_i = n_i / Σ n, to the product so far.

    Args:
        product: By module, either the stacked A (R x in) and B (out x R) or the dense product (out x in).
        replies: Each client's trained factors and its number of examples.
        scaling: alpha / rank of each module, folded into B.
        total: Σ n; None: of `replies`.

    Returns:
        The new product, in whichever of the two forms is smaller.
    """
    total = total or sum(examples for _, examples in replies)
    added: dict[str, Tensor] = {}
    for module, scale in scaling.items():
        a = torch.cat([factors[module + A] for factors, _ in replies])
        b = torch.cat([factors[module + B] * (scale * n / total) for factors, n in replies], dim=1)
        if module + DENSE in product:
            added[module + DENSE] = product[module + DENSE] + b @ a
            continue
        if module + A in product:
            a, b = torch.cat([product[module + A], a]), torch.cat([product[module + B], b], dim=1)
        if a.numel() + b.numel() < b.shape[0] * a.shape[1]:
            added[module + A], added[module + B] = a, b
        else:
            added[module + DENSE] = b @ a
    return added


def shares(replies: Sequence[Trained]) -> list[tuple[Mapping[str, Tensor], float]]:
    """Each client's factors with p_i = n_i / Σ n."""
    total = sum(examples for _, examples in replies)
    return [(factors, examples / total) for factors, examples in replies]


def mean(replies: Sequence[Trained]) -> dict[str, Tensor]:
    """Σ p_i of each factor, summed in float64, float32."""
    found: dict[str, Tensor] = {}
    for factors, share in shares(replies):
        for name, factor in factors.items():
            part = factor.to(torch.float64) * share
            found[name] = found[name].add_(part) if name in found else part
    return {name: total.to(torch.float32) for name, total in found.items()}


def inner(one: Mapping[str, Tensor], other: Mapping[str, Tensor], scale: float) -> float:
    """The inner product of two clients' updates, of which factors stand for their product `scale` · B A.

    <B_1 A_1, B_2 A_2> = Σ (B_1ᵀ B_2) ∘ (A_1 A_2ᵀ), so that no product is formed; ranks may differ.
    """
    found = []
    for name in sorted(one):
        left, right = one[name].to(torch.float64), other[name].to(torch.float64)
        if name.endswith(A):
            b = name.removesuffix(A) + B
            both = (one[b].to(torch.float64).T @ other[b].to(torch.float64)) * (left @ right.T)
            found.append(scale**2 * float(both.sum()))
        elif not name.endswith(B):
            found.append(float((left * right).sum()))
    return math.fsum(found)


def scaled(update: Mapping[str, Tensor], times: float) -> dict[str, Tensor]:
    """An update times a factor, where factors stand for their product: B carries it."""
    return {name: t if name.endswith(A) else t.to(torch.float32) * times for name, t in update.items()}


@contextmanager
def folded(model: nn.Module, product: Mapping[str, Tensor]) -> Iterator[None]:
    """Adds a stacked product to the base weights inside the block and puts the same bits back after it.

    Where weights are offloaded meanwhile, a parameter has other memory after it, and what is on disk is known
    by the parameter's version: so it is changed through the parameter, and not through its `.data` of before.
    """
    saved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for module, layer in lora_layers(model).items():
            if module + DENSE in product:
                update = product[module + DENSE]
            elif module + A in product:
                update = product[module + B] @ product[module + A]
            else:
                continue
            weight = cast(nn.Module, layer).get_parameter("base_layer.weight")
            saved.append((weight, weight.detach().clone()))
            transposed = getattr(layer, "fan_in_fan_out", False)  # GPT-2 keeps its weights (in x out)
            update = (update.T if transposed else update).to(weight.device)
            weight.detach().copy_(weight.detach().to(torch.float32) + update)
        yield
    finally:
        for weight, before in saved:
            weight.detach().copy_(before)
