"""Structured pruning: which channels of a block's MLP matter, and the block without the others.

A channel of an MLP is one row of each linear layer into it (up, gate) and one column of the layer out of it
(down). Taking all of them out together leaves a smaller dense MLP (Ma et al., LLM-Pruner, 2023, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import InputError
from fedtune.models.blocks import linear_layers, out_features


@dataclass(frozen=True)
class Mlp:
    """A block's MLP by the paths of its linear layers inside the block, and its width in channels."""

    ups: tuple[str, ...]
    down: str
    width: int


def find_mlp(block: nn.Module) -> Mlp:
    """Locates a block's MLP: its last linear layer, and those outside attention that feed it by their shape.

    Raises:
        InputError: The block's linear layers are not of that kind; names them.
    """
    linears = linear_layers(block)
    outside = {path: linear for path, linear in linears.items() if "att" not in path.split(".")[0]}
    if outside:
        down = list(outside)[-1]
        width = in_features(outside[down])
        ups = tuple(path for path, x in outside.items() if path != down and out_features(x) == width)
        if ups:
            return Mlp(ups, down, width)
    raise InputError(
        f"cannot find the MLP of {type(block).__name__}; its linear layers: {', '.join(linears) or 'none'}"
    )


def in_features(linear: nn.Module) -> int:
    """The width of a linear layer's input, for `nn.Linear` and for GPT-2's transposed `Conv1D`."""
    width = linear.nx if isinstance(linear, Conv1D) else linear.in_features
    assert isinstance(width, int)
    return width


def kept_channels(width: int, dropout: float) -> int:
    """⌊(1 − ratio) width⌋, at least one; exact."""
    return max(1, int((1 - Fraction(str(dropout))) * width))


def largest_channels(block: nn.Module, tensors: Mapping[str, Tensor], dropout: float) -> Tensor:
    """Indices, ascending, of the channels whose weights have the largest sum of squares."""
    mlp = find_mlp(block)
    score = torch.zeros(mlp.width, dtype=torch.float64, device=tensors[f"{mlp.down}.weight"].device)
    for path in (*mlp.ups, mlp.down):
        weight = tensors[f"{path}.weight"]
        score += weight.double().square().sum(1 - _channel_dim(block, path, mlp))
    return score.topk(kept_channels(mlp.width, dropout)).indices.sort().values


def prune_mlp(block: nn.Module, tensors: Mapping[str, Tensor], channels: Tensor) -> dict[str, Tensor]:
    """A block's tensors with these channels of its MLP alone; everything else is not copied."""
    return _select(block, tensors, lambda t, dim, width: t.index_select(dim, channels))


def pad_mlp(block: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a pruned block in the shapes of the whole one, with channels of zeros behind the others.

    It computes what the pruned block does: a channel of zero weights gives zero, since every activation in
    use maps 0 to 0, and the order of channels does not matter.
    """

    def grown(t: Tensor, dim: int, width: int) -> Tensor:
        missing = [0, 0] * (t.ndim - dim)
        missing[-1] = width - t.shape[dim]
        return nn.functional.pad(t, missing)

    return _select(block, tensors, grown)


def _select(
    block: nn.Module, tensors: Mapping[str, Tensor], change: Callable[[Tensor, int, int], Tensor]
) -> dict[str, Tensor]:
    mlp = find_mlp(block)
    result = dict(tensors)
    for path in (*mlp.ups, mlp.down):
        name = f"{path}.weight"
        result[name] = change(tensors[name], _channel_dim(block, path, mlp), mlp.width)
        bias = f"{path}.bias"
        if path != mlp.down and bias in tensors:
            result[bias] = change(tensors[bias], 0, mlp.width)
    return result


def _channel_dim(block: nn.Module, path: str, mlp: Mlp) -> int:
    """Where channels lie in a weight: rows of `nn.Linear` into the MLP, columns of the one out of it."""
    transposed = isinstance(block.get_submodule(path), Conv1D)
    return int((path == mlp.down) != transposed)
