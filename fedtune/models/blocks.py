"""Where the blocks (layers) of a decoder or encoder are: the one function every method asks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import InputError


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model, in the order in which they run.

    Attributes:
        path: Where the list is: `model.get_submodule(path) is modules`, for the model that was asked about.
        modules: The list itself, not a copy: assigning to it changes the model.
    """

    path: str
    modules: nn.ModuleList


def find_blocks(model: nn.Module) -> Blocks:
    """Locates the decoder or encoder blocks of any transformer, wrapped by PEFT or not.

    They are the one outermost `nn.ModuleList` that holds parameters. That is true of every family tested
    (Llama, Qwen, Gemma, Mistral, GPT-2, GPT-NeoX, OPT, BLOOM, BERT, RoBERTa) and needs neither a table of
    names nor the configuration's number of layers, which is wrong as soon as blocks have been taken out.

    Raises:
        InputError: There is no such list, or more than one (an encoder-decoder, a model with a vision tower).
    """
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside_another = any(path.startswith(f"{outer}.") for outer in found)
        holds_parameters = next(module.parameters(), None) is not None
        if isinstance(module, nn.ModuleList) and holds_parameters and not inside_another:
            found[path] = module
    if len(found) == 1:
        path, modules = next(iter(found.items()))
        return Blocks(path, modules)
    seen = ", ".join(f"{path} ({len(modules)})" for path, modules in found.items()) or "none"
    children = ", ".join(name for name, _ in model.named_children()) or "none"
    raise InputError(
        f"cannot tell which modules of {type(model).__name__} are its blocks: exactly one outermost list of "
        f"modules is expected, got {seen}; its top-level modules are: {children}. "
        "Use a decoder-only or encoder-only text model."
    )


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of one block by their path inside it, in the order in which they were registered."""
    return {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def out_features(linear: nn.Module) -> int:
    """The width of a linear layer's output, for `nn.Linear` and for GPT-2's transposed `Conv1D`."""
    width = linear.nf if isinstance(linear, Conv1D) else linear.out_features
    assert isinstance(width, int)
    return width
