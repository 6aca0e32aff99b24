"""Peak memory of a client's or the server's step, measured and not estimated.

The process's resident set also holds the interpreter, the libraries and every other simulated client, and a
GPU's allocator whatever else lies there: another role's model, for instance. So the live bytes of the tensors
that a step works with are followed: a dispatch mode sees the inputs and outputs of every operation, forward
and backward, and a weak reference tells when a storage goes. A storage counts once, however many views it
has, from the first operation that touches it (or from the start, if it is among the residents) until it is
freed. Where there is a GPU, what lies there and what lies on the host are counted apart.

Not seen: scratch space that a kernel takes and gives back inside one operation, what an allocator rounds up
and keeps, and memory that is not a tensor's.

A role needs on a GPU what it needs on a CPU: its peak is the larger of what it had there and on the host,
where it may keep the same model meanwhile (models/at_work.py).
"""

from __future__ import annotations

import errno
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

COLUMNS = ("device_bytes", "host_bytes")
Peaks = Sequence[int]  # bytes on the GPU, on the host
Resident = Module | Optimizer | Tensor | Mapping[Any, Any]


class MemoryMeter:
    """Peak memory over the steps of one scope, for instance one client's local training.

        meter = MemoryMeter(device)
        for batch in batches:
            with meter.step(batch["input_ids"].numel(), [model, optimizer]):
                ...  # forward, backward, optimizer step
        meter.peak_bytes

    Following every operation of a step costs time, so only the steps that can set a new peak are
    followed: the first (no gradients or optimizer state yet), the second, and any that is larger than all
    since the second. Of those, one that is like an earlier one is not followed again, but has its peak,
    unless an operation of that one gave as many numbers as its inputs' values said (a router of experts).
    Measuring changes no bit of what is computed. A step that raises is counted up to there.

    Args:
        device: Whose bytes are counted, beside the host's.
        beside: What is in memory in every step, as `step` takes it.
        known: Peaks of steps by a hash of what they depend on, shared by the meters of one run; this one
            adds its own. None: each step is followed for itself.
        about: What the memory of all steps of this meter depends on beside what a step is given.

    Attributes:
        peak_bytes: The largest number of bytes so far, with a GPU there or on the host; 0 before the first
            step.
        by_device: With a GPU the largest number there ("device_bytes") and on the host ("host_bytes"); else
            empty.
        how: How it was measured.
    """

    how = "live tensor bytes"

    def __init__(
        self,
        device: torch.device | str,
        beside: Sequence[Resident] = (),
        *,
        known: dict[int, Peaks] | None = None,
        about: Hashable = (),
    ) -> None:
        self.device = torch.device(device)
        self.beside = beside
        self._known, self._about = known, about
        self.peak_bytes = 0
        self.by_device = {} if self.device.type == "cpu" else dict.fromkeys(COLUMNS, 0)
        self._steps = 0
        self._largest = 0

    def step(
        self, size: int, resident: Sequence[Resident] = (), *, like: Hashable = None
    ) -> AbstractContextManager[None]:
        """One whole training step: all its micro-batches and the optimizer's step.

        Args:
            size: Elements of the (largest micro-)batch, padding included: what the step's memory grows with.
            resident: What is in memory when the step begins: modules (with buffers and gradients), optimizers
                (with state), tensors, and mappings of them (nested, lists too). Anything else counts once an
                operation touches it.
            like: What the memory of the step depends on beside the shapes of the residents: those of its
                batches. None: it is followed, whatever was before.

        Raises:
            RuntimeError: When another measured scope is open.
        """
        _refuse_nesting()
        # The first step's size does not count as seen: there was no optimizer state beside it yet.
        follow = self._steps == 0 or size > self._largest
        if self._steps > 0:
            self._largest = max(self._largest, size)
        self._steps += 1
        first_or_second = None if like is None else (min(self._steps, 3), like)
        return self.whole(resident, like=first_or_second) if follow else nullcontext()

    @contextmanager
    def whole(self, resident: Iterable[Resident] = (), *, like: Hashable = None) -> Iterator[None]:
        """Follows everything inside, for instance the server's aggregation. Otherwise as `step`."""
        _refuse_nesting()
        held = [*self.beside, *resident]
        known = self._known if like is not None else None
        key = 0 if known is None else hash((self._about, like, *_shapes(held)))
        if known is not None and key in known:
            self._rise(known[key])
            yield
            return
        scope = _LiveBytes(self.device, held)
        token = _open_scope.set(scope)
        try:
            with scope:
                yield
        finally:
            _open_scope.reset(token)
            scope.close()
            self._rise(scope.peaks)
        if known is not None and not scope.by_value:
            known[key] = scope.peaks

    def _rise(self, peaks: Peaks) -> None:
        self.peak_bytes = max(self.peak_bytes, *peaks)
        for column, peak in zip(self.by_device, peaks, strict=False):
            self.by_device[column] = max(self.by_device[column], peak)


@contextmanager
def paused() -> Iterator[None]:
    """Leaves what happens inside out of the open scope, if there is one, and lets another scope be opened.

    For a server that pulls replies from clients of its own process: their steps are not its memory. What
    comes out of them counts for the server from the operation that first uses it. What is freed inside is
    subtracted all the same.
    """
    scope = _open_scope.get()
    if scope is None:
        yield
        return
    token = _open_scope.set(None)
    scope.pause()
    try:
        yield
    finally:
        scope.resume()
        _open_scope.reset(token)


