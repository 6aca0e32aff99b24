"""Copies of parameters on disk: while they are changed where they lie, or in memory's place.

A copy in memory would double a model. Here it is a temporary file, mapped: its pages are file cache, which
the system drops when memory is short and reads again when they are needed.
"""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedtune.errors import InputError

_ALIGNMENT = 64  # bytes


class _Form(NamedTuple):
    """Where a copy begins in its file, and what it is."""

    start: int
    dtype: torch.dtype
    shape: torch.Size
    nbytes: int


class Copies:
    """Parameters written to a file that goes with this and every tensor that was read.

    It has no name from the start where the system can do that, so that it goes with the process however that
    ends. It lies in the system's folder for temporary files, which the environment variable TMPDIR sets. If
    that folder is kept in memory (tmpfs), so are the copies.

    Args:
        parameters: Of any shape, dtype and device, by name.

    Raises:
        InputError: The file cannot be written, for instance for a full disk.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._forms: dict[str, _Form] = {}
        size = 0
        for name, p in parameters.items():
            self._forms[name] = _Form(size, p.dtype, p.shape, p.nbytes)
            size += -(-p.nbytes // _ALIGNMENT) * _ALIGNMENT
        folder = tempfile.gettempdir()
        try:
            # without a buffer, whose rest would be written, and fail once more, on closing
            self._file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115  # closed with self
            weakref.finalize(self, self._file.close)
            for name, parameter in parameters.items():
                self._file.seek(self._forms[name].start)
                rest = _bytes(parameter).numpy().data
                while rest:
                    rest = rest[self._file.write(rest) :]
            # Written first and mapped then: where a mapped page finds no room on disk, the process is killed.
            self._file.truncate(size)  # to a whole unit: the last parameter may end before
        except OSError as error:
            raise InputError(
                f"{folder}: a copy of the weights needs {size:,} bytes there and could not be written "
                f"({error.strerror or error}); free some space, or set TMPDIR to a folder with more"
            ) from error

    def read(self, name: str) -> Tensor:
        """A parameter's values, in the CPU's memory, mapped anew until the tensor goes; only to be read."""
        start, dtype, shape, nbytes = self._forms[name]
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        before = start % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(
            self._file.fileno(), before + nbytes, access=mmap.ACCESS_COPY, offset=start - before
        )
        content = torch.frombuffer(pages, dtype=torch.uint8, count=nbytes, offset=before)
        return content.view(dtype).view(shape)


@contextmanager
def kept_on_disk(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Inside, the parameters may be changed at will; at the end they hold their first values, bit for bit.

    Args:
        parameters: Of any shape, dtype and device, by name.

    Yields:
        The first values by name, in the CPU's memory, to be read only. Whoever rebuilds weights in place
        needs no look at them, and so nothing of them in memory.

    Raises:
        InputError: As `Copies`; no parameter was changed.
    """
    copies = Copies(parameters)
    first_values = {name: copies.read(name) for name in parameters}
    try:
        yield first_values
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(first_values.pop(name))  # its pages go with it


def _bytes(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
