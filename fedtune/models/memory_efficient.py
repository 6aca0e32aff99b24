"""A training step that needs little memory beside weights, gradients and optimiser state.

Three things take it otherwise. Keys and values, which a model caches where nobody says no. The activations
of every block from the first that trains on, of which checkpointing keeps the blocks' inputs and computes
the rest again. And the logits, one number a token and word, of which the usual loss makes three copies: here
there is one, which its own gradient overwrites. None of it changes a bit of the gradients.

The process itself holds more than its tensors, since the C library keeps what they free: `release_memory`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from fedtune.data.encoded import IGNORED
from fedtune.errors import InputError

ELEMENTS = 2**20  # logits in float32 at a time
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE = 2**20  # bytes; of less than that the pages cost more time than they save memory


def base_model(model: nn.Module) -> PreTrainedModel:
    """The model itself, where PEFT has wrapped it."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


@contextmanager
def memory_efficient(model: nn.Module, *, checkpointing: bool) -> Iterator[None]:
    """Inside, `model(..., labels=...).loss` and its backward pass need less memory; then all is as before.

    Args:
        model: Any model of transformers, wrapped by PEFT or not.
        checkpointing: Compute activations again in the backward pass, block by block.

    Raises:
        InputError: The family cannot do that.
    """
    base = base_model(model)
    cached = getattr(base.config, "use_cache", None)
    base.config.use_cache = False
    causal = base.loss_function is ForCausalLMLoss
    if causal:
        base.loss_function = causal_loss
    release_memory()
    try:
        if checkpointing:
            if not base.supports_gradient_checkpointing:
                raise InputError(
                    f"method.gradient_checkpointing: {type(base).__name__} has none; set it to false"
                )
            _checkpointing(base, "enable")({"use_reentrant": False})
            base.disable_input_require_grads()  # else frozen blocks before the first that trains have a graph
        yield
    finally:
        if checkpointing and base.supports_gradient_checkpointing:
            _checkpointing(base, "disable")()
        if causal:
            del base._loss_function
        base.config.use_cache = cached


def _checkpointing(base: PreTrainedModel, what: str) -> Callable[..., None]:
    """The method by its name since transformers 5.23, where the old one warns, or by that of 5.20 to 5.22."""
    new = getattr(base, f"activation_checkpointing_{what}", None)
    return cast(Callable[..., None], new or getattr(base, f"gradient_checkpointing_{what}"))


def release_memory() -> None:
    """Has glibc give large pieces of memory back to the system: what is free now, and what will be.

    Its own threshold follows the largest piece that was ever freed, up to 32 MB. What is below goes to a heap
    in which the pieces of a step seldom fit where those of the one before were: with one block of GPT-2 small
    the process held 1.6 times its tensors. The threshold is the process's, and stays.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):  # else it is not glibc
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)
        libc.malloc_trim(0)


def causal_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """Mean cross-entropy of each token given those before it: the loss of transformers, with its gradients.

    Args:
        logits: (batch, tokens, vocabulary), of any dtype; the backward pass overwrites them.
        labels: (batch, tokens), not shifted; IGNORED where no loss is taken.
        vocab_size: The vocabulary.
    """
    targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1).to(logits.device)
    loss: Tensor = _CrossEntropy.apply(logits.view(-1, vocab_size), targets)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy in float32, a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        total = torch.zeros((), device=logits.device)
        for rows in _chunks(logits):
            total += _sum(logits[rows].float(), targets[rows])
        return total / (targets != IGNORED).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        count = (targets != IGNORED).sum()
        for rows in _chunks(logits):
            some = logits[rows].detach().float().requires_grad_()
            with torch.enable_grad():
                loss = _sum(some, targets[rows]) / count
            (gradient,) = torch.autograd.grad(loss, some)
            logits[rows] = (gradient * slope).to(logits.dtype)
        return logits, None


def _sum(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def _chunks(logits: Tensor) -> Iterator[slice]:
    size = max(1, ELEMENTS // logits.shape[1])
    return (slice(at, at + size) for at in range(0, len(logits), size))
