"""Structured pruning: which channels of a block's MLP matter, and the block without the others.

A channel of an MLP is one row of each linear layer into it (up, gate) and one column of the layer out of it
(down). Taking all of them out together leaves a smaller dense MLP (Ma et al., LLM-Pruner, 2023, section 3.1).
Of a mixture of experts each expert loses as many channels, those that matter least in it; its router and the
experts that all tokens share stay whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import InputError
from fedtune.models.blocks import find_feed_forward, linear_layers, out_features


@dataclass(frozen=True)
class Place:
    """Where channels lie in a tensor.

    Attributes:
        name: The tensor's path inside the block.
        dim: Along which dimension.
        copies: How often all channels come in it: twice where gate and up are one.
        inner: Whether copies of a channel are neighbours (GPT-OSS), or all of the first come first.
    """

    name: str
    dim: int
    copies: int = 1
    inner: bool = False

    def apart(self, t: Tensor) -> tuple[Tensor, int]:
        """The tensor with a dimension of its own for the copies, and that of the channels in it."""
        sizes = (-1, self.copies) if self.inner else (self.copies, -1)
        return t.unflatten(self.dim, sizes), self.dim + (not self.inner)


@dataclass(frozen=True)
class Mlp:
    """A block's MLP, or its experts' together.

    Attributes:
        ups: The paths of the layers into it inside the block, or of the experts' parameter.
        down: Of the layer out of it.
        width: Its channels; of experts, each one's.
        places: All tensors that channels lie in.
        experts: How many there are, along the first dimension of each tensor; 0: no mixture.
    """

    ups: tuple[str, ...]
    down: str
    width: int
    places: tuple[Place, ...]
    experts: int = 0


def find_mlp(block: nn.Module, *, experts: bool = False) -> Mlp:
    """Locates a block's MLP: its last linear layer, and those that feed it by their shape.

    Gate and up may be one layer of twice the width, whose result the family's code cuts in halves (Phi-3).

    Args:
        block: The block.
        experts: Take a mixture of experts too, where transformers says how their parameters are laid out.

    Raises:
        InputError: The block has none, or a mixture of experts; names its linear layers.
    """
    linears = find_feed_forward(block).linears
    if linears:
        down = list(linears)[-1]
        width = in_features(linears[down])
        ups = tuple(path for path, x in linears.items() if path != down and out_features(x) == width)
        joined = [path for path, x in linears.items() if path != down and _halved(block, path, x, width)]
        if ups or len(joined) == 1:
            return _dense(block, ups or tuple(joined), down, width, copies=1 if ups else 2)
    elif experts and (found := _experts(block)):
        return found
    raise InputError(
        f"channels can be taken out of an MLP of linear layers{', or of experts,' if experts else ','} and "
        f"{type(block).__name__} has none that is known; its linear layers: "
        f"{', '.join(linear_layers(block)) or 'none'}"
    )


def _dense(block: nn.Module, ups: tuple[str, ...], down: str, width: int, *, copies: int) -> Mlp:
    places = []
    for path in (*ups, down):
        linear = block.get_submodule(path)
        rows = int(isinstance(linear, Conv1D))  # GPT-2 keeps its weights (in x out)
        into = Place(f"{path}.weight", rows, copies)
        places.append(Place(f"{path}.weight", 1 - rows) if path == down else into)
        if path != down and getattr(linear, "bias", None) is not None:
            places.append(Place(f"{path}.bias", 0, copies))
    return Mlp(ups, down, width, tuple(places))


def _halved(block: nn.Module, path: str, linear: nn.Module, width: int) -> bool:
    """Whether a layer gives gate and up, which the code around it takes apart in the middle."""
    around = block.get_submodule(path.rpartition(".")[0])
    code = inspect.getsource(type(around).forward)
    return out_features(linear) == 2 * width and ".chunk(2, dim=-1)" in code


def _experts(block: nn.Module) -> Mlp | None:
    """The experts of a block in their layout as transformers notes it, each of which is gate, up and down."""
    found = [(path, module) for path, module in block.named_modules() if hasattr(module, "is_concatenated")]
    if len(found) != 1:
        return None
    path, module = found[0]
    held = dict(module.named_parameters(recurse=False))
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    known = all(t.ndim == (2 if name.endswith("bias") else 3) for name, t in held.items())
    if not known or {"down_proj", up} - held.keys():
        return None
    across = 1 + bool(module.is_transposed)  # (experts, out, in), or (experts, in, out)
    copies, inner = held[up].shape[across] // held["down_proj"].shape[3 - across], not module.is_concatenated
    places = [Place(f"{path}.{up}", across, copies, inner), Place(f"{path}.down_proj", 3 - across)]
    if f"{up}_bias" in held:
        places.append(Place(f"{path}.{up}_bias", 1, copies, inner))
    width = held["down_proj"].shape[3 - across]
    return Mlp((f"{path}.{up}",), f"{path}.down_proj", width, tuple(places), experts=len(held["down_proj"]))


def in_features(linear: nn.Module) -> int:
    """The width of a linear layer's input, for `nn.Linear` and for GPT-2's transposed `Conv1D`."""
    width = linear.nx if isinstance(linear, Conv1D) else linear.in_features
    assert isinstance(width, int)
    return width


def kept_channels(width: int, dropout: float) -> int:
    """⌊(1 − ratio) width⌋, at least one; exact."""
    return max(1, int((1 - Fraction(str(dropout))) * width))


def largest_channels(block: nn.Module, tensors: Mapping[str, Tensor], dropout: float) -> Tensor:
    """Indices, ascending, of the channels whose weights have the largest sum of squares; a row an expert."""
    mlp = find_mlp(block, experts=True)
    score = torch.zeros((), dtype=torch.float64, device=tensors[mlp.places[0].name].device)
    for place in mlp.places:
        if not place.name.endswith("bias"):
            score = score + _sums(tensors[place.name].double().square(), place, mlp)
    order = score.argsort(descending=True, stable=True)  # of equals the first
    return order[..., : kept_channels(mlp.width, dropout)].sort().values


def prune_mlp(block: nn.Module, tensors: Mapping[str, Tensor], channels: Tensor) -> dict[str, Tensor]:
    """A block's tensors with these channels of its MLP alone; everything else is not copied."""

    def chosen(t: Tensor, dim: int, width: int) -> Tensor:
        if channels.ndim == 1:
            return t.index_select(dim, channels)
        shape = [1] * t.ndim
        shape[0], shape[dim] = channels.shape
        sizes = list(t.shape)
        sizes[dim] = channels.shape[1]
        return t.gather(dim, channels.view(shape).expand(sizes))

    return _select(block, tensors, chosen)


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
    mlp = find_mlp(block, experts=True)
    result = dict(tensors)
    for place in mlp.places:
        if place.name in tensors:
            apart, dim = place.apart(tensors[place.name])
            result[place.name] = change(apart, dim, mlp.width).flatten(place.dim, place.dim + 1)
    return result


