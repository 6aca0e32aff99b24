"""A model's tensors by part: its blocks, and what stands before and behind them.

A part is a block, named by its index ("0", "1", ...), or one of `embeddings`, `norm` (all between the last
block and the head), `head` (of a language model, where it is not tied to the embeddings) and `classifier`
(`heads.py`).
What LoRA or a bottleneck adapter adds to a block is a part of its own ("0.added", "1.added", ...). Each
tensor belongs to exactly one part, and is known as "part:name"; a block's names are paths inside the block,
and all are those of the base_model model, whatever PEFT has wrapped around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.bottleneck import ADAPTER_NAME
from fedtune.models.heads import head_modules
from fedtune.models.memory_efficient import base_model
from fedtune.models.tuning import canonical_name

AROUND = ("embeddings", "norm", "head")  # parts that can be trained like blocks
CLASSIFIER = "classifier"
ADDED = ".added"  # behind a block's index


@dataclass(frozen=True)
class ModelParts:
    """A model by part; tensors are the model's own, not copies.

    Attributes:
        path: Where the list of blocks is.
        blocks: How many there are.
        parameters: By part, then by name inside it; tied ones once.
        buffers: The same.
    """

    path: str
    blocks: int
    parameters: Mapping[str, Mapping[str, nn.Parameter]]
    buffers: Mapping[str, Mapping[str, Tensor]]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Parameters and buffers of a part."""
        return {n: t.detach() for n, t in {**self.parameters[part], **self.buffers.get(part, {})}.items()}

    def named(self, parts: Iterable[str]) -> dict[str, nn.Parameter]:
        """Parameters of some parts, by "part:name"."""
        return {f"{part}:{n}": p for part in parts for n, p in self.parameters[part].items()}


def block_of(part: str) -> int | None:
    """The block that a part is, or is added to; None where it stands around the blocks."""
    index = part.removesuffix(ADDED)
    return int(index) if index.isdigit() else None


def named_tensors(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Parameters and buffers under their names in the plain model; of a head that PEFT copied, the copy."""
    parameters = {
        canonical_name(model, n): p for n, p in model.named_parameters() if ".original_module." not in n
    }
    return parameters, {canonical_name(model, n): b for n, b in model.named_buffers()}


def find_parts(model: nn.Module) -> ModelParts:
    """Divides a model, wrapped by PEFT or not. Raises InputError if its blocks are not found."""
    base = base_model(model)
    blocks = find_blocks(base)
    output = base.get_output_embeddings()
    head = next((name for name, module in base.named_modules() if module is output), "") if output else ""
    heads = tuple(f"{path}." for path in head_modules(base))
    parameters: dict[str, dict[str, nn.Parameter]] = {str(i): {} for i in range(len(blocks.modules))}
    buffers: dict[str, dict[str, Tensor]] = {}
    all_parameters, all_buffers = named_tensors(model)
    for name, parameter in all_parameters.items():
        part, inner = _part(name, blocks.path, head, heads)
        parameters.setdefault(part, {})[inner] = parameter
    for name, buffer in all_buffers.items():
        part, inner = _part(name, blocks.path, head, heads)
        parameters.setdefault(part, {})
        buffers.setdefault(part, {})[inner] = buffer
    return ModelParts(blocks.path, len(blocks.modules), parameters, buffers)


def check_around(parts: ModelParts, names: Iterable[str], setting: str) -> None:
    """Raises InputError if the model has no parameters in one of these parts."""
    known = [part for part in AROUND if parts.parameters.get(part)]
    for name in names:
        if name not in known:
            why = "it is tied to the embeddings" if name == "head" else "there is none"
            raise InputError(
                f"{setting}: this model has no part {name!r} of its own ({why}); it has {', '.join(known)}"
            )


def full_name(part: str, inner: str, path: str, index: int) -> str:
    """The name of a part's tensor in a model in which the part, if it is a block, is at `index`."""
    return inner if block_of(part) is None else f"{path}.{index}.{inner}"


def _part(name: str, path: str, head: str, heads: tuple[str, ...]) -> tuple[str, str]:
    if name.startswith(f"{path}."):
        index, _, inner = name.removeprefix(f"{path}.").partition(".")
        added = ".lora_" in inner or inner.startswith(f"{ADAPTER_NAME}.")
        return index + ADDED * added, inner
    if name.startswith(heads):
        return CLASSIFIER, name
    first = name.partition(".")[0]
    if head and first == head.partition(".")[0] and first != path.partition(".")[0]:
        return "head", name
    inside = name.rpartition(".")[0].replace("wte", "embed").replace("wpe", "embed")  # GPT-2's names
    return ("embeddings" if "emb" in inside else "norm"), name
