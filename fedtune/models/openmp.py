"""Python work on PyTorch's own threads.

PyTorch's OpenMP threads wait for the next operation by spinning, so threads of our own would share the cores
with them. Inside a parallel region of the same OpenMP library they are the workers themselves, and an
operation of PyTorch that one of them calls runs in that thread alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def team(work: Callable[[], None], threads: int) -> None:
    """Calls `work` in up to `threads` threads at once, in this one at least, and waits for all of them.

    Whoever writes `work` must let the threads take its pieces from something shared, for instance an iterator
    over a list: there may be fewer of them, and where PyTorch has no such library only this one.

    Raises:
        BaseException: Whatever `work` raised first.
    """
    region = parallel_region() if threads > 1 else None
    if region is None:
        work()
        return
    inference = torch.is_inference_mode_enabled()
    raised: list[BaseException] = []

    def body(_: object) -> None:
        try:
            # a thread has its own modes; what an inference tensor is written in must be the same
            with torch.inference_mode(inference), torch.no_grad():
                work()
        except BaseException as error:
            raised.append(error)

    region(_BODY(body), None, threads, 0)
    if raised:
        raise raised[0]


@cache
def parallel_region() -> Callable[..., Any] | None:
    """GOMP_parallel(body, data, threads, flags) of the library that PyTorch is linked to, if it has one."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            region = ctypes.CDLL(str(library)).GOMP_parallel  # looked up in what the library depends on, too
        except (OSError, AttributeError):  # another system's OpenMP, or none
            continue
        region.argtypes = (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        region.restype = None
        return region
    return None
