"""AdamW whose moments take a byte a weight each.

Dettmers, Lewis, Shleifer and Zettlemoyer, "8-bit Optimizers via Block-wise Quantization" (ICLR 2022). Of a
moment each block of numbers has a scale, the largest magnitude in it, and each number a byte: which of 256
fixed numbers in [−1, 1] is nearest to its share of the scale: the paper's dynamic map (`dynamic_map`),
7 powers of ten, and the more steps between two of them the larger they are. Moments are read, moved and kept
again in float32, a piece of a tensor at a time, so that some hundred megabytes are the most they take then.

Blocks are of 256 numbers, and tensors of less than 4,096 keep float32 moments, as in the authors' library,
bitsandbytes 0.50. The paper's StableEmbedding layer is left out: the models are trained already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # numbers that share a scale
SMALL = 4096  # numbers of a tensor below which its moments stay float32
PIECE = 2**24  # numbers that are in float32 at a time; a multiple of BLOCK


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with decoupled weight decay and moments in 8 bits, over float32 parameters.

    The state of a parameter is `step`; `exp_avg` and `exp_avg_sq`, uint8, one a number, in the order of its
    elements; `exp_avg_scale` and `exp_avg_sq_scale`, float32, one a block. Of a small parameter the moments
    are float32 and there are no scales.

    Args:
        parameters: What is moved.
        lr: The rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second.
        weight_decay: Times the rate and the weight, taken off the weight.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        assert closure is None  # one step from the gradients that are there
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"], count = torch.zeros(()), parameter.numel()
            for name in ("exp_avg", "exp_avg_sq"):
                narrow = count >= SMALL
                state[name] = parameter.new_zeros(count, dtype=torch.uint8 if narrow else torch.float32)
                if narrow:
                    state[f"{name}_scale"] = parameter.new_zeros(-(-count // BLOCK))
        state["step"] += 1
        weights, gradients = parameter.reshape(-1), gradient.reshape(-1)
        for at in range(0, len(weights), PIECE):
            some = slice(at, at + PIECE)
            self._move_piece(weights[some], gradients[some], state, some, group)
        if not parameter.is_contiguous():  # then it was a copy that moved
            parameter.copy_(weights.view(parameter.shape))

    def _move_piece(
        self, weights: Tensor, gradients: Tensor, state: dict[str, Tensor], at: slice, group: dict[str, Any]
    ) -> None:
        """The step of torch.optim.AdamW, operation by operation, on some numbers of a parameter."""
        (beta1, beta2), steps, rate = group["betas"], float(state["step"]), group["lr"]
        first, second = _read(state, "exp_avg", at), _read(state, "exp_avg_sq", at)
        weights.mul_(1 - rate * group["weight_decay"])
        first.lerp_(gradients, 1 - beta1)
        second.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        root = second.sqrt().div_(math.sqrt(1 - beta2**steps)).add_(group["eps"])
        weights.addcdiv_(first, root, value=-rate / (1 - beta1**steps))
        del root
        _write(state, "exp_avg", at, first)
        _write(state, "exp_avg_sq", at, second)


def quantised(numbers: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8, and scales (ceil(n / BLOCK),) of numbers (n,) float32.

    A block that has a number that is infinite or none becomes one without any.

    Args:
        numbers: What is to be kept.
        values: The map, ascending.
    """
    blocks = F.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    between = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(shares, between, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: len(numbers)], scales


def restored(codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """The numbers (n,) that codes and scales stand for."""
    numbers = values.index_select(0, codes.to(torch.int32))
    padded = F.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
    return padded.mul_(scales[:, None]).view(-1)[: len(numbers)]


@cache
def dynamic_map(signed: bool, device: torch.device | None = None) -> Tensor:
    """The paper's map, ascending, (256,) float32.

    Of each power of ten 10⁻⁶ to 10⁰ the range from a tenth of it to all of it is cut into 2ⁱ equal parts
    (2ⁱ⁺¹ without a sign), i from 0 to 6, and the middle of each part is in the map: signed, its negative too.
    The rest of the 256 are 0 and 1.
    """
    found = [0.0, 1.0]
    for i in range(7):
        parts = 2 ** (i + (not signed))
        for k in range(parts):
            middle = 10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / parts)
            found += [middle, -middle] if signed else [middle]
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


def _read(state: dict[str, Tensor], name: str, at: slice) -> Tensor:
    """Some numbers of a moment, float32: where they lie if that is how they are kept."""
    if f"{name}_scale" not in state:
        return state[name][at]
    kept = state[name][at]
    return restored(kept, state[f"{name}_scale"][_blocks(at)], _map(name, kept))


def _write(state: dict[str, Tensor], name: str, at: slice, numbers: Tensor) -> None:
    if f"{name}_scale" in state:
        state[name][at], state[f"{name}_scale"][_blocks(at)] = quantised(numbers, _map(name, numbers))


def _blocks(at: slice) -> slice:
    return slice(at.start // BLOCK, -(-at.stop // BLOCK))


def _map(name: str, like: Tensor) -> Tensor:
    return dynamic_map(name == "exp_avg", like.device)
