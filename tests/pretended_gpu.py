"""A pretended GPU: values on the CPU, CUDA's rules about devices, and a count of what is slow on a GPU.

    with PretendedGpu() as gpu:
        model.to("cuda")        # torch.cuda.is_available() is true in here
        ...
    gpu.stops("step_loss.py")   # how often that file waited for the device

A tensor of it is an `OnGpu`. Python sees the device cuda:0; C++ sees PyTorch's free backend, whose operations
all come to `_operate`; what is computed is computed on the tensor's `host`, by the CPU's kernels, so that a
result has the bits that the same operations have on a CPU.

What a GPU refuses is refused, with a `DeviceError`: operations on tensors of two devices, a generator of
another device, NumPy and memory views of a device's tensor, a kernel of ours that is given memory of the
other side. With a `limit` allocations beyond it raise torch.OutOfMemoryError. Memory is counted as a caching
allocator hands it out: a storage's bytes, rounded up to 512.

Not pretended: streams, more than one device, kernels' rounding, the device's own random numbers.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar
from unittest import mock

import torch
import torch._dynamo  # reads torch.cuda when it is imported, and must not find what is put there
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import fedtune
from fedtune.zeroth import fast, gpu

BACKEND = "pretended"  # what the free backend is called in this process
CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")
ROUNDED = 512  # bytes: PyTorch's allocator hands out multiples
HOME = str(Path(fedtune.__file__).parent)

_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
# The host cannot go on before it knows a value, or how many there are.
_WAITS = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten._unique2.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.repeat_interleave.Tensor,
}
# CPUs and CUDA have kernels for these; a backend without is given their parts, which round otherwise.
_WHOLE = ("silu_backward", "mish_backward")
_KERNELS = torch.library.Library("aten", "IMPL")
_INDEXED = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


class DeviceError(RuntimeError):
    """What CUDA would have refused."""


class OnGpu(Tensor):
    """A tensor on the pretended GPU.

    Attributes:
        host: Where its values are: a plain tensor of the same shape and steps.
    """

    host: Tensor
    __module__ = "torch.pretended"  # parameters of other packages are taken for quantised ones

    @staticmethod
    def __new__(cls, host: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=f"{BACKEND}:0",
        )
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _operate(op, args, kwargs or {})

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        found: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return found

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, OnGpu):
            raise DeviceError(
                "incompatible tensor type: .data of a tensor on cuda:0 was given one on the cpu"
            )
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.host = other.host

    def numpy(self, **_: Any) -> Any:
        raise DeviceError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def cuda(self, *_: Any, **__: Any) -> OnGpu:
        return self

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied: Any = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        found: Tensor = memo[id(self)]
        return found

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    def __tensor_flatten__(
        self,
    ) -> tuple[list[str], None]:  # with it Module.to keeps parameters what they are
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], *_: Any) -> OnGpu:
        return OnGpu(inner["host"])


class PretendedGpu(TorchDispatchMode):
    """The device, for as long as it is entered; one at a time, and entered around all that uses it.

    Args:
        limit: Bytes that it has; 0: as many as are asked for.

    Attributes:
        counts: How often, by kind and place. Kinds: "to the device" and "to the host" (copies), "stop" (the
        host
            waits until the device has done all it was given), "float64" (operations on numbers that a GPU is
            slow with), "launch" (any operation that is not a view), "kernel" (of ours). A place is a file,
            line and function of fedtune.
        bytes: Of the copies, likewise.
        allocated: Bytes in use.
        peak: The most since `torch.cuda.reset_peak_memory_stats`.
    """

    current: ClassVar[PretendedGpu | None] = None

    def __init__(self, limit: int = 0) -> None:
        super().__init__()
        if torch._C._get_privateuse1_backend_name() != BACKEND:
            _setup_privateuseone_for_python_backend(BACKEND, _Backend())
            for name in _WHOLE:
                _KERNELS.impl(name, partial(_never, name), "PrivateUse1")
        self.limit = limit
        self.counts: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.allocated = self.peak = 0
        self._storages: dict[int, Any] = {}
        self._depth = 0
        self._stack = ExitStack()
        self._thread = threading.get_ident()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _operate(op, args, kwargs or {})

    def __enter__(self) -> PretendedGpu:
        self._depth += 1
        if self._depth > 1:  # PyTorch enters a mode again inside its own
            super().__enter__()
            return self
        assert PretendedGpu.current is None, "another pretended GPU is open"
        self._thread, self._stack = threading.get_ident(), ExitStack()
        for name, instead in self._cuda().items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, instead))
        told = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # as where `strict` runs follow one another
        self._stack.enter_context(mock.patch.dict(os.environ, told))
        self._stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda self: self))
        self._stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        self._stack.enter_context(mock.patch.object(gpu, "Update", _Update))
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        swapped = torch.__future__.get_swap_module_params_on_conversion()
        self._stack.callback(torch.__future__.set_swap_module_params_on_conversion, swapped)
        torch.__future__.set_swap_module_params_on_conversion(True)  # they stay the same objects, as on CUDA
        PretendedGpu.current = self
        self._stack.enter_context(_Calls())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            self._stack.close()
            PretendedGpu.current = None

    def _cuda(self) -> dict[str, Callable[..., Any]]:
        def reset(*_: Any) -> None:
            self.peak = self.allocated

        def nothing(*_: Any, **__: Any) -> None:
            pass

        return {
            **dict.fromkeys(("_lazy_init", "init", "empty_cache", "manual_seed", "manual_seed_all"), nothing),
            **dict.fromkeys(("set_rng_state", "set_device", "ipc_collect"), nothing),
            **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), lambda *_: True),
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "device": lambda *_: nullcontext(),
            "get_device_name": lambda *_: "a pretended GPU",
            "get_device_capability": lambda *_: (9, 0),
            "is_current_stream_capturing": lambda: False,
            "get_rng_state": lambda *_: torch.empty(0, dtype=torch.uint8),
            "synchronize": lambda *_: self.count("stop"),
            "memory_allocated": lambda *_: self.allocated,
            "max_memory_allocated": lambda *_: self.peak,
            "reset_peak_memory_stats": reset,
            "mem_get_info": lambda *_: (self.limit - self.allocated, self.limit),
        }

    def count(self, kind: str, bytes: int = 0) -> None:
        """Enters something at the line of fedtune that is running."""
        key = kind, self._place()
        self.counts[key] += 1
        self.bytes[key] += bytes

    def of(self, kind: str, place: str = "") -> int:
        """How often something of a kind happened at places whose names have `place` in them."""
        return sum(n for (other, where), n in self.counts.items() if other == kind and place in where)

    def stops(self, place: str = "") -> int:
        """How often the host waited for the device there."""
        return self.of("stop", place)

    def forget(self) -> None:
        """Counts from here on."""
        self.counts.clear()
        self.bytes.clear()

    def report(self, *kinds: str) -> str:
        """A line for each kind and place, the most frequent first."""
        found = [
            f"{kind:14} {n:7,} times {self.bytes[kind, place]:12,} bytes  {place}"
            for (kind, place), n in sorted(self.counts.items(), key=lambda pair: (pair[0][0], -pair[1]))
            if not kinds or kind in kinds
        ]
        return "\n".join(found)

    def wrap(self, host: Tensor) -> OnGpu:
        """A tensor of this device, of which `host` has the values; its storage counts once.

        Raises:
            torch.OutOfMemoryError: It is beyond the limit.
        """
        storage = host.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = -(-storage.nbytes() // ROUNDED) * ROUNDED
            if self.limit and self.allocated + size > self.limit:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size:,} bytes. The pretended GPU has "
                    f"{self.limit:,}, of which {self.limit - self.allocated:,} are free"
                )
            self._storages[key] = weakref.ref(storage, partial(self._freed, key, size))
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        return OnGpu(host)

    def _freed(self, key: int, size: int, _: Any) -> None:
        self._storages.pop(key, None)
        self.allocated -= size

    def _place(self) -> str:
        """The innermost line of fedtune; of the thread that waits, where the backward pass has its own."""
        frame: FrameType | None = sys._getframe(1)
        found = _of_fedtune(frame)
        if found is None and threading.get_ident() != self._thread:
            found = _of_fedtune(sys._current_frames().get(self._thread))
        if found is None:
            return "elsewhere"
        file = found.f_code.co_filename.removeprefix(HOME).lstrip("/")
        return f"{file}:{found.f_lineno} {found.f_code.co_name}"


def _never(name: str, *_: Any) -> None:
    """That there is a kernel is enough: every operation comes to `_operate` before."""
    raise AssertionError(name)


def _of_fedtune(frame: FrameType | None) -> FrameType | None:
    """The first frame of fedtune from here outwards that is not of a mode which looks on."""
    while frame is not None and (
        not frame.f_code.co_filename.startswith(HOME) or frame.f_code.co_name == "__torch_dispatch__"
    ):
        frame = frame.f_back
    return frame


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_each(item, change) for item in value])
    return value


def _host(tensor: Tensor) -> Tensor:
    return tensor.host if isinstance(tensor, OnGpu) else tensor


def _operate(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation: refused, or counted, done on the host's memory, and given to its device."""
    leaves = [*_tensors(args), *_tensors(list(kwargs.values()))]
    there = [tensor for tensor in leaves if isinstance(tensor, OnGpu)]
    asked = kwargs.get("device")
    on_gpu = bool(there) if asked is None else asked.type in ("cuda", BACKEND)
    if not there and not on_gpu:
        return op(*args, **kwargs)
    device = PretendedGpu.current
    if device is None:
        raise DeviceError(f"{op}: a tensor of a pretended GPU is used after that was closed")
    if there and op not in _COPIES:
        _refuse_mixed(op, args, leaves)
    plain = {name: _each(value, _host) for name, value in kwargs.items()}
    if asked is not None:
        plain["device"] = HOST
    _count(device, op, args, kwargs, leaves, on_gpu)
    out = op(*_each(args, _host), **plain)
    if not on_gpu:
        return out
    if op is _aten.copy_.default and not isinstance(args[0], OnGpu):
        return args[0]
    wrapped = _each(out, device.wrap)
    if not there or not (op.is_view or op._schema.is_mutable):  # a new tensor, with memory of its own
        return wrapped
    return return_and_correct_aliasing(op, args, kwargs, wrapped)


