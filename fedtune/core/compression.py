"""What clients send up, in fewer bytes: the largest numbers of each tensor, in fewer bits.

    x_t     = update + e_t                  with error feedback; e_1 = 0           `Compression.compress`
    sent    = C(x_t)
    e_t+1   = x_t − C(x_t)                  kept by the client until its next round

C keeps the share `top_k` of a tensor's numbers that are largest in size, and rounds them by chance, without
bias (rounding.py). Choosing the largest is biased: what it leaves out is lost, or with error feedback comes
later. Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory" (2018), Algorithm 1; Karimireddy et al.,
"Error Feedback Fixes SignSGD and other Gradient Compression Schemes" (2019), Algorithm 2.

A tensor `x` travels as

    x          its numbers: float32, bfloat16, int8, or two int4 a byte, the first in the lower half
    scale:x    of int8 and int4: float32, one for each `GROUP` numbers
    places:x   with `top_k`: which numbers they are: a bit each, the first the lowest, or int32 places, in
               order; whichever is smaller

How large that is depends on the tensor's shape alone, so that a plan knows it. A tensor that would not get
smaller travels as it is.

Deviation: the number of examples that a client weighs is not in e: it is the same in each round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedtune.core.robust import UpdateMethod
from fedtune.core.rounding import from_levels, groups, stochastically, to_levels
from fedtune.core.types import ERROR, TensorSpec
from fedtune.core.wire import FrameError

WireDtype = Literal["float32", "bfloat16", "int8", "int4"]
SCALE, PLACES = "scale:", "places:"  # prefixes on the wire beside the tensors' own names

_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
_LEVELS = {"int8": 127, "int4": 7}
_HELD = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}

Specs = Mapping[str, TensorSpec]
Tensors = Mapping[str, Tensor]


@runtime_checkable
class CompressedMethod(UpdateMethod, Protocol):
    """A method whose clients send updates of weights, which can be rounded."""

    def compression_refusal(self, *, sparse: bool, feedback: bool) -> str | None:
        """Why updates cannot travel without most of their numbers, or with what an earlier one lost."""


@dataclass(frozen=True)
class Compression:
    """How the updates of one run travel; both ends of the wire have the same.

    Attributes:
        method: Says which tensors of a reply are updates; others travel as they are.
        dtype: Of an update's numbers, where that is narrower than their own.
        top_k: The share of a tensor's numbers that travels; None: all.
        error_feedback: Whether a client keeps what its update lost, and adds it to the next one.
    """

    method: UpdateMethod
    dtype: WireDtype
    top_k: float | None
    error_feedback: bool

    def expects(self, specs: Specs) -> dict[str, TensorSpec]:
        """What a reply has to hold, of what the method's order says."""
        found: dict[str, TensorSpec] = {}
        for name, spec in specs.items():
            found |= self._parts(name, spec) if self._smaller(name, spec) else {name: spec}
        return found

    def restored(self, specs: Specs) -> dict[str, TensorSpec]:
        """What the method gets of it: updates are float32 again."""
        return {
            name: replace(spec, dtype=torch.float32) if self._smaller(name, spec) else spec
            for name, spec in specs.items()
        }

    def compress(
        self, tensors: Tensors, errors: Tensors, generator: Callable[[str], torch.Generator]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A reply's tensors as they travel, and what the client keeps of them.

        Args:
            tensors: What the method's step gave.
            errors: What the client kept from its last round, by name; of tensors without, 0.
            generator: Chance, a stream for each tensor by its name.

        Returns:
            The tensors that `expects` names, and with error feedback the errors from now on, float32.
        """
        sent: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
            if not self._smaller(name, spec):
                sent[name] = tensor
                continue
            whole = tensor.to(torch.float32)
            if name in errors:
                whole = whole + errors[name]
            parts, arrives = self._compressed(name, whole.reshape(-1), generator(name))
            sent |= parts
            if self.error_feedback:
                kept[name] = whole - arrives.view(whole.shape)
        return sent, kept

    def restore(self, tensors: Tensors, specs: Specs) -> dict[str, Tensor]:
        """A reply's tensors for the method, from those that travelled and passed the check of `expects`.

        Args:
            tensors: By name.
            specs: What the method's order says.

        Raises:
            FrameError: Places are none of the tensor, or not as many as there are numbers.
        """
        return {
            name: self._whole(name, spec, tensors) if self._smaller(name, spec) else tensors[name]
            for name, spec in specs.items()
        }

    def empty_errors(self, specs: Specs, empty: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Tensors as large as what a client keeps, made by `empty(shape, dtype)`."""
        if not self.error_feedback:
            return {}
        return {
            ERROR + name: empty(spec.shape, torch.float32)
            for name, spec in specs.items()
            if self._smaller(name, spec)
        }

    def _compressed(
        self, name: str, flat: Tensor, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """A tensor's parts, and what `_whole` makes of them, in one dimension."""
        parts: dict[str, Tensor] = {}
        count, kept, places = len(flat), self._kept(len(flat)), None
        if self.top_k is not None:
            places = flat.abs().topk(kept, sorted=False).indices.sort().values
            flat = flat[places]
            parts[PLACES + name] = _as_bits(places, count) if _bits_are_less(count, kept) else places.int()
        if self.dtype == "bfloat16":
            flat = stochastically(flat, torch.bfloat16, generator)
        parts[name] = flat
        if self.dtype in _LEVELS:
            flat, parts[SCALE + name] = to_levels(flat, _LEVELS[self.dtype], generator)
            parts[name] = _packed(flat) if self.dtype == "int4" else flat
            flat = from_levels(flat, parts[SCALE + name])
        return parts, _spread(flat.to(torch.float32), places, count)

    def _whole(self, name: str, spec: TensorSpec, parts: Tensors) -> Tensor:
        """A tensor in its shape, float32, from its parts."""
        shape = _shape(spec)
        count, flat = math.prod(shape), parts[name]
        if self.dtype == "int4":
            flat = _unpacked(flat, self._kept(count))
        if self.dtype in _LEVELS:
            flat = from_levels(flat, parts[SCALE + name])
        places = None
        if self.top_k is not None:
            places = _places(name, parts[PLACES + name], count, len(flat))
        return _spread(flat.to(torch.float32), places, count).view(shape)

    def _parts(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        count = math.prod(_shape(spec))
        kept = self._kept(count)
        numbers = -(-kept // 2) if self.dtype == "int4" else kept
        least = -_LEVELS["int8"] if self.dtype == "int8" else spec.at_least
        limit = math.inf if self.dtype in _LEVELS else spec.limit
        parts = {name: TensorSpec(_HELD[self.dtype], (numbers,), limit, least)}
        if self.dtype in _LEVELS:
            parts[SCALE + name] = TensorSpec(torch.float32, (groups(kept),), spec.limit, 0.0)
        if self.top_k is not None:
            bits = _bits_are_less(count, kept)
            dtype, length = (torch.uint8, -(-count // 8)) if bits else (torch.int32, kept)
            parts[PLACES + name] = TensorSpec(dtype, (length,))
        return parts

    def _smaller(self, name: str, spec: TensorSpec) -> bool:
        """Whether a tensor is an update that has fewer bytes in parts than as it is."""
        if not spec.dtype.is_floating_point or not self.method.updates().belongs(name):
            return False
        if self.top_k is None and spec.dtype.itemsize * 8 <= _BITS[self.dtype]:
            return False
        parts = self._parts(name, spec).values()
        size = sum(math.prod(_shape(part)) * part.dtype.itemsize for part in parts)
        return size < math.prod(_shape(spec)) * spec.dtype.itemsize

    def _kept(self, count: int) -> int:
        return count if self.top_k is None else math.ceil(self.top_k * count)


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    assert None not in spec.shape, "no method leaves a dimension open"
    return tuple(n for n in spec.shape if n is not None)


def _bits_are_less(count: int, kept: int) -> bool:
    return -(-count // 8) <= 4 * kept


def _spread(flat: Tensor, places: Tensor | None, count: int) -> Tensor:
    """Numbers at their places among zeros; as they are where they are all."""
    return flat if places is None else flat.new_zeros(count).index_copy_(0, places, flat)


def _as_bits(places: Tensor, count: int) -> Tensor:
    """uint8, a bit a number, set at these places."""
    flags = places.new_zeros(-(-count // 8) * 8, dtype=torch.uint8).index_fill_(0, places, 1)
    return (flags.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def _places(name: str, sent: Tensor, count: int, kept: int) -> Tensor:
    """The places, int64 in order. Raises FrameError unless they are `kept` different ones below `count`."""
    if sent.dtype == torch.uint8:
        flags = (sent[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        sent = flags.view(-1).nonzero().view(-1)
    places = sent.to(torch.int64)
    in_order = bool((places[1:] > places[:-1]).all())
    if len(places) != kept or not in_order or (kept and not 0 <= int(places[0]) <= int(places[-1]) < count):
        raise FrameError(f"the places of {name} are not {kept:,} different ones of {count:,}, in order")
    return places


def _packed(whole: Tensor) -> Tensor:
    """Numbers from −7 to 7, int8, as two a byte: 8 more than each, the first in the lower half."""
    raised = nn.functional.pad(whole + 8, (0, len(whole) % 2), value=8).to(torch.uint8).view(-1, 2)
    return raised[:, 0] | (raised[:, 1] << 4)


def _unpacked(packed: Tensor, count: int) -> Tensor:
    both = torch.stack([packed & 15, packed >> 4], dim=1).view(-1)[:count]
    return both.to(torch.int8) - 8
