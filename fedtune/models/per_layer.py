"""Fewer blocks: the configuration in which each of them is what it was.

A configuration says what a block is by the block's number: in lists with one entry a block (`layer_types`),
in lists of numbers (`mlp_only_layers`), as a first number (`first_k_dense_replace`) or a step
(`decoder_sparse_step`). Those that are known are rewritten for the blocks that stay. Whether that was enough
is not taken on trust: both models are built without memory and their blocks compared, and what differs is
refused with the name of the setting.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks

# Lists of blocks' numbers, and numbers of blocks at the beginning that are unlike those behind them.
_INDICES = ("mlp_only_layers", "moe_layers", "full_attn_idxs")
_FIRST = ("first_k_dense_replace", "num_dense_layers")
# As long as a model is deep by chance alone.
_OTHER_LISTS = re.compile("^architectures$|^pos_att_type$|_token_id$")

Signature = Mapping[str, object]


def with_blocks(config: PretrainedConfig, blocks: int, origins: Sequence[int]) -> PretrainedConfig:
    """A copy of a configuration for some of a model's blocks, in this order.

    Args:
        config: Of the whole model.
        blocks: How many that has in its list of blocks.
        origins: The numbers of the blocks that stay.

    Raises:
        InputError: It does not have one layer a block (ALBERT's blocks are used again and again).
    """
    smaller = type(config).from_dict(config.to_dict())
    if list(origins) == list(range(blocks)):
        return smaller
    layers = getattr(config, "num_hidden_layers", None)
    if layers != blocks:
        raise InputError(
            f"no block of this model can be left out: num_hidden_layers is {layers}, and it has {blocks} of "
            "them. Use a setting that keeps all blocks, or another model."
        )
    values = config.to_dict()
    for key, value in _renumbered(values, blocks, origins):
        setattr(smaller, key, value)
    smaller.num_hidden_layers = len(origins)
    return smaller


def _renumbered(
    values: Mapping[str, Any], blocks: int, origins: Sequence[int]
) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if key in _INDICES and isinstance(value, list):
            yield key, [place for place, origin in enumerate(origins) if origin in value]
        elif key in _FIRST and isinstance(value, int):
            yield key, sum(origin < value for origin in origins)
        elif isinstance(value, dict) and "layer" in key and value and all(str(k).isdigit() for k in value):
            yield key, {place: value[k] for place, o in enumerate(origins) for k in value if int(k) == o}
        elif key == "attention_types":  # GPT-Neo: [[kinds, how often], ...]
            kinds = [kind for some, times in value for _ in range(times) for kind in some]
            yield key, [[[kinds[origin]], 1] for origin in origins]
        elif isinstance(value, list) and len(value) == blocks and not _OTHER_LISTS.search(key):
            yield key, [value[origin] for origin in origins]
    step = values.get("decoder_sparse_step")
    if isinstance(step, int) and "mlp_only_layers" in values:  # each step-th block has experts (Qwen's)
        dense = values["mlp_only_layers"] or []
        yield "decoder_sparse_step", 1
        yield (
            "mlp_only_layers",
            [place for place, origin in enumerate(origins) if origin in dense or (origin + 1) % step],
        )


def signatures(model: PreTrainedModel) -> tuple[list[Signature], Signature]:
    """What can be seen of each block, and of all around them: classes, shapes and plain attributes."""
    blocks = find_blocks(model)
    count = len(blocks.modules)
    inside = [_signature(block, index, count) for index, block in enumerate(blocks.modules)]
    around = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.startswith(f"{blocks.path}.")
    }
    return inside, around


def require_same(
    kind: type[PreTrainedModel],
    whole: tuple[list[Signature], Signature],
    smaller: tuple[list[Signature], Signature],
    origins: Sequence[int],
) -> None:
    """Compares the blocks of a smaller model with those of the whole one, as `signatures` gave them.

    Raises:
        InputError: A block is not what it was; names what differs and the settings that may be the cause.
    """
    for place, origin in enumerate(origins):
        was, now = whole[0][origin], smaller[0][place]
        odd = next((name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)), None)
        if odd is not None:
            raise InputError(
                f"block {origin} of {kind.__name__} is not the same once others are left out "
                f"({odd}: {was.get(odd, 'none')}, then {now.get(odd, 'none')}); {_causes(kind)}. Use a "
                "setting that keeps all blocks, or another model."
            )
    odd = next(
        (n for n in sorted(whole[1].keys() | smaller[1].keys()) if whole[1].get(n) != smaller[1].get(n)), None
    )
    if odd is not None:
        raise InputError(
            f"no block of {kind.__name__} can be left out: the shape of {odd} depends on their number "
            f"({whole[1].get(odd, 'none')}, then {smaller[1].get(odd, 'none')}). Use a setting that keeps "
            "all blocks, or another model."
        )


def _signature(block: nn.Module, index: int, count: int) -> Signature:
    seen: dict[str, object] = {}
    for path, module in block.named_modules():
        seen[f"{path}" or "block"] = type(module).__name__
        for name, value in vars(module).items():
            if name.startswith("_") or name == "training" or not _plain(value):
                continue
            if type(value) is int and value == index and re.search("(idx|index|_id|_number)$", name):
                value = "its number"
            elif isinstance(value, list) and len(value) == count:  # of all blocks, kept in each
                value = value[index]
            seen[f"{path}.{name}"] = value
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        seen[f"{name} "] = tuple(tensor.shape)
    return seen


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _causes(kind: type[PreTrainedModel]) -> str:
    """The settings that the family's code asks together with a block's number."""
    code = inspect.getsource(sys.modules[kind.__module__])
    lines = [line for line in code.splitlines() if re.search(r"layer_(idx|id|number|index)", line)]
    named = sorted(
        {name for line in lines for name in re.findall(r"config\.(\w+)", line)} - {"num_hidden_layers"}
    )
    if not named:
        return "its code asks which block it is, or how many there are"
    return f"its code asks for a block's number together with {', '.join(named)}"
