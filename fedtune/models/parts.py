"""A model's tensors by part: its blocks, and what stands before and behind them.

A part is a block, named by its index ("0", "1", ...), or one of `embeddings`, `norm` (all between the last
block and the head), `head` (of a language model, where it is not tied to the embeddings) and `classifier`.
Each tensor belongs to exactly one, and is known as "part:name"; a block's names are paths inside the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.tuning import HEAD_NAMES

AROUND = ("embeddings", "norm", "head")  # parts that can be trained like blocks
CLASSIFIER = "classifier"


@dataclass(frozen=True)
class Parts:
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


def find_parts(model: PreTrainedModel) -> Parts:
    """Divides a model. Raises InputError if its blocks are not found."""
    blocks = find_blocks(model)
    output = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is output), "") if output else ""
    parameters: dict[str, dict[str, nn.Parameter]] = {str(i): {} for i in range(len(blocks.modules))}
    buffers: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        part, inner = _part(name, blocks.path, head)
        parameters.setdefault(part, {})[inner] = parameter
    for name, buffer in model.named_buffers():
        part, inner = _part(name, blocks.path, head)
        parameters.setdefault(part, {})
        buffers.setdefault(part, {})[inner] = buffer
    return Parts(blocks.path, len(blocks.modules), parameters, buffers)


def check_around(parts: Parts, names: Iterable[str], setting: str) -> None:
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
    return f"{path}.{index}.{inner}" if part.isdigit() else inner


def _part(name: str, path: str, head: str) -> tuple[str, str]:
    if name.startswith(f"{path}."):
        index, _, inner = name.removeprefix(f"{path}.").partition(".")
        return index, inner
    first = name.partition(".")[0]
    if first in HEAD_NAMES:
        return CLASSIFIER, name
    if head and first == head.partition(".")[0] and first != path.partition(".")[0]:
        return "head", name
    inside = name.rpartition(".")[0].replace("wte", "embed").replace("wpe", "embed")  # GPT-2's names
    return ("embeddings" if "emb" in inside else "norm"), name
