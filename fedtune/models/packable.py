"""Whether a model keeps the examples of a row apart, tried on the model itself.

A row of several examples has one number a token that says where an example begins: its position. transformers
makes a mask of those for most families, in which each token sees its own example alone. Families that take no
positions, make a mask of their own, or carry a state from token to token do not; nothing says which they are,
so a row of seven tokens is computed and looked at.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedtune.data.batches import collate, on_device
from fedtune.data.encoded import Encoded
from fedtune.data.packing import joined
from fedtune.errors import InputError
from fedtune.models.lean_loss import outputs

PARTS = (3, 3, 1)  # tokens of the examples; with one of padding they fit into the shortest row there can be


def check_packable(model: PreTrainedModel) -> None:
    """Tries a row of three examples on the model. Its parameters, mode and random streams stay as they are.

    What other examples could do to the numbers of one is a derivative, which a masked token makes exactly 0
    in any dtype. That positions begin anew shows in the numbers themselves, up to rounding.

    Args:
        model: A causal model, where it will be computed, before anything is attached to it.

    Raises:
        InputError: Examples of a row see each other, or are not what they are alone.
    """
    refused = _refusal(model)
    if refused:
        raise InputError(
            f"data.batching: packed does not go with {type(model).__name__}: {refused}. "
            "Set data.batching: length-grouped"
        )


def _refusal(model: PreTrainedModel) -> str:
    """What is wrong with rows of several examples; empty: nothing."""
    body: Any = inspect.unwrap(type(model.get_decoder()).forward)
    if "position_ids" not in inspect.signature(body).parameters:
        return "it is given no positions, by which it could tell the examples of a row apart"
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (sum(PARTS),), generator=torch.Generator().manual_seed(0)).split(PARTS)
    examples = [Encoded(tuple(part.tolist()), tuple(part.tolist())) for part in ids]
    begun, training = model.device, model.training
    model.eval()
    try:
        return _compared(model, examples, begun)
    finally:
        model.train(training)


def _compared(model: PreTrainedModel, examples: list[Encoded], device: torch.device) -> str:
    seen: list[Tensor] = []

    def embedded(module: Any, args: Any, out: Tensor) -> Tensor:
        seen.append(out.detach().requires_grad_())
        return seen[-1].clone()  # some families scale it in place

    row = joined(examples)
    batch = collate([row, Encoded(row.input_ids + row.input_ids[:1], row.labels + row.labels[:1], (8,))], 0)
    batch = on_device({key: value for key, value in batch.items() if key != "labels"}, device)
    handle = model.get_input_embeddings().register_forward_hook(embedded)
    try:
        with torch.enable_grad():
            out = outputs(model, batch)
    finally:
        handle.remove()
    if getattr(out, "aux_loss", None) is not None:
        return "its loss has a part that is of a batch as a whole (a router's), in which padding would count"
    alone = torch.cat([_logits(model, example, device) for example in examples])
    wide = torch.promote_types(alone.dtype, torch.float32)
    logits = out.logits[0, : len(alone)]
    ends = [sum(PARTS[: at + 1]) for at in range(len(PARTS))]
    for end, part in zip(ends, PARTS, strict=True):
        own = slice(end - part, end)
        (slope,) = torch.autograd.grad(logits[own].to(wide).square().sum(), seen, retain_graph=True)
        slope[0, own] = 0
        if slope.any():
            return "the examples of a row would see each other"
    off = float((logits.detach().to(wide) - alone.to(wide)).abs().max())
    rounding = max(torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    if not off <= rounding * float(alone.abs().max()):
        return "an example in a row is not what it is alone"
    return ""


def _logits(model: PreTrainedModel, example: Encoded, device: torch.device) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([example.input_ids], device=device)).logits
        return logits[0]