def _refuse_mixed(op: Any, args: tuple[Any, ...], leaves: list[Tensor]) -> None:
    if op in _INDEXED:  # the host's indices are fetched
        if not isinstance(args[0], OnGpu):
            raise DeviceError(
                f"{op}: indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        leaves = [args[0], *_tensors(args[2:])]
    # a number may lie on either side
    if any(t.ndim and not isinstance(t, OnGpu) and t.device.type == "cpu" for t in leaves):
        raise DeviceError(
            f"{op}: Expected all tensors to be on the same device, but found at least two devices, "
            "cuda:0 and cpu!"
        )


def _count(
    device: PretendedGpu, op: Any, args: Any, kwargs: dict[str, Any], leaves: list[Tensor], on_gpu: bool
) -> None:
    if op in _COPIES:
        source = leaves[-1]
        to_gpu = isinstance(leaves[0], OnGpu) if op is _aten.copy_.default else on_gpu
        if isinstance(source, OnGpu) != to_gpu:
            device.count("to the device" if to_gpu else "to the host", source.nbytes)
            waits = kwargs.get(
                "non_blocking", args[2] if op is _aten.copy_.default and len(args) > 2 else False
            )
            if not waits:
                device.count("stop")
            return
    masks = op in _INDEXED and any(isinstance(t, OnGpu) and t.dtype == torch.bool for t in _tensors(args[1]))
    fetched = op in _INDEXED and any(not isinstance(t, OnGpu) for t in _tensors(args[1]))
    if fetched:  # the host's indices
        device.count("to the device", sum(t.nbytes for t in _tensors(args[1]) if not isinstance(t, OnGpu)))
    if op in _WAITS or masks or fetched:
        device.count("stop")
    if not op.is_view:
        device.count("launch")
        if any(t.dtype == torch.float64 and t.ndim for t in leaves if isinstance(t, OnGpu)):
            device.count("float64")


class _Calls(TorchFunctionMode):
    """Python's calls: "cuda" is the free backend there, and a generator has to be of the tensors' device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:  # whoever asks for "cuda" is told so
            return func(*args, **kwargs)
        kwargs = {name: _backend(value) for name, value in kwargs.items()}
        args = tuple(_backend(value) for value in args)
        generator = kwargs.get("generator")
        if generator is not None:
            asked = kwargs.get("device")
            there = any(isinstance(tensor, OnGpu) for tensor in _tensors(args))
            where = "cuda" if there or (asked is not None and torch.device(asked).type == BACKEND) else "cpu"
            if generator.device.type != where:
                raise DeviceError(
                    f"{func}: Expected a '{where}' device type for generator but found "
                    f"'{generator.device.type}'"
                )
        return func(*args, **kwargs)


def _backend(value: Any) -> Any:
    if (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value in ("cuda", "cuda:0")
    ):
        return torch.device(BACKEND, 0)
    return value


class _Generator(torch.Generator):
    """A generator that says which device it is for; its numbers are a CPU's."""

    _of: torch.device

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu")
        made._of = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._of


class _Update(gpu.Update):
    """What our kernels write, by the CPU's, which write the same bits (test_zeroth_triton.py)."""

    def __init__(self, pool: Any, a: object) -> None:
        super().__init__(pool, a)
        self._host = fast.Update(pool, a)

    def jobs(self, w: Tensor, w0: Tensor, name: str, *, first: int = 0) -> list[fast.Job]:
        launches = super().jobs(w, w0, name, first=first)  # its checks, its upload
        jobs = self._host.jobs(_host(w.detach()), _host(w0.detach()), name, first=first)
        for launch in launches:
            for argument in launch.args[2]:  # type: ignore[attr-defined]  # functools.partial
                if isinstance(argument, Tensor) and not isinstance(argument, OnGpu):
                    raise DeviceError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        return [partial(self._launched, jobs)] if launches else []

    def _launched(self, jobs: list[fast.Job]) -> None:
        device = PretendedGpu.current
        assert device is not None, "a kernel is launched after its device was closed"
        device.count("kernel")
        with torch.utils._python_dispatch._disable_current_modes():
            for job in jobs:
                job()


class _Backend:
    """What PyTorch asks of a backend's module."""

    is_initialized = staticmethod(lambda: True)
    is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda *_: torch.empty(0, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda *_: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    device = staticmethod(lambda *_: nullcontext())
