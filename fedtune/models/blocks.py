"""Where the blocks (layers) of a decoder or encoder are: the one function every method asks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import InputError

# Names of a block's modules: its feed-forward network, and what mixes tokens.
_FEED_FORWARD = re.compile("mlp|moe|expert|ffn|feed_forward|^ff$")
_MIXING = re.compile("att|mixer|mamba|conv|temporal|ssm|recurrent")


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


@dataclass(frozen=True)
class FeedForward:
    """A block's feed-forward network: an MLP, or a mixture of experts.

    Attributes:
        path: Of the module that is called for it; "" where its layers lie in the block itself (BERT, OPT).
        linears: Its linear layers by their path in the block, the one back to the model's width last; none of
            a mixture of experts, or of anything else that is not linear layers one after another.
    """

    path: str
    linears: dict[str, nn.Module]


def find_feed_forward(block: nn.Module) -> FeedForward:
    """Locates the feed-forward network of a block, by the names that families give it.

    Raises:
        InputError: There is none (Mamba), or more than one beside another, whose sum it would be; names what
            there is.
    """
    weighty = {
        name: module
        for name, module in block.named_children()
        if any(p.ndim > 1 for p in module.parameters())
    }
    named = [name for name in weighty if _FEED_FORWARD.search(name)]
    linears = {path: linear for path, linear in linear_layers(block).items() if not _MIXING.search(path)}
    if len(named) == 1 and not isinstance(weighty[named[0]], nn.ModuleList):
        name = named[0]
        inside = {path: linear for path, linear in linears.items() if f"{path}.".startswith(f"{name}.")}
        return FeedForward(name, inside if _is_dense(weighty[name]) else {})
    flat = all(isinstance(weighty[name], nn.Linear | Conv1D) for name in named)
    others = [module for name, module in weighty.items() if not _MIXING.search(name)]
    if linears and flat and all(map(_is_linear, others)):
        return FeedForward("", linears)
    raise InputError(
        f"cannot tell which module of {type(block).__name__} is its MLP, exactly one is expected; it "
        f"consists of {', '.join(weighty) or 'none'}"
    )


def is_mixing(path: str) -> bool:
    """Whether a layer, by its path inside a block, belongs to what mixes tokens: attention, Mamba.

    Attention may have experts of its own (JetMoE), whose router is not of it.
    """
    return bool(_MIXING.search(path)) and not any(map(_FEED_FORWARD.search, path.split(".")))


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of one block by their path inside it, in the order in which they were registered."""
    return {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def out_features(linear: nn.Module) -> int:
    """The width of a linear layer's output, for `nn.Linear` and for GPT-2's transposed `Conv1D`."""
    width = linear.nf if isinstance(linear, Conv1D) else linear.out_features
    assert isinstance(width, int)
    return width


def _is_linear(module: nn.Module) -> bool:
    """Whether all its matrices are those of linear layers."""
    inside = {
        id(p) for part in module.modules() if isinstance(part, nn.Linear | Conv1D) for p in part.parameters()
    }
    return all(id(p) in inside for p in module.parameters() if p.ndim > 1)


def _is_dense(module: nn.Module) -> bool:
    """Whether it is linear layers one after another, and neither experts nor anything else."""
    lists = any(isinstance(part, nn.ModuleList | nn.ModuleDict) for part in module.modules())
    return not lists and _is_linear(module)
