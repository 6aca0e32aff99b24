"""Peak memory by part: which of the bytes that a step holds at its peak are weights, gradients and so on.

It counts as `fedtune.measure.memory` counts live tensor bytes, so that what is planned is what a run on a CPU
measures; but it also knows what each storage is.

* weights: parameters and buffers of the model.
* gradients: of parameters, and of their float32 masters.
* optimizer: its moments, and the float32 masters of narrower weights.
* activations: what operations of the forward and the backward pass give.
* other: everything else, for instance the batch, or on a server the sums and what arrives.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from fedtune.measure.flops import flops_of
from fedtune.measure.memory import MemoryMeter, Resident

PARTS = ("weights", "gradients", "optimizer", "activations", "other")


class PartsMeter(MemoryMeter):
    """A meter that also tells the parts of its peak, and counts operations of the scopes that it follows.

    Args:
        made: The part of what operations give that turns out to be neither a gradient nor optimizer state.
        held: The part of resident tensors that belong to no module or optimizer.
        beside: What is in memory in every step.
        repeats: Another such step follows each. What one leaves behind (an optimizer's state) is there when
            the next begins, so the peak is found without running that.

    Attributes:
        parts: Bytes by part at the peak.
        forward, backward: Floating-point operations of the first scope.
        on_gpu: The peak on a GPU, where it is another; else 0.
    """

    def __init__(
        self,
        made: str = "activations",
        held: str = "other",
        *,
        repeats: bool = False,
        beside: Sequence[Resident] = (),
    ) -> None:
        super().__init__("cpu", beside)
        self._made, self._held, self._repeats = made, held, repeats
        self.parts = dict.fromkeys(PARTS, 0)
        self.forward = self.backward = self.on_gpu = 0
        self._scopes = 0
        self._open: _Scope | None = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens inside, until an operation of the open scope uses what came of it."""
        assert self._open is not None
        self._open.off = True
        try:
            yield
        finally:
            self._open.off = False

    def highest(self, other: PartsMeter) -> None:
        """Takes over another meter's peak where that is higher."""
        if other.peak_bytes > self.peak_bytes:
            self.peak_bytes, self.parts = other.peak_bytes, other.parts

    @contextmanager
    def whole(self, resident: Iterable[Resident] = (), *, like: Hashable = None) -> Iterator[None]:
        """Follows everything inside. A resident mapping whose keys are parts says what is in it."""
        self._open = scope = _Scope([*self.beside, *resident], self._made, self._held)
        try:
            with scope:
                yield
        finally:
            scope.close(self._repeats)
            self._open = None
        if self._scopes == 0:
            self.forward, self.backward = scope.forward, scope.backward
        self._scopes += 1
        if scope.peak > self.peak_bytes:
            self.peak_bytes, self.parts = scope.peak, scope.parts


class _Scope(TorchDispatchMode):
    """Follows the storages of real and fake tensors, each with its part."""

    def __init__(self, resident: list[Resident], made: str, held: str) -> None:
        super().__init__()
        self._made, self._held = made, held
        self._now = made  # the part of what the next operation gives
        self._live = dict.fromkeys(PARTS, 0)
        self._total = 0
        self.peak, self.parts = 0, dict(self._live)
        self.forward = self.backward = 0
        self._known: dict[int, _Known] = {}
        self._hooks: list[Any] = []
        self.off = False
        for thing in resident:
            self._take(thing)
        self._rise()
        self._before: tuple[int, dict[str, int]] | None = None  # the peak before the optimizer's step

    def close(self, repeats: bool) -> None:
        """Ends it; with `repeats` the peak is that of a step after this one."""
        for hook in self._hooks:
            hook.remove()
        left = dict.fromkeys(PARTS, 0)
        for known in self._known.values():
            left[known.part] += known.nbytes if known.made else 0
        self._known.clear()
        peak, parts = self._before or (self.peak, self.parts)
        if repeats and peak + sum(left.values()) > self.peak:
            self.peak = peak + sum(left.values())
            self.parts = {part: parts[part] + left[part] for part in PARTS}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.off or op is torch.ops.prim.device.default:
            return op(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, nn.Parameter) and not value.requires_grad:
                self._follow(value, "weights", change=True)  # also one that was not there from the start
            else:
                self._follow(value, self._held)
        out = op(*args, **kwargs)
        part = self._now
        if op is torch.ops.aten._to_copy.default and self._part(args[0]) == "gradients":
            part = "gradients"  # a float32 copy of a narrower gradient, for the master
        self._follow(out, part, made=True)
        self._rise()
        count = flops_of(op, args, kwargs, out)
        if torch._C._current_graph_task_id() == -1:
            self.forward += count
        else:
            self.backward += count
        return out

    def _rise(self) -> None:
        if self._total > self.peak:
            self.peak, self.parts = self._total, dict(self._live)

    def _take(self, thing: Any) -> None:
        """What is in memory from the start."""
        if isinstance(thing, nn.Module):
            for parameter in thing.parameters():
                self._follow(parameter, "weights")
                self._follow_gradient(parameter)
                if parameter.requires_grad and parameter.is_leaf:
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(self._follow_gradient))
            for buffer in thing.buffers():
                self._follow(buffer, "weights")
        elif isinstance(thing, Optimizer):
            for group in thing.param_groups:
                for master in group["params"]:
                    self._follow(master, "optimizer")
                    self._follow_gradient(master)
            self._take_all(thing.state, "optimizer")
            self._hooks.append(thing.register_step_pre_hook(self._stepping))
            self._hooks.append(thing.register_step_post_hook(self._stepped))
        else:
            self._take_all(thing, self._held)

    def _take_all(self, thing: Any, part: str) -> None:
        if isinstance(thing, Mapping):
            for key, value in thing.items():
                self._take_all(value, key if key in PARTS else part)
        elif isinstance(thing, (list, tuple)):
            for value in thing:
                self._take_all(value, part)
        else:
            self._follow(thing, part)
            if isinstance(thing, Tensor):
                self._follow_gradient(thing)

    def _stepping(self, *_: Any) -> None:
        self._now = "optimizer"
        if self._before is None:
            self._before = self.peak, self.parts

    def _stepped(self, *_: Any) -> None:
        self._now = self._made

    def _follow_gradient(self, parameter: Tensor) -> None:
        gradient = parameter.grad if parameter.is_leaf else None
        if gradient is not None:
            self._follow(gradient, "gradients", change=True)

    def _part(self, tensor: Tensor) -> str:
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known.part if known else ""

    def _follow(self, value: Any, part: str, *, change: bool = False, made: bool = False) -> None:
        if isinstance(value, Tensor):
            if not isinstance(value, FakeTensor) and value.device.type == "meta":
                return  # a skeleton that nothing computes with, or in the place of weights on disk
            storage = value.untyped_storage()
            known = self._known.get(storage._cdata)
            if known is None:
                known = _Known(storage, part, self._freed)
                known.made = made
                self._known[known.key] = known
                self._add(part, known.nbytes)
            elif known.nbytes != storage.nbytes():  # resized in place
                self._add(known.part, storage.nbytes() - known.nbytes)
                known.nbytes = storage.nbytes()
            if change and known.part != part:
                self._add(known.part, -known.nbytes)
                self._add(part, known.nbytes)
                known.part = part
        elif isinstance(value, (list, tuple)):
            for item in value:
                self._follow(item, part, change=change, made=made)

    def _add(self, part: str, count: int) -> None:
        self._live[part] += count
        self._total += count

    def _freed(self, known: Any) -> None:
        if self._known.pop(known.key, None) is not None:
            self._add(known.part, -known.nbytes)


class _Known(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage that knows what it stands for after it is gone."""

    __slots__ = ("key", "made", "nbytes", "part")

    key: int
    nbytes: int
    part: str
    made: bool  # inside the scope

    def __new__(cls, storage: torch.UntypedStorage, part: str, freed: Callable[[Any], None]) -> _Known:
        known = super().__new__(cls, storage, freed)
        known.key, known.nbytes, known.part = storage._cdata, storage.nbytes(), part
        return known

    def __init__(self, storage: torch.UntypedStorage, part: str, freed: Callable[[Any], None]) -> None:
        super().__init__(storage, freed)  # type: ignore[call-arg]  # a weak reference's takes them
