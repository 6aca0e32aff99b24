"""A training step that needs little memory beside weights, gradients and optimiser state.

Logits are left to `lean_loss.py`. What else grows with the batch are the activations of every block from the
first that trains on, of which checkpointing keeps the blocks' inputs and computes the rest again, with the
same random numbers: it changes no bit of the gradients.

The process itself holds more than its tensors, since the C library keeps what they free: `release_memory`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.quantize import weight_count

LARGE = 10**9  # parameters of a model from which on `auto` computes activations again
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE = 2**20  # bytes; of less than that the pages cost more time than they save memory


def base_model(model: nn.Module) -> PreTrainedModel:
    """The model itself, where PEFT has wrapped it."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def can_compute_again(model: nn.Module) -> bool:
    """Whether the family knows how to."""
    return bool(getattr(base_model(model), "supports_gradient_checkpointing", False))


def resolved(model: nn.Module, wanted: int | str) -> int | str:
    """`method.gradient_checkpointing`; of `auto` its meaning: `full` of a large model that can, or `none`."""
    if wanted != "auto":
        return wanted
    large = weight_count(base_model(model)) >= LARGE
    return "full" if large and can_compute_again(model) else "none"


def check_computed_again(model: nn.Module, wanted: int | str) -> list[nn.Module]:
    """The blocks of which each N-th is computed again, where `method.gradient_checkpointing` is N.

    Raises:
        InputError: The family cannot do what is wanted.
    """
    base, can, wanted = base_model(model), can_compute_again(model), resolved(model, wanted)
    if wanted == "none":
        return []
    blocks: list[nn.Module] = list(find_blocks(base).modules) if can and wanted != "full" else []
    if not can or not all(hasattr(block, "gradient_checkpointing") for block in blocks):
        raise InputError(
            f"method.gradient_checkpointing: {type(base).__name__} has none, got {wanted}; "
            f"set it to {'full or ' if can else ''}none"
        )
    return blocks


@contextmanager
def memory_efficient(model: nn.Module, *, checkpointing: int | str) -> Iterator[None]:
    """`computed_again`, in a process that gives memory back to the system."""
    release_memory()
    with computed_again(model, checkpointing):
        yield


@contextmanager
def computed_again(model: nn.Module, wanted: int | str) -> Iterator[None]:
    """Inside, the backward pass of blocks computes their activations again; then all is as before.

    Args:
        model: Any model of transformers, wrapped by PEFT or not.
        wanted: As `method.gradient_checkpointing`: none, full, auto or N (each N-th block).

    Raises:
        InputError: The family cannot do that.
    """
    base, wanted = base_model(model), resolved(model, wanted)
    blocks = check_computed_again(model, wanted)
    if wanted == "none":
        yield
        return
    try:
        _checkpointing(base, "enable")({"use_reentrant": False})
        base.disable_input_require_grads()  # else frozen blocks before the first that trains have a graph
        for place, block in enumerate(blocks):
            cast(Any, block).gradient_checkpointing = place % int(wanted) == 0
        yield
    finally:
        _checkpointing(base, "disable")()


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
