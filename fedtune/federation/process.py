"""What a run changes in its process, for as long as it lasts."""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from fedtune.config.computing import Computing
from fedtune.errors import InputError

log = logging.getLogger("fedtune")


@contextmanager
def settings_kept() -> Iterator[None]:
    """What libraries change when they are imported or started is as before at the end.

    That is: environment variables, filters of warnings, the hook for uncaught exceptions, and the state of
    Python's own random numbers (a library that the display needs draws one as it is imported).
    """
    environment, hook, numbers = dict(os.environ), sys.excepthook, random.getstate()
    with warnings.catch_warnings():
        try:
            yield
        finally:
            random.setstate(numbers)
            sys.excepthook = hook
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update({n: v for n, v in environment.items() if os.environ.get(n) != v})


@contextmanager
def torch_settings(run: Computing, device: torch.device) -> Iterator[None]:
    """`set_torch` while a run lasts; what the process had before comes back after it."""
    with torch_kept():
        set_torch(run, device)
        yield


@contextmanager
def torch_kept() -> Iterator[None]:
    """What `set_torch` changes is as before at the end."""
    backends = torch.backends
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _filling().fill_uninitialized_memory
    cudnn, attention = (backends.cudnn.deterministic, backends.cudnn.benchmark), _cudnn_attention()
    precisions, old = [each.fp32_precision for each in _precisions()], _old_precision()
    told = {name: os.environ.get(name) for name in _TOLD}
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        _filling().fill_uninitialized_memory = fill
        backends.cudnn.deterministic, backends.cudnn.benchmark = cudnn
        backends.cuda.enable_cudnn_sdp(attention)
        if _old_precision() != old:
            torch.set_float32_matmul_precision(old)
        for each, precision in zip(_precisions(), precisions, strict=True):
            each.fp32_precision = precision
        for name, value in told.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def set_torch(run: Computing, device: torch.device) -> None:
    """Sets this process's PyTorch as `run` says; before anything is computed on a GPU.

    Under `strict` operations that have several forms take the one that gives the same bits each time, and
    those that have none such are refused. PyTorch's fused attention, flash and memory-efficient, then takes a
    backward pass without atomic sums, which it does for no `warn_only`; cuDNN's has none and is left out.
    cuBLAS sums in one order with a workspace of its own, which it has to be told before its first product.
    `fast` takes what is fastest on a GPU. On a CPU both give the same bits: there `fast` only warns of what
    `strict` refuses.

    PyTorch's filling of new tensors with NaN is off in both: it makes a program repeatable that reads memory
    it has not written, which none here does (a test runs every method with it and finds the same bits), and
    costs a pass over each new tensor.

    Args:
        run: The settings.
        device: What is computed on.

    Raises:
        InputError: `strict` on a GPU that this process used before without cuBLAS having been told.
    """
    strict, gpu = run.deterministic == "strict", device.type == "cuda"
    torch.use_deterministic_algorithms(strict or not gpu, warn_only=not strict and not gpu)
    _filling().fill_uninitialized_memory = False
    if not gpu:
        return
    # the old switches: they set what has taken their place too, the new ones leave them contradicting it
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.tf32
    if not strict:
        return
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cuda.enable_cudnn_sdp(False)
    given = os.environ.get(_WORKSPACE)
    if given not in (None, *_IN_ORDER) or (given is None and not told_in_time()):
        how = f"has {given}" if given else f"used a GPU before without {_WORKSPACE}"
        raise InputError(
            f"run.deterministic is strict, and this process {how}: cuBLAS then sums in any order. Start it "
            f"with {_WORKSPACE}={_IN_ORDER[0]} in its environment, or set run.deterministic=fast"
        )
    os.environ.update({_WORKSPACE: given or _IN_ORDER[0], _FLASH: "1"})


def torch_told(run: Computing, device: torch.device) -> dict[str, object]:
    """What `environment.json` says of it: the settings, and which kernels they leave of attention's."""
    attention = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": _cudnn_attention(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    gpu = device.type == "cuda"
    return {
        **run.model_dump(mode="json"),
        **({"attention": [name for name, on in attention.items() if on]} if gpu else {}),
        **({"cublas_workspace": os.environ.get(_WORKSPACE)} if gpu else {}),
    }


_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_IN_ORDER = (":4096:8", ":16:8")  # its values with which cuBLAS sums in one order
_FLASH = "FLASH_ATTENTION_DETERMINISTIC"  # of the package flash-attn, as transformers calls it
_TOLD = (_WORKSPACE, _FLASH)


@cache
def told_in_time() -> bool:
    """Whether cuBLAS had not begun when it was first to be told; from then on it has been."""
    return not torch.cuda.is_initialized()


def _filling() -> Any:
    """PyTorch's switch, which its types do not know."""
    return torch.utils.deterministic


def _cudnn_attention() -> bool:
    return bool(torch.backends.cuda.cudnn_sdp_enabled())


def _precisions() -> tuple[Any, ...]:
    """Where PyTorch keeps how float32 is multiplied, since 2.9."""
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul


def _old_precision() -> str:
    """The same as it was kept before: PyTorch does not say it where it contradicts the new switch."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "high"


@contextmanager
def listened(said: list[str]) -> Iterator[None]:
    """Inside, warnings go to the end of `said`: where the run is shown nobody sees this process's own."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
