"""A copy of parameters on disk, for as long as they are changed where they lie.

A copy in memory would double a model. Here it is a temporary file, mapped: its pages are file cache, which
the system drops when memory is short and reads again when they are needed.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedtune.errors import InputError

_ALIGNMENT = 64  # bytes


@contextmanager
def kept_on_disk(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Inside, the parameters may be changed at will; at the end they hold their first values, bit for bit.

    The file has no name from the start where the system can do that, so that it goes with the process however
    that ends. It lies in the system's folder for temporary files, which the environment variable TMPDIR
    sets. If that folder is kept in memory (tmpfs), so is the copy.

    Args:
        parameters: Of any shape, dtype and device, by name.

    Yields:
        The first values by name, in the CPU's memory, to be read only. Whoever rebuilds weights in place
        needs no look at them, and so nothing of them in memory.

    Raises:
        InputError: The file cannot be written, for instance for a full disk; no parameter was changed.
    """
    starts, size = {}, 0
    for name, parameter in parameters.items():
        starts[name] = size
        size += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
    content = _written(parameters, starts, size) if size else torch.empty(0, dtype=torch.uint8)
    first_values = {
        name: content[starts[name] : starts[name] + p.nbytes].view(p.dtype).view(p.shape)
        for name, p in parameters.items()
    }
    try:
        yield first_values
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(first_values[name])


def _written(parameters: Mapping[str, nn.Parameter], starts: Mapping[str, int], size: int) -> Tensor:
    """The file's `size` bytes as a tensor; the mapping and the file go with the last view of it."""
    folder = tempfile.gettempdir()
    try:
        # without a buffer, whose rest would be written, and fail once more, on closing
        with tempfile.TemporaryFile(buffering=0, dir=folder) as file:
            for name, parameter in parameters.items():
                file.seek(starts[name])
                rest = _bytes(parameter).numpy().data
                while rest:
                    rest = rest[file.write(rest) :]
            file.truncate(size)  # to a whole unit: the last parameter may end before
            # Written first and mapped then: where a mapped page finds no room on disk, the process is killed.
            return torch.frombuffer(
                mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), dtype=torch.uint8
            )
    except OSError as error:
        raise InputError(
            f"{folder}: a copy of the weights needs {size:,} bytes there and could not be written "
            f"({error.strerror or error}); free some space, or set TMPDIR to a folder with more"
        ) from error


def _bytes(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
