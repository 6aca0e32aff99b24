"""Bottleneck adapters (Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, sec. 2.1).

Where an adapter sits, one rule for all families: right after each block's feed-forward network and before the
residual connection:

    y = down_proj(...)                    what the feed-forward network gives
    y + up(gelu(down(y)))                 what the residual connection gets

Of an MLP that is right after its last linear layer: `mlp.down_proj` in Llama, Qwen, Gemma and Mistral,
`mlp.c_proj` in GPT-2, `mlp.dense_4h_to_h` in GPT-NeoX and BLOOM, `fc2` in OPT and `output.dense` in BERT and
RoBERTa. Of a mixture of experts (Mixtral, Qwen3-MoE, DeepSeek) it is after the sum over the experts, shared
ones among them.

Deviations: one adapter a block instead of Houlsby's two (the one after attention is left out, as in Pfeiffer
et al. 2021), layer norms stay frozen, and `up` starts at exactly 0 instead of near 0, so that the model with
fresh adapters gives bit for bit what the model without them gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks, find_feed_forward, linear_layers, out_features

ADAPTER_NAME = "bottleneck"


class Bottleneck(nn.Module):
    """One adapter: down to `size`, GELU, up to `width`, added to its input. Its weights are float32."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, size, dtype=torch.float32)
        self.up = nn.Linear(size, width, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps hidden states (batch, tokens, width) to the same shape and dtype; sums in float32."""
        wide = hidden.to(self.down.weight.dtype)
        return (wide + self.up(nn.functional.gelu(self.down(wide)))).to(hidden.dtype)

    def after(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        """The forward hook. A bound method: `copy.deepcopy` of a model binds it to the copied adapter.

        A mixture of experts may give what its router said behind the hidden states; that stays as it is.
        """
        if isinstance(output, tuple):
            return (self.forward(output[0]), *output[1:])
        return self.forward(output)


def insert_bottlenecks(model: PreTrainedModel, size: int) -> None:
    """Puts an adapter into each block of `model`, in place, drawn from torch's CPU generator.

    Each is a submodule `bottleneck` of its block, so its parameters are named
    `<blocks>.<i>.bottleneck.down.weight` and so on, and no other name changes.

    Raises:
        InputError: A block has no feed-forward network, more than one, or one that does not give the model's
            width.
    """
    width = model.config.hidden_size
    blocks = find_blocks(model)
    ends = []
    for index, block in enumerate(blocks.modules):
        try:
            found = find_feed_forward(block)
        except InputError as error:
            raise InputError(f"method.trainable adapter: {error}. Use lora for this model.") from error
        path, end = list(found.linears.items())[-1] if found.linears else (found.path, None)
        if end is not None and out_features(end) != width:
            raise InputError(
                f"method.trainable adapter: the MLP of block {blocks.path}.{index} must end in a linear "
                f"layer of output width {width}, its last linear layer is {path}. Use lora for this model."
            )
        ends.append(end or block.get_submodule(path))
    for block, end in zip(blocks.modules, ends, strict=True):
        adapter = Bottleneck(width, size).to(next(end.parameters()).device)
        block.add_module(ADAPTER_NAME, adapter)
        end.register_forward_hook(adapter.after)


def sits_as_before(model: PreTrainedModel) -> bool:
    """Whether adapters go where version 0.1.0 put them, after the last linear layer of each block."""
    blocks = find_blocks(model).modules
    ends = [(list(find_feed_forward(block).linears), list(linear_layers(block))) for block in blocks]
    return all(new[-1:] == old[-1:] for new, old in ends)


def find_bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    """The adapters in a model by path, empty if it has none."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Bottleneck)}


def remove_bottlenecks(model: nn.Module) -> None:
    """Takes all adapters and their hooks out again, in place; `requires_grad` of the rest stays as it is."""
    for path in find_bottlenecks(model):
        delattr(model.get_submodule(path.rpartition(".")[0]), ADAPTER_NAME)
    for module in model.modules():
        # Hooks are found by what they are bound to, which also works in a copy; a stored handle would not.
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Bottleneck):
                del module._forward_hooks[key]
