"""A model's blocks compiled by PyTorch for training, `method.compile`.

Each block is compiled by itself: blocks that are alike share the code, what is around them (embeddings, the
head with its loss in pieces, hooks of PEFT's prompts) stays as it is, and activations are computed again
around the compiled code. Sizes of a batch are variables of the code, so that batches of all lengths share it.
It is compiled at the first step and kept for as long as the process has it; the processes of clients
(`transport.workers`) live as long as the run, so each compiles once. PyTorch keeps compiled code on disk
too, where a later run finds it.

On a CPU memory is measured by following each operation, a client's first two steps and those with longer
batches (`measure/memory.py`). Those run plain: a client has to take more steps than that to gain by it.

What is computed is what the plain blocks compute, in other orders of sums: in float32 a step's gradients are
alike to 1e-5. Random numbers of dropout are the same ones.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import nn
from torch._inductor import config as inductor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.quantize import quantized_parameters


@contextmanager
def compiled(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, the blocks of a model run compiled; then as they are.

    Args:
        model: Any model of transformers, wrapped by PEFT or not.
        wanted: As `method.compile`.
    """
    if not wanted:
        yield
        return
    blocks = [cast(Any, block) for block in find_blocks(model).modules]
    try:
        for block in blocks:
            if not hasattr(block, _KEPT):
                block.compile(dynamic=True, options={"fallback_random": True})
                setattr(block, _KEPT, partial(_called, block._call_impl, block._compiled_call_impl))
            block._compiled_call_impl = getattr(block, _KEPT)
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def _called(plain: Callable[..., Any], fast: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block's call; plain where operations are followed, of which compiled code shows none."""
    return (plain if is_in_torch_dispatch_mode() else fast)(*args, **kwargs)


def check_compiled(model: nn.Module) -> None:
    """Refuses what cannot be compiled, before a run begins.

    Raises:
        InputError: There is no C++ compiler, or the model is quantised.
    """
    compiler = shlex.split(str(inductor.cpp.cxx[1]))[0]
    if shutil.which(compiler) is None:
        raise InputError(
            f"method.compile needs a C++ compiler, and there is no {compiler} here. Install one (apt install "
            "g++, conda install cxx-compiler), or name another in the environment variable CXX, or set "
            "method.compile to false"
        )
    if quantized_parameters(model):
        raise InputError(
            "method.compile is for weights as they are, and the model's are quantised; set it to false, or "
            "model.quantization to none"
        )


_KEPT = "_compiled_by_fedtune"  # attribute of a block
