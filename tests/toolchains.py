"""What tests of generated code need of a machine; where it is not there they are skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from fedtune.errors import InputError
from fedtune.evaluation import sandbox
from fedtune.evaluation.compilers import Missing, Toolchain
from fedtune.evaluation.languages import LANGUAGES


def need_namespaces() -> None:
    """Skips where programs cannot be isolated."""
    try:
        sandbox.check("namespaces")
    except InputError as error:
        pytest.skip(f"this system permits no namespaces: {error}")


def toolchains(name: str) -> Iterator[Toolchain]:
    """A language's, for a fixture to yield from; skips where there is none."""
    context: AbstractContextManager[Toolchain] = LANGUAGES[name].toolchain()
    try:
        toolchain = context.__enter__()
    except Missing as why:
        pytest.skip(f"{name}: {why}")
    yield toolchain
    context.__exit__(None, None, None)
