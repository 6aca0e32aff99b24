"""bitsandbytes imported without what it does on the side, whoever imports it (PEFT does, if it is there).

As it is imported it asks torch.compile to wrap four functions, which costs seconds and, where one is called,
gives other bits on machines with a compiler than on others. And where a processor has AVX-512 for bfloat16 it
fetches a compiled kernel from the hub and runs it, if the package `kernels` is there, or complains on the
terminal if it is not.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME, FETCHES = "bitsandbytes", "kernels"


def guard() -> None:
    """From here on bitsandbytes is imported so; a process that has imported it already keeps what it has."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the package where the others do, and puts a loader around its own."""

    _looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != NAME or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, own: Any) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._own.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        with _without_side_effects():
            self._own.exec_module(module)


@contextmanager
def _without_side_effects() -> Iterator[None]:
    import torch  # whoever imports bitsandbytes has it

    log, compiles, fetches = logging.getLogger(NAME), torch.compile, sys.modules.get(FETCHES)
    level = log.level
    log.setLevel(logging.ERROR)
    torch.compile = _as_it_is  # type: ignore[assignment]
    sys.modules[FETCHES] = None  # type: ignore[assignment]  # "not to be had", in the language of imports
    try:
        yield
    finally:
        log.setLevel(level)
        torch.compile = compiles
        if fetches is None:
            del sys.modules[FETCHES]
        else:
            sys.modules[FETCHES] = fetches


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Stands in for torch.compile, with and without arguments."""
    return function if function is not None else lambda wrapped: wrapped
