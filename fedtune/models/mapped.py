"""Weights that several processes of this machine hold once: mapped from a file, whose pages they share.

A safetensors file whose dtype is the wanted one is mapped by whoever loads it. Weights that are converted, or
drawn from a seed, are in memory; they are written to a file once, and mapped from there.

What is read of a map stays in the process's memory until the system needs it, or `unread` lets go of it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedtune.errors import InputError, system_error
from fedtune.models.folders import WEIGHTS

ABOUT = "about.json"


@dataclass(frozen=True)
class Known:
    """What the process that loaded a model first says of its weights.

    Attributes:
        sha256: Their digest.
        drawn: Paths of a classifier's modules that were drawn.
        written: Whether they are in the folder; else they are mapped from the model's own files.
    """

    sha256: str
    drawn: tuple[str, ...]
    written: bool


def known(folder: Path | None) -> Known | None:
    """What is said in a folder; None before anything is."""
    if folder is None or not (folder / ABOUT).is_file():
        return None
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    return Known(about["sha256"], tuple(about["drawn"]), about["written"])


def share(model: nn.Module, folder: Path, sha256: str, drawn: list[str]) -> None:
    """Makes a model's weights ones that are mapped from a file, bit for bit, and says so in a folder.

    Args:
        model: On the CPU.
        folder: An empty one.
        sha256, drawn: As in `Known`.

    Raises:
        InputError: The file cannot be written, for instance for a full disk.
    """
    written = not _mapped(model)
    if written:
        tensors, seen = {}, set[int]()
        for name, tensor in model.state_dict().items():  # tied weights once, under their first name
            if tensor.data_ptr() not in seen or not tensor.numel():
                tensors[name] = tensor.contiguous()
                seen.add(tensor.data_ptr())
        try:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            # asked for beside weights; who maps them generates nothing
            (folder / "generation_config.json").write_text("{}", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{folder}: the weights that all processes are to share could not be written: "
                f"{system_error(error)} Or set TMPDIR to a folder with more room, or transport.workers=1."
            ) from error
        del tensors
        adopt(model, folder)
    about = Known(sha256, tuple(drawn), written)
    (folder / ABOUT).write_text(json.dumps(asdict(about)), encoding="utf-8")


def adopt(model: nn.Module, folder: Path) -> None:
    """Maps a model's parameters from the file that `share` wrote of the same model."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        there = set(file.keys())
        for name, parameter in model.named_parameters():
            if name in there:
                parameter.data = file.get_tensor(name)


def unread(tensors: Iterable[Tensor]) -> None:
    """Takes pages of tensors that are mapped from files out of this process's memory, until they are used.

    What was written to such a tensor since it was mapped is lost. Of tensors that are in memory, or where the
    system does not say what is mapped, nothing changes.

    Args:
        tensors: On any device, and wherever they lie.
    """
    areas = _areas()
    if not areas or not hasattr(mmap, "MADV_DONTNEED"):
        return
    libc = ctypes.CDLL(None)
    for tensor in tensors:
        if tensor.device.type != "cpu" or not _inside(at := tensor.data_ptr(), areas):
            continue
        if tensor.is_contiguous():  # whole pages: others may hold something else too
            start = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (at + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _mapped(model: nn.Module) -> bool:
    """Whether most of a model's bytes are mapped from files; where the system does not say, they are not."""
    areas, sizes = _areas(), {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[_inside(parameter.data_ptr(), areas)] += parameter.nbytes
    return sizes[True] > 9 * sizes[False]


def _areas() -> list[tuple[int, int]]:
    """Addresses at which weights are mapped from files, as first and one behind the last."""
    if sys.platform != "linux":
        return []
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = (re.match(r"([0-9a-f]+)-([0-9a-f]+) .*\.safetensors$", line) for line in lines)
    return [(int(match[1], 16), int(match[2], 16)) for match in found if match]


def _inside(address: int, areas: list[tuple[int, int]]) -> bool:
    return any(start <= address < end for start, end in areas)
