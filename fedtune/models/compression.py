"""Download compression: which blocks a client is sent beside its own, and in which shape.

Wang et al., FedCyBGD (2024). `layer-drop` is Eq. 5: of the k frozen blocks ⌊(1 − ratio) k⌋, drawn at random,
are sent as they are. `hybrid` is Algorithm 2 and Eq. 6: blocks that were updated in this cycle are sent
pruned, with fewer attention heads and MLP channels (`pruning.py`); of the k' others ⌊(1 − ratio) k'⌋.

The model that a client runs is built from the tensors it has, in whatever shapes they come.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.emulator import ARCHITECTURE, Block, build, submodel, take
from fedtune.models.parts import full_name
from fedtune.models.pruning import fit_attention

Compression = Literal["none", "layer-drop", "hybrid"]


def kept_of(blocks: int, ratio: float) -> int:
    """⌊(1 − ratio) k⌋, exact."""
    return int((1 - Fraction(str(ratio))) * blocks)


def check_drop(blocks: int, ratio: float) -> None:
    """Raises InputError if dropping leaves none of the blocks beside a client's own."""
    if blocks and not kept_of(blocks, ratio):
        most = (blocks - 1) / blocks
        raise InputError(
            f"method.drop_ratio: {ratio:g} of the {blocks} blocks beside a client's own leaves none of them; "
            f"at most {int(most * 100) / 100:g} leaves one"
        )


def check_blocks_go(model: PreTrainedModel) -> None:
    """Raises InputError if blocks are not what they were once others are left out; names the setting.

    Tried are the model without its first block, without its last, and each half of every other block: a block
    at another place, among fewer, and away from its neighbours. What a turn draws is checked once more then.
    """
    blocks = range(len(find_blocks(model).modules))
    if len(blocks) > 1:
        for some in (blocks[1:], blocks[:-1], blocks[::2], blocks[1::2]):
            architecture(model, some)


def choose_blocks(
    blocks: int,
    own: Collection[int],
    updated: Collection[int],
    compression: Compression,
    ratio: float,
    generator: torch.Generator,
) -> dict[int, bool]:
    """The blocks that a client's model has, ascending, and whether each is pruned.

    Args:
        blocks: Blocks of the whole model.
        own: Those that the client trains: never compressed.
        updated: Those that were updated in this cycle.
        compression: See the module's text.
        ratio: Share of the frozen (`hybrid`: of the frozen and not updated) blocks that are dropped.
        generator: Draws which.
    """
    if compression == "none":
        return dict.fromkeys(range(blocks), False)
    pruned = [b for b in updated if b not in own] if compression == "hybrid" else []
    others = [b for b in range(blocks) if b not in own and b not in pruned]
    drawn = torch.randperm(len(others), generator=generator)[: kept_of(len(others), ratio)].tolist()
    chosen = {**dict.fromkeys(own, False), **dict.fromkeys(pruned, True)}
    chosen |= {others[i]: False for i in drawn}
    return dict(sorted(chosen.items()))


def architecture(model: PreTrainedModel, blocks: Sequence[int]) -> Tensor:
    """Class and configuration of the model with these blocks alone, as UTF-8."""
    empty = [Block(block.origin, {}) for block in take(model, blocks)]
    return submodel(model, empty)[ARCHITECTURE]


def assemble(about: Tensor, path: str, parts: Mapping[str, Mapping[str, Tensor]]) -> PreTrainedModel:
    """The model made of these parts, on their own memory, frozen, in eval mode.

    Args:
        about: What `architecture` gave.
        path: Where the list of blocks is.
        parts: Tensors by part, blocks in ascending order; their shapes may be those of pruned blocks.

    Raises:
        InputError: The parts are not those of the architecture.
    """
    tensors = {ARCHITECTURE: about}
    blocks = [part for part in parts if part.isdigit()]
    for part, named in parts.items():
        index = blocks.index(part) if part.isdigit() else 0
        tensors |= {full_name(part, inner, path, index): t for inner, t in named.items()}
    model = build(tensors)
    model.config.use_cache = False  # keys and values of every block would be kept through the step
    for block in find_blocks(model).modules:
        fit_attention(block)
    return model
