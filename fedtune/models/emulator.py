"""A smaller model in place of the one that clients never get: which blocks it has, and how it is built.

Wu et al., FedBiOT (KDD 2024), Algorithm 1, after Xiao et al., Offsite-Tuning (2023). A model of n blocks is
cut into an adapter of s blocks, which clients train, and n − s others, E*, which an emulator E stands for.

An emulator is a function from the model and the indices of E* to blocks (`EMULATORS`). Its blocks may have
other shapes than the model's: what is built takes every tensor as it comes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.boundary import first_line
from fedtune.models.load import quiet
from fedtune.models.per_layer import Signature, require_same, signatures, with_blocks
from fedtune.models.pruning import largest_channels, prune_mlp

ARCHITECTURE = "architecture"  # name of the tensor that holds class and configuration as JSON, UTF-8


@dataclass(frozen=True)
class Cut:
    """How a model's blocks are divided, by index: the adapter before and after E*, and E* between them."""

    front: tuple[int, ...]
    middle: tuple[int, ...]
    back: tuple[int, ...]

    @property
    def adapter(self) -> tuple[int, ...]:
        """All blocks of the adapter."""
        return self.front + self.back


def cut(layers: int, adapter_layers: int, *, both_ends: bool) -> Cut:
    """The last s blocks as adapter (FedBiOT), or the first s/2 and the last s/2 (Offsite-tuning, FedOT).

    Raises:
        InputError: s leaves fewer than two blocks for E*, or is odd where both ends get half of it.
    """
    front = adapter_layers // 2 if both_ends else 0
    if both_ends and adapter_layers % 2:
        raise InputError(f"method.adapter_layers: both ends get half of it; got {adapter_layers}, not even")
    if layers - adapter_layers < 2:
        raise InputError(
            f"method.adapter_layers: {adapter_layers} of the model's {layers} blocks leave "
            f"{max(layers - adapter_layers, 0)} for the emulator; it needs at least 2. "
            f"{_less(layers - 2, layers, both_ends=both_ends)}"
        )
    back = layers - (adapter_layers - front)
    return Cut(tuple(range(front)), tuple(range(front, back)), tuple(range(back, layers)))


def _less(most: int, layers: int, *, both_ends: bool) -> str:
    """What to set so that the adapter has at most so many blocks."""
    most -= most % 2 if both_ends else 0
    if most < 1:
        return f"A model of {layers} blocks is too small for this method; take a deeper one"
    return f"Set method.adapter_layers={most}{' or less' if most > 1 + both_ends else ''}"