class _StorageRef(weakref.ref[torch.UntypedStorage]):
    """A weak reference that knows what it stood for after the storage is gone."""

    __slots__ = ("host", "key", "nbytes")

    key: int
    nbytes: int
    host: bool

    def __new__(cls, storage: torch.UntypedStorage, freed: Callable[[Any], None]) -> _StorageRef:
        ref = super().__new__(cls, storage, freed)
        ref.key = storage._cdata
        ref.nbytes = storage.nbytes()
        return ref


class _LiveBytes(TorchDispatchMode):
    """Follows storages of a device and of the host, each by its address, which is unique while it lives."""

    def __init__(self, device: torch.device, resident: Iterable[Resident]) -> None:
        super().__init__()
        self.device_type = device.type
        self.live = [0, 0]  # bytes on the GPU, on the host
        self.peaks = [0, 0]
        self.by_value = False  # whether values, and not shapes alone, decide what is in memory
        self._refs: dict[int, _StorageRef] = {}
        for tensor in _resident_tensors(resident):
            self._follow(tensor)
        self._rise()

    def close(self) -> None:  # not __exit__: the mode is entered again inside a composite operation
        self._refs.clear()  # storages freed from here on are no longer this scope's business

    def pause(self) -> None:  # off the stack of modes: one that only looks away would slow every operation
        self.__exit__(None, None, None)

    def resume(self) -> None:
        self.__enter__()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._follow(args)
        if kwargs:
            self._follow(list(kwargs.values()))
        if torch.is_inference_mode_enabled() and _is_composite(op, self.device_type):
            # Under inference mode it arrives whole; its parts, and their temporaries, must be seen.
            with self:
                return op.decompose(*args, **kwargs)
        self.by_value = self.by_value or _is_by_value(op)
        result = op(*args, **kwargs)
        self._follow(result)  # inputs are still alive here, as they were inside the operation
        self._rise()
        return result

    def _rise(self) -> None:
        for place, live in enumerate(self.live):
            if live > self.peaks[place]:
                self.peaks[place] = live

    def _follow(self, value: Any) -> None:
        if isinstance(value, Tensor):
            try:
                storage = value.untyped_storage()
            except NotImplementedError:  # a sparse tensor has no storage of its own
                if value.layout == torch.sparse_coo:
                    self._follow([value._indices(), value._values()])
                return
            ref = self._refs.get(storage._cdata)
            if ref is None:
                if value.device.type in ("cpu", self.device_type):
                    ref = _StorageRef(storage, self._freed)
                    ref.host = value.device.type == "cpu"
                    self._refs[ref.key] = ref
                    self.live[ref.host] += ref.nbytes
            elif ref.nbytes != storage.nbytes():  # resized in place
                self.live[ref.host] += storage.nbytes() - ref.nbytes
                ref.nbytes = storage.nbytes()
        elif isinstance(value, (list, tuple)):
            for item in value:
                self._follow(item)

    def _freed(self, ref: _StorageRef) -> None:
        del self._refs[ref.key]
        self.live[ref.host] -= ref.nbytes


_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(said in text for said in _NO_MEMORY)


_open_scope: ContextVar[_LiveBytes | None] = ContextVar("open_scope", default=None)
_composite: dict[tuple[Any, str], bool] = {}
_by_value: dict[Any, bool] = {}


def _refuse_nesting() -> None:
    if _open_scope.get() is not None:
        raise RuntimeError("measured scopes cannot be nested: close the outer one, or pause it with paused()")


def _is_composite(op: Any, device_type: str) -> bool:
    """Whether `op` is made of other operations on this device, so that running those is the same thing."""
    key = (op, device_type)
    if key not in _composite:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        own = has(op.name(), device_type.upper())
        _composite[key] = has(op.name(), "CompositeImplicitAutograd") and not own
    return _composite[key]


def _shapes(things: Iterable[Resident]) -> Iterator[Hashable]:
    """What a step's memory depends on of what is there when it begins."""
    for thing in things:
        if isinstance(thing, Module):
            yield thing.training
        for tensor in _resident_tensors([thing]):
            yield tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _is_by_value(op: Any) -> bool:
    """Whether the size of an operation's output depends on values that no one has told of.

    Picking by a mask is left out: how many labels of a batch carry loss is told (`like`).
    """
    if op not in _by_value:
        _by_value[op] = torch.Tag.dynamic_output_shape in op.tags and op is not torch.ops.aten.index.Tensor
    return _by_value[op]


def _resident_tensors(things: Iterable[Any]) -> Iterator[Tensor]:
    for thing in things:
        if not isinstance(thing, (Module, Optimizer, Tensor, Mapping)):
            kind = type(thing).__name__
            raise TypeError(f"resident must list modules, optimizers, tensors or mappings, got {kind}")
        yield from _tensors(thing)


def _tensors(thing: Any) -> Iterator[Tensor]:
    """Every tensor in it, with its gradient; a storage may come several times."""
    if isinstance(thing, Tensor):
        yield thing
        if thing.is_leaf and thing.grad is not None:
            yield thing.grad
    elif isinstance(thing, Module):
        for tensor in (*thing.parameters(), *thing.buffers()):
            yield from _tensors(tensor)
    elif isinstance(thing, Optimizer):
        yield from _tensors([group["params"] for group in thing.param_groups])
        yield from _tensors(thing.state)
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from _tensors(value)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from _tensors(value)
