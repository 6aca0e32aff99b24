"""Floating-point operations of PyTorch code: a multiplication with its addition counts as two.

The formulas are those of torch.utils.flop_counter, by operation. What is added here is the attention kernel
of CPUs, which that table lacks, so that its products would not be counted on a machine without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

_aten = torch.ops.aten
CPU_ATTENTION: dict[Any, Any] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
"""As `custom_mapping` of torch's own FlopCounterMode."""
_FORMULAS = {**flop_registry, **CPU_ATTENTION}


def flops_of(op: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Operations of one call; 0 for what is not counted (elementwise work, norms, softmax, look-ups).

    Args:
        op: The overload that was called, for instance `aten.mm.default`.
        args: Its arguments.
        kwargs: Its keyword arguments.
        out: What it gave.
    """
    formula = _FORMULAS.get(op._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


class FlopCounter(TorchDispatchMode):
    """Counts the operations of what runs inside.

    Attributes:
        forward: Outside of a backward pass.
        backward: In one, what gradient checkpointing computes again among it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = 0
        self.backward = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `op` and counts it; PyTorch calls this for each operation."""
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        count = flops_of(op, args, kwargs, out)
        if torch._C._current_graph_task_id() == -1:
            self.forward += count
        else:
            self.backward += count
        return out