def _sums(t: Tensor, place: Place, mlp: Mlp) -> Tensor:
    """A tensor's sum over all but the channels, and of experts all but these two."""
    apart, dim = place.apart(t)
    kept = (0, dim) if mlp.experts else (dim,)
    others = [each for each in range(apart.ndim) if each not in kept]
    return apart.sum(others) if others else apart


@dataclass(frozen=True)
class Attention:
    """A block's attention, as groups that can be taken out: a key-value head with the queries that share it.

    Attributes:
        slices: Each linear layer into it, where in its output q, k or v begins, and how wide a group is.
        out: The linear layer out of it, and how wide a group is in its input.
        groups: How many there are.
    """

    slices: tuple[tuple[str, int, int], ...]
    out: tuple[str, int]
    groups: int


def find_attention(block: nn.Module) -> Attention:
    """Locates query, key, value and output layers: separate ones (Llama, BERT, OPT), or GPT-2's joined one.

    Raises:
        InputError: The block's attention is of another kind (BLOOM, GPT-NeoX); names its linear layers.
    """
    linears = {p: x for p, x in linear_layers(block).items() if "att" in p.split(".")[0]}
    names = {path.rpartition(".")[2]: path for path in linears}
    projections = [
        next((names[n] for n in choice if n in names), "")
        for choice in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
    ]
    rest = [path for path in linears if path not in projections and path != names.get("c_attn")]
    if len(rest) == 1 and all(projections):
        head = _head_width(block.get_submodule(projections[0].rpartition(".")[0]))
        groups = out_features(linears[projections[1]]) // head
        widths = [out_features(linears[path]) // groups for path in projections]
        slices = tuple((path, 0, width) for path, width in zip(projections, widths, strict=True))
        return Attention(slices, (rest[0], in_features(linears[rest[0]]) // groups), groups)
    if len(rest) == 1 and "c_attn" in names:
        head = _head_width(block.get_submodule(names["c_attn"].rpartition(".")[0]))
        width = out_features(linears[names["c_attn"]]) // 3
        slices = tuple((names["c_attn"], part * width, head) for part in range(3))
        return Attention(slices, (rest[0], head), width // head)
    raise InputError(
        f"cannot take heads out of {type(block).__name__}; its linear layers in attention: "
        f"{', '.join(linears) or 'none'}. Use method.compression layer-drop or none."
    )


def fit_attention(block: nn.Module) -> None:
    """Tells a block's attention how many heads its tensors have, where the family's code asks."""
    try:
        attention = find_attention(block)
    except InputError:
        return  # of a kind that is never pruned
    module = block.get_submodule(attention.slices[0][0].rpartition(".")[0])
    width = in_features(block.get_submodule(attention.out[0]))
    for name, value in (("num_heads", width // _head_width(module)), ("split_size", width)):
        if hasattr(module, name):
            setattr(module, name, value)


def group_scores(
    block: nn.Module, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """First-order importance Σ |w · ∂L/∂w| of each attention group and each MLP channel, float32.

    Ma et al. (2023), section 3.2, Eq. 5 without its second-order term, summed over a group's weights.
    """
    product = {name: (w.double() * gradients[name].double()).abs() for name, w in weights.items()}
    attention, mlp = find_attention(block), find_mlp(block)
    heads = torch.zeros(attention.groups, dtype=torch.float64, device=next(iter(product.values())).device)
    channels = torch.zeros(mlp.width, dtype=torch.float64, device=heads.device)
    for name, dim, start, width in _group_places(block, attention, product):
        part = product[name].narrow(dim, start, attention.groups * width).movedim(dim, 0)
        heads += part.reshape(attention.groups, -1).sum(1)
    for place in mlp.places:
        if place.name in product:
            channels += _sums(product[place.name], place, mlp)
    return heads.float(), channels.float()


def best(scores: Tensor, ratio: float) -> Tensor:
    """Indices, ascending, int32, of the ⌊(1 − ratio) n⌋ (at least one) largest; of equals the first."""
    order = scores.argsort(descending=True, stable=True)
    return order[: kept_channels(len(scores), ratio)].sort().values.to(torch.int32)


def prune_groups(
    block: nn.Module, tensors: Mapping[str, Tensor], heads: Tensor, channels: Tensor
) -> dict[str, Tensor]:
    """A block's tensors with these attention groups and MLP channels alone; everything else is not copied."""
    attention = find_attention(block)
    result = prune_mlp(block, tensors, channels.long())
    chosen: dict[str, list[Tensor]] = {}
    for name, _, start, width in _group_places(block, attention, tensors):
        places = heads.long()[:, None] * width + torch.arange(width)
        chosen.setdefault(name, []).append(start + places.flatten())
    for name, dim, _, _ in _group_places(block, attention, tensors):
        if name in chosen:  # a joined layer comes once for each of q, k and v
            result[name] = result[name].index_select(dim, torch.cat(chosen.pop(name)))
    return result


def _group_places(
    block: nn.Module, attention: Attention, tensors: Mapping[str, Tensor]
) -> list[tuple[str, int, int, int]]:
    """Tensor, dimension, start and width of a group, wherever groups lie."""
    places = []
    for path, start, width in attention.slices:
        transposed = isinstance(block.get_submodule(path), Conv1D)
        places.append((f"{path}.weight", int(transposed), start, width))
        if f"{path}.bias" in tensors:
            places.append((f"{path}.bias", 0, start, width))
    path, width = attention.out
    transposed = isinstance(block.get_submodule(path), Conv1D)
    return [*places, (f"{path}.weight", int(not transposed), 0, width)]


def _head_width(attention: nn.Module) -> int:
    width = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
    if not isinstance(width, int):
        raise InputError(f"{type(attention).__name__} does not say how wide its heads are")
    return width