def kept_blocks(blocks: int, dropout: float) -> tuple[int, ...]:
    """Which of n − s blocks uniform layer dropout keeps: n' = ⌊(1 − β)(n − s)⌋, evenly spaced.

    The j-th is ⌊j (n − s − 1) / (n' − 1)⌋, so the first and the last are among them. Algorithm 1 prints
    n' = ⌊β (n − s)⌋; its Table 5 needs 1 − β. Integers and fractions only: a float stride can miss the last.

    Raises:
        InputError: Fewer than two blocks would be left.
    """
    kept = _left(blocks, dropout)
    if kept < 2:
        raise InputError(
            f"method.layer_dropout: {dropout} of {blocks} blocks leaves {kept}; an emulator needs at least 2"
        )
    return tuple(j * (blocks - 1) // (kept - 1) for j in range(kept))


def _left(blocks: int, dropout: float) -> int:
    return int((1 - Fraction(str(dropout))) * blocks)


def flops_per_token(block_parameters: int, places: Cut) -> int:
    """A client's cost a token as the paper's Table 5 counts it: P (L + B − 1).

    L blocks run forward, and B of them, those from the first block of the adapter on, backward. A formula for
    comparing with that table and no measurement: it counts one operation for a multiplication with its
    addition and for forward and backward alike, one block less than run, and nothing for the attention's own
    products, the embeddings and the head.

    Args:
        block_parameters: P, of one block with its LoRA.
        places: The division of the model that the client has, with the emulator as its middle.
    """
    layers = len(places.adapter) + len(places.middle)
    return block_parameters * (layers + layers - places.adapter[0] - 1)


@dataclass(frozen=True)
class Block:
    """A block of a model to be built: its tensors, and whose place in the configuration it takes.

    Attributes:
        origin: Index of the block that it stands for (models with unlike blocks, as Gemma 3 with its two
            kinds of attention, say in their configuration which is which).
        tensors: Parameters and buffers by their path inside the block.
    """

    origin: int
    tensors: Mapping[str, Tensor]


Emulator = Callable[[nn.Module, Sequence[int], float], list[Block]]


def layer_dropout(model: nn.Module, middle: Sequence[int], dropout: float) -> list[Block]:
    """The emulator of the paper: some of E*'s blocks as they are, evenly spaced."""
    layers, both_ends = len(find_blocks(model).modules), bool(middle[0])
    try:
        kept = kept_blocks(len(middle), dropout)
    except InputError as error:
        needed = next(n for n in itertools.count(len(middle)) if _left(n, dropout) >= 2)
        way = _less(layers - needed, layers, both_ends=both_ends)
        raise InputError(f"{error}. {way}, or method.layer_dropout=0 to leave nothing out") from error
    return take(model, [middle[j] for j in kept])


def channel_pruning(model: nn.Module, middle: Sequence[int], dropout: float) -> list[Block]:
    """All of E*'s blocks, each with the ⌊(1 − β) width⌋ channels of its MLP that have the largest weights."""
    modules = find_blocks(model).modules
    blocks = []
    for whole in take(model, middle):
        module = modules[whole.origin]
        channels = largest_channels(module, whole.tensors, dropout)
        blocks.append(Block(whole.origin, prune_mlp(module, whole.tensors, channels)))
    return blocks


EMULATORS: dict[str, Emulator] = {"layer-dropout": layer_dropout, "channel-pruning": channel_pruning}


def take(model: nn.Module, indices: Iterable[int]) -> list[Block]:
    """Some of a model's own blocks; their tensors are not copied."""
    modules = find_blocks(model).modules
    return [Block(index, _tensors(modules[index])) for index in indices]


def submodel(model: PreTrainedModel, blocks: Sequence[Block]) -> dict[str, Tensor]:
    """All that it takes to build `model` with these blocks: tensors by name, the architecture as one more.

    Embeddings, norms and head are the model's own, not copies; tied tensors come once.

    Raises:
        InputError: A block would not be what it was among fewer of them; names the setting.
    """
    path = find_blocks(model).path
    origins = [block.origin for block in blocks]
    about = _described(model, origins)
    skeleton = _skeleton(about)
    everything = list(range(len(find_blocks(model).modules)))
    if origins != everything:
        whole = _whole(json.dumps(_described(model, everything), sort_keys=True))
        require_same(type(model), whole, signatures(skeleton), origins)
    # Gemma 3 has rotary frequencies for each kind of attention among its blocks, and only for those
    buffers = {name for name, _ in model.named_buffers()} - _tensors(skeleton).keys()
    tensors = {
        name: tensor
        for name, tensor in _tensors(model).items()
        if not name.startswith(f"{path}.") and name not in buffers
    }
    for index, block in enumerate(blocks):
        tensors |= {f"{path}.{index}.{name}": tensor for name, tensor in block.tensors.items()}
    text = json.dumps(about, sort_keys=True).encode()
    return {**tensors, ARCHITECTURE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def build(tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model that `submodel` described, in eval mode, frozen, on the tensors' own memory.

    Block indices are those of the new model, so that cached generation works.

    Raises:
        InputError: The architecture is not one of transformers' own, or tensors are missing or foreign.
    """
    model = _skeleton(json.loads(bytes(tensors[ARCHITECTURE].numpy())))
    weights = {name: tensor for name, tensor in tensors.items() if name != ARCHITECTURE}
    # a tied tensor comes under one of its names; buffers are not in the state dict where they are not saved
    odd = sorted(_tensors(model).keys() ^ weights.keys())
    if odd:
        raise InputError(f"the model does not fit its architecture: missing or foreign: {', '.join(odd[:3])}")
    for name, tensor in weights.items():
        _assign(model, name, tensor)
    model.tie_weights()
    return model.requires_grad_(False).eval()


def _skeleton(about: Mapping[str, Any]) -> PreTrainedModel:
    """A model of this class and configuration, without memory for its tensors."""
    kind = getattr(transformers, about["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise InputError(f"the model's class is {about['class']!r}, which transformers does not have")
    try:
        config = AutoConfig.for_model(**about["config"])
        with torch.device("meta"), quiet():
            model: PreTrainedModel = kind._from_config(config, dtype=getattr(torch, about["dtype"]))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InputError(
            f"no {about['class']} can be built from its configuration with "
            f"{about['config'].get('num_hidden_layers')} blocks: {first_line(error)}"
        ) from error
    return model


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once, also buffers that are not saved with a model."""
    return {name: tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._parameters:
        module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[own] = tensor
    if own == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = tensor.shape
    if own == "weight" and isinstance(module, Conv1D):
        module.nx, module.nf = tensor.shape


def _described(model: PreTrainedModel, origins: Sequence[int]) -> dict[str, Any]:
    """Class, dtype and configuration of the model with these of its blocks."""
    smaller = with_blocks(model.config, len(find_blocks(model).modules), origins)
    text = smaller.to_json_string(use_diff=False)
    # transformers writes infinity as {"__float__": "Infinity"} and does not read it so where a model is built
    config = json.loads(text, object_hook=lambda d: float(d["__float__"]) if "__float__" in d else d)
    config.pop("transformers_version", None)
    config.pop("_name_or_path", None)
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": config,
    }


@lru_cache(maxsize=8)
def _whole(about: str) -> tuple[list[Signature], Signature]:
    return signatures(_skeleton(json.loads(about)))
