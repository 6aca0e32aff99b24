"""What FedBiOT's server holds: the model, the adapter's LoRA on it, the emulator and its teacher.

LoRA factors travel under the place of their block among the adapter's or the emulator's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.methods.fedavg.lora_aggregation import A, B
from fedtune.models.alignment import Teacher
from fedtune.models.blocks import find_blocks
from fedtune.models.emulator import Block, Cut, build, submodel
from fedtune.models.pruning import pad_mlp
from fedtune.models.tuning import canonical_name

ADAPTER, EMULATOR = "adapter.", "emulator."  # prefixes of LoRA factors on the wire, before the block's number


@dataclass
class Server:
    """The models on the server; all share the base model's memory.

    Attributes:
        base: The model as it was loaded.
        full: With the adapter's LoRA: AdapFu.
        places: Which blocks are the adapter's.
        parts: Blocks before the emulator, of the emulator, and behind it.
        attach: Puts LoRA on some blocks of a model.
        scaling: alpha / rank.
        room: Bytes that the teacher may keep.
        pruned: Whether the emulator's blocks have fewer channels than the model's.
    """

    base: PreTrainedModel
    full: nn.Module
    places: Cut
    parts: tuple[list[Block], list[Block], list[Block]]
    attach: Callable[[nn.Module, Sequence[int]], nn.Module]
    scaling: float
    room: int
    pruned: bool
    emulated: nn.Module | None = None
    asked: Teacher | None = None

    def emulate(self, merged: Mapping[str, Tensor]) -> nn.Module:
        """AdapEmu, with LoRA on the emulator too; made when it is first needed."""
        if self.emulated is None:  # pruned blocks in whole shapes, which transformers can save and load
            model = build(self.client_tensors(merged, padded=True))
            self.emulated = self.attach(model, range(len(find_blocks(model).modules)))
        return self.emulated

    def client_tensors(self, merged: Mapping[str, Tensor], *, padded: bool = False) -> dict[str, Tensor]:
        """What a client gets to hold: embeddings, adapter, emulator with `merged` in it, norm and head."""
        front, emulator, back = self.parts
        blocks = [self._merged(k, block, merged) for k, block in enumerate(emulator)]
        if padded and self.pruned:
            whole = find_blocks(self.full).modules
            blocks = [Block(b.origin, pad_mlp(whole[b.origin], b.tensors)) for b in blocks]
        return submodel(self.base, [*front, *blocks, *back])

    def emulator_factors(self) -> dict[str, nn.Parameter]:
        """The emulator's LoRA."""
        assert self.emulated is not None
        first = len(self.parts[0])
        return factors(self.emulated, range(first, first + len(self.parts[1])), EMULATOR)

    def teacher(self) -> Teacher:
        """AdapFu as teacher, with the blocks behind E* also on their own."""
        if self.asked is None:
            behind = find_blocks(self.full).modules[self.places.back[0]]
            alone = build(submodel(self.base, self.parts[2]))
            tail = self.attach(alone, range(len(self.parts[2]))).eval()
            self.asked = Teacher(self.full.eval(), tail, behind, find_blocks(tail).modules[0], self.room)
        return self.asked

    def tail_factors(self) -> dict[str, nn.Parameter]:
        """The LoRA in the teacher's tail, by the names of those blocks in the adapter."""
        blocks = range(len(self.places.back))
        return factors(self.teacher().tail, blocks, ADAPTER, first=len(self.places.front))

    def _merged(self, k: int, block: Block, lora: Mapping[str, Tensor]) -> Block:
        """A block of the emulator with s B A added to its weights, in float32, rounded once."""
        tensors = dict(block.tensors)
        module = find_blocks(self.full).modules[block.origin]
        for name, a in lora.items():
            if name.startswith(f"{EMULATOR}{k}.") and name.endswith(A):
                path = name.removeprefix(f"{EMULATOR}{k}.").removesuffix(A)
                weight = tensors[f"{path}.weight"]
                delta = self.scaling * (lora[partner(name)].to(weight.device) @ a.to(weight.device))
                if isinstance(module.get_submodule(path), Conv1D):
                    delta = delta.T
                tensors[f"{path}.weight"] = (weight.float() + delta).to(weight.dtype)
        return Block(block.origin, tensors)


def factors(
    model: nn.Module, blocks: Iterable[int], prefix: str, *, first: int = 0
) -> dict[str, nn.Parameter]:
    """The LoRA factors of some blocks, by prefix, place among those blocks, and path inside the block.

    Args:
        model: With LoRA attached.
        blocks: Indices of blocks of `model`.
        prefix: What the names begin with.
        first: The place of the first of them.
    """
    path = find_blocks(model).path
    named = {canonical_name(model, name): parameter for name, parameter in model.named_parameters()}
    inner = canonical_name(model, f"{path}.")
    found = {}
    for k, index in enumerate(blocks, first):
        start = f"{inner}{index}."
        for name, parameter in named.items():
            if name.startswith(start) and name.endswith((A, B)):
                found[f"{prefix}{k}.{name.removeprefix(start)}"] = parameter
    return found


def partner(name: str) -> str:
    """The name of B for that of A."""
    return name.removesuffix(A) + B


def copied(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Their values on the CPU; on the meta device, where costs are planned, there are none."""
    return {
        name: p.detach() if p.is_meta else p.detach().to("cpu", torch.float32, copy=True)
        for name, p in parameters.items()
    }
